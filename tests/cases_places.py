"""Cases of selection, of transforms, of many factors, and of functions of two numbers, special functions and rounding."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from case import K4, KW, Case, I, S, V, aten, both, direct, frozen, of

__all__ = ["PLACED", "PLACES", "reduced", "shared_product", "shared_products"]

PLACES = torch.tensor([2, 0, 3, 0])


def reduced(a: Tensor, b: Tensor, how: str, own: bool) -> Tensor:
    """What is written to four places, two of them to the first and none to the second."""
    index = PLACES.reshape(-1, *[1] * (a.dim() - 2)).expand(b.shape)
    return a.scatter_reduce(1, index, b, how, include_self=own)


def shared_product(a: Tensor, x: Tensor) -> Tensor:
    """A product over dimension 1, `1/n` of it from each factor: `sum_k a_k prod_(j != k) x_j / n`."""
    n = x.shape[1]
    return torch.stack([a[:, k] * x[:, [j for j in range(n) if j != k]].prod(1) / n for k in range(n)]).sum(0)


def shared_products(a: Tensor, b: Tensor, x: Tensor, y: Tensor, own: bool) -> Tensor:
    """Products at places, factor by factor; `own`: what was there before is a factor, where anything is written."""
    columns = []
    for place in range(4):
        written = [k for k in range(4) if PLACES[k] == place]
        of_a = [place] if own or not written else []
        parts = torch.stack([a[:, k] for k in of_a] + [b[:, k] for k in written], 1)
        at = torch.stack([x[:, k] for k in of_a] + [y[:, k] for k in written], 1)
        columns.append(shared_product(parts, at))
    return torch.stack(columns, 1)


# fmt: off
PLACED: tuple[Case, ...] = (
    # selection
    Case(aten.amax.default, "", of(lambda a: a.amax((1, -1))), (I,), "piecewise"),
    Case(aten.amax.default, "kept, one", of(lambda a: a.amax(2, keepdim=True)), (I,), "piecewise"),
    Case(aten.amin.default, "", of(lambda a: a.amin((2, 1), keepdim=True)), (I,), "piecewise"),
    Case(aten.amin.default, "of aminmax", of(lambda a: torch.add(*torch.aminmax(a, dim=-1))), (I,), "piecewise"),
    Case(aten.max.dim, "", of(lambda a: a.max(1)[0]), (I,), "piecewise"),
    Case(aten.max.dim, "kept", of(lambda a: a.max(-2, keepdim=True).values), (I,), "piecewise"),
    Case(aten.min.dim, "", of(lambda a: a.min(-1)[0]), (S,), "piecewise"),
    Case(aten.median.dim, "", of(lambda a: a.median(1)[0]), (S,), "piecewise"),
    Case(aten.nanmedian.dim, "", of(lambda a: a.nanmedian(2, True)[0]), (S,), "piecewise"),
    Case(aten.mode.default, "", of(lambda a: a.mode(1)[0]), (S,), "piecewise"),
    Case(aten.kthvalue.default, "", of(lambda a: a.kthvalue(2, 1)[0]), (S,), "piecewise"),
    Case(aten.topk.default, "", of(lambda a: a.topk(2, 1)[0]), (I,), "piecewise"),
    Case(aten.sort.default, "", of(lambda a: a.sort(1, descending=True)[0]), (I,), "piecewise"),
    Case(aten.sort.stable, "", of(lambda a: aten.sort.stable(a, stable=True, dim=-1)[0]), (S,), "piecewise"),
    Case(aten.cummax.default, "", of(lambda a: a.cummax(-1)[0]), (S,), "piecewise"),
    Case(aten.cummin.default, "", of(lambda a: a.cummin(1)[0]), (S,), "piecewise"),
    Case(aten.gather.default, "", of(lambda a: a.gather(1, PLACES[None, :, None].expand(a.shape[0], -1, 5))), (S,), "jacobian"),
    Case(aten.gather.default, "by a carried order", of(lambda a: a.gather(1, a.argsort(1))), (S,), "piecewise"),
    Case(aten.index_select.default, "", of(lambda a: a.index_select(-2, torch.tensor([4, 0, 0, 6]))), (I,), "jacobian"),
    Case(aten.index.Tensor, "", of(lambda a: a[:, PLACES]), (I,), "jacobian"),
    Case(aten.index.Tensor, "two, side by side", of(lambda a: a[:, PLACES[:, None], PLACES]), (I,), "jacobian"),
    Case(aten.index.Tensor, "two, apart", of(lambda a: a[:, PLACES, :, PLACES[:2, None]].movedim(2, 0)), (I,),
         "jacobian"),
    Case(aten.index.Tensor, "one for each sample",
         of(lambda a: a[torch.arange(a.shape[0]), a.sum(-1).argmax(-1)]), (S,), "piecewise"),
    Case(aten.index.Tensor, "one for each sample, apart",
         of(lambda a: a[torch.arange(a.shape[0]), :, a.sum((1, 3)).argmax(-1)]), (I,), "piecewise"),
    Case(aten._unsafe_index.Tensor, "",
         of(lambda a: aten._unsafe_index(a, [None, None, PLACES[:, None], PLACES])), (I,), "jacobian"),
    Case(aten.masked_fill.Scalar, "", of(lambda a: a.masked_fill(K4 > 0.5, -2.0)), (V,), "jacobian"),
    Case(aten.masked_fill.Tensor, "of a carried value", of(lambda a: a.masked_fill(a > 0.1, K4[0])), (V,), "piecewise"),
    Case(aten.scatter.value, "", of(lambda a: a.scatter(1, PLACES[None, :3].expand(a.shape[0], -1), 2.0)), (V,), "jacobian"),
    Case(aten.index_fill.int_Scalar, "", of(lambda a: a.index_fill(-1, PLACES, 2.0)), (S,), "jacobian"),
    Case(aten.index_fill.int_Tensor, "", of(lambda a: a.index_fill(1, PLACES, K4[2])), (S,), "jacobian"),
    # PyTorch has no gradient of a source larger than the index: the twins cut it first
    frozen(aten.scatter.src, "two carried", lambda a, b: a.scatter(1, PLACES[None, :2].expand(a.shape[0], -1), b),
           lambda a, b, *at: a.scatter(1, PLACES[None, :2].expand(a.shape[0], -1), b[:, :2]), V, V),
    frozen(aten.scatter.src, "on a constant",
           lambda a: a.new_ones(a.shape).scatter(1, PLACES[None, :2].expand(a.shape[0], -1), a),
           lambda a, *at: a.new_ones(a.shape).scatter(1, PLACES[None, :2].expand(a.shape[0], -1), a[:, :2]), V),
    Case(aten.diagonal_scatter.default, "",
         both(lambda a, b: torch.diagonal_scatter(a, b[:, :4, 0], 1, 1, 2)), (S, S), "jacobian"),
    Case(aten.index_copy.default, "", both(lambda a, b: a.index_copy(-1, PLACES[:3], b[..., :3])), (S, S), "jacobian"),
    Case(aten.masked_scatter.default, "",
         both(lambda a, b: a.masked_scatter(K4.repeat(a.shape[0], 1) > 0.1, b)), (V, V), "jacobian"),
    Case(aten.index_put.default, "", both(lambda a, b: torch.index_put(a, (torch.arange(a.shape[0]), PLACES[0]), b[:, 1])),
         (S, S), "jacobian"),
    Case(aten.index_put.default, "constant", of(lambda a: torch.index_put(a, (torch.arange(a.shape[0]), PLACES[0]), K4[0])), (S,),
         "jacobian"),
    Case(aten.index_put.default, "accumulating, broadcast",
         both(lambda a, b: torch.index_put(a, (torch.arange(a.shape[0])[:, None], PLACES), b[:, :1], True)), (V, V), "jacobian"),
    Case(aten._unsafe_index_put.default, "", both(lambda a, b: aten._unsafe_index_put(a, [None, PLACES[:2]], b[:, :2])), (V, V),
         "jacobian"),
    Case(aten.index_add.default, "", both(lambda a, b: a.index_add(1, PLACES, b, alpha=0.5)), (S, S), "jacobian"),
    Case(aten.index_add.default, "on a constant", of(lambda a: a.new_ones(a.shape).index_add(-2, PLACES, a)), (S,), "jacobian"),
    frozen(aten.scatter_add.default, "smaller index",
           lambda a, b: a.scatter_add(1, PLACES[None, :3].expand(a.shape[0], -1), b),
           lambda a, b, *at: a.scatter_add(1, PLACES[None, :3].expand(a.shape[0], -1), b[:, :3]), V, V),
    Case(aten.scatter_reduce.two, "sum",
         both(lambda a, b: a.scatter_reduce(1, PLACES[None].expand(a.shape[0], -1), b, "sum")), (V, V), "jacobian"),
    Case(aten.scatter_reduce.two, "sum, not onto itself", both(lambda a, b: reduced(a, b, "sum", False)), (V, V), "jacobian"),
    Case(aten.scatter_reduce.two, "mean", both(lambda a, b: reduced(a, b, "mean", True)), (V, V), "jacobian"),
    Case(aten.scatter_reduce.two, "mean, not onto itself", both(lambda a, b: reduced(a, b, "mean", False)), (S, S), "jacobian"),
    Case(aten.scatter_reduce.two, "mean, on a constant", of(lambda a: reduced(a.new_ones(a.shape), a, "mean", True)), (V,),
         "jacobian"),
    Case(aten.scatter_reduce.two, "amax", both(lambda a, b: reduced(a, b, "amax", True)), (S, S), "piecewise"),
    Case(aten.scatter_reduce.two, "amin, not onto itself", both(lambda a, b: reduced(a, b, "amin", False)), (V, V), "piecewise"),
    Case(aten.scatter_reduce.two, "amax, on minus infinity",
         of(lambda a: reduced(torch.full_like(a, -math.inf), a, "amax", True)[:, [0, 2, 3]]), (V,), "piecewise"),
    frozen(aten.scatter_reduce.two, "prod", lambda a, b: reduced(a, b, "prod", True), partial(shared_products, own=True), V, V),
    frozen(aten.scatter_reduce.two, "prod, not onto itself", lambda a, b: reduced(a, b, "prod", False),
           partial(shared_products, own=False), V, V),
    Case(aten.cumsum.default, "", of(lambda a: a.cumsum(1)), (I,), "jacobian"),

    # Fourier transforms, complex numbers, the length and the angle of a pair
    Case(aten._fft_r2c.default, "", of(lambda a: torch.view_as_real(torch.fft.rfft(a))), (S,), "jacobian"),
    Case(aten._fft_r2c.default, "odd size", of(lambda a: torch.fft.rfft(a, dim=2, norm="ortho").imag), (I,), "jacobian"),
    Case(aten._fft_r2c.default, "two dimensions", of(lambda a: torch.view_as_real(torch.fft.rfft2(a, norm="forward"))), (I,),
         "jacobian"),
    Case(aten._fft_r2c.default, "both halves", of(lambda a: torch.view_as_real(torch.fft.fft(a))), (S,), "jacobian"),
    Case(aten._fft_c2c.default, "", both(lambda a, b: torch.view_as_real(torch.fft.fft(torch.complex(a, b)))), (S, S),
         "jacobian"),
    Case(aten._fft_c2c.default, "back, two dimensions", both(lambda a, b: torch.fft.ifft2(torch.complex(a, b), dim=(3, 1)).real),
         (I, I), "jacobian"),
    Case(aten._fft_c2r.default, "even size", both(lambda a, b: torch.fft.irfft(torch.complex(a, b))), (S, S), "jacobian"),
    Case(aten._fft_c2r.default, "odd size", both(lambda a, b: torch.fft.irfft(torch.complex(a, b), 9, norm="ortho")), (S, S),
         "jacobian"),
    Case(aten._fft_c2r.default, "two dimensions", both(lambda a, b: torch.fft.irfft2(torch.complex(a, b), [5, 6])), (I, I),
         "jacobian"),
    Case(aten.complex.default, "constant imaginary part",
         of(lambda a: torch.fft.fft(torch.complex(a, KW.expand_as(a))).real), (S,), "jacobian"),
    Case(aten.complex.default, "constant real part",
         of(lambda a: torch.fft.fft(torch.complex(KW.expand_as(a), a)).real), (S,), "jacobian"),
    Case(aten.view_as_real.default, "", of(lambda a: torch.view_as_real(torch.fft.rfft(a))[..., 1]), (S,), "jacobian"),
    Case(aten.hypot.default, "two carried", both(torch.hypot), (V, V), "piecewise"),
    Case(aten.hypot.default, "constant", of(lambda a: torch.hypot(K4, a)), (V,), "piecewise"),
    Case(aten.hypot.default, "broadcast", both(lambda a, b: torch.hypot(a, b[:, :1])), (V, V), "piecewise"),
    Case(aten.atan2.default, "two carried", both(torch.atan2), (V, V), "piecewise"),
    Case(aten.atan2.default, "constant", of(lambda a: torch.atan2(a, -K4)), (V,), "piecewise"),

    # products of many factors
    frozen(aten.prod.dim_int, "", lambda a: a.prod(1), shared_product, S),
    frozen(aten.prod.dim_int, "kept", lambda a: a.prod(-1, True),
           lambda a, x: shared_product(a.movedim(-1, 1), x.movedim(-1, 1))[..., None], S),
    frozen(aten.cumprod.default, "", lambda a: a.cumprod(1),
           lambda a, x: torch.stack([shared_product(a[:, : i + 1], x[:, : i + 1]) for i in range(4)], 1), S),
    frozen(aten.cumprod.default, "last", lambda a: a.cumprod(-1),
           lambda a, x: torch.stack([shared_product(a[:, : i + 1], x[:, : i + 1]) for i in range(4)], 1), V),

    # functions of two numbers
    frozen(aten.logaddexp.default, "two carried", torch.logaddexp,
           lambda a, b, x, y: torch.where(x >= y, a, b) + torch.log1p((-(x - y).abs()).exp()), V, V),
    Case(aten.logaddexp.default, "constant", of(lambda a: torch.logaddexp(a, 3 * K4)), (V,), "quotient"),
    frozen(aten.logaddexp2.default, "two carried", torch.logaddexp2,
           lambda a, b, x, y: torch.where(x >= y, a, b) + torch.log2(1 + 2 ** -(x - y).abs()), V, V),
    Case(aten.logaddexp2.default, "constant", of(lambda a: torch.logaddexp2(-2 * K4, a)), (V,), "quotient"),
    frozen(aten.xlogy.Tensor, "two carried", torch.xlogy, lambda a, b, x, y: (a * y.log() + x * y.log() / y * b) / 2, V, V,
           positive=True),
    Case(aten.xlogy.Tensor, "constant", of(lambda a: torch.xlogy(a, K4)), (V,), "jacobian"),
    Case(aten.xlogy.Scalar_Self, "", of(lambda a: torch.xlogy(2.0, a)), (V,), "quotient", positive=True),
    Case(aten.xlogy.Scalar_Other, "", of(lambda a: torch.xlogy(a, 2.0)), (V,), "jacobian"),
    frozen(aten.special_xlog1py.default, "two carried", torch.special.xlog1py,
           lambda a, b, x, y: (a * y.log1p() + x * y.log1p() / y * b) / 2, V, V, positive=True),
    Case(aten.special_xlog1py.self_scalar, "", of(lambda a: torch.special.xlog1py(2.0, a)), (V,), "quotient", positive=True),
    Case(aten.special_xlog1py.other_scalar, "", of(lambda a: torch.special.xlog1py(a, 2.0)), (V,), "jacobian"),
    Case(aten.copysign.Tensor, "two carried", both(lambda a, b: torch.copysign(a, b)), (V, V), "piecewise"),
    Case(aten.copysign.Tensor, "of a constant", of(lambda a: torch.copysign(K4, a) + a), (V,), "piecewise"),
    Case(aten.copysign.Scalar, "", of(lambda a: torch.copysign(a, -1.0)), (V,), "piecewise"),
    frozen(aten.heaviside.default, "", lambda a: torch.heaviside(a, K4) + a, lambda a, x: (x > 0) + a, V),
    Case(aten.igamma.default, "", of(lambda a: torch.special.gammainc(K4, a)), (V,), "quotient", positive=True),
    Case(aten.igammac.default, "", of(lambda a: torch.special.gammaincc(K4, a)), (V,), "quotient", positive=True),

    # special functions
    Case(aten.sinc.default, "", of(torch.sinc), (V,), "quotient"),
    Case(aten.erfinv.default, "", of(lambda a: (a / 4).erfinv()), (V,), "quotient"),
    Case(aten.special_erfcx.default, "", of(torch.special.erfcx), (V,), "quotient"),
    Case(aten.special_log_ndtr.default, "", of(torch.special.log_ndtr), (V,), "quotient"),
    Case(aten.i0.default, "", of(torch.i0), (V,), "quotient"),
    Case(aten.special_i0e.default, "", of(torch.special.i0e), (V,), "quotient"),
    Case(aten.special_i1.default, "", of(torch.special.i1), (V,), "quotient"),
    Case(aten.special_i1e.default, "", of(torch.special.i1e), (V,), "quotient"),
    Case(aten.special_entr.default, "", of(torch.special.entr), (V,), "quotient", positive=True),
    Case(aten.lgamma.default, "", of(torch.lgamma), (V,), "quotient", positive=True),
    Case(aten.digamma.default, "", of(torch.digamma), (V,), "quotient", positive=True),
    Case(aten.polygamma.default, "", of(lambda a: torch.polygamma(1, a)), (V,), "quotient", positive=True),
    Case(aten.mvlgamma.default, "", of(lambda a: torch.mvlgamma(8 * a, 2)), (V,), "quotient", positive=True),
    Case(aten.special_ndtri.default, "", of(lambda a: torch.special.ndtri(a / 8)), (V,), "quotient", positive=True),

    # rounding and casts
    direct(aten._to_copy.default, shape=V),
    direct(aten.to.dtype, torch.float64, shape=V),
    direct(aten.to.other, torch.ones(1, dtype=torch.float64), shape=V),
    Case(aten.type_as.default, "", of(lambda a: a.type_as(K4)), (V,), "jacobian"),
    Case(aten.type_as.default, "like a value that carries", of(lambda a: (2 * a).type_as(a)), (V,), "jacobian"),
    Case(aten.sign.default, "", of(lambda a: a.sign() + a), (V,), "piecewise"),
    Case(aten.sgn.default, "", of(lambda a: a.sgn() + a), (V,), "piecewise"),
    Case(aten.floor.default, "", of(lambda a: (3 * a).floor() - a), (V,), "piecewise"),
    Case(aten.ceil.default, "", of(lambda a: (3 * a).ceil() - a), (V,), "piecewise"),
    Case(aten.remainder.Scalar, "", of(lambda a: a % 0.4), (V,), "piecewise"),
    Case(aten.remainder.Tensor, "", of(lambda a: a % K4), (V,), "piecewise"),
    Case(aten.remainder.Tensor, "two carried", both(lambda a, b: a % (b.abs() + 0.2)), (V, V), "piecewise"),
    Case(aten.remainder.Tensor, "of a constant", of(lambda a: torch.remainder(2.5 * K4, a.abs() + 0.2)), (V,), "piecewise"),
    Case(aten.fmod.Tensor, "", of(lambda a: torch.fmod(a, 0.4 * K4)), (V,), "quotient"),
    Case(aten.fmod.Tensor, "two carried", both(lambda a, b: torch.fmod(a, b.abs() + 0.2)), (V, V), "piecewise"),
    Case(aten.div.Tensor_mode, "down", of(lambda a: torch.div(a, 0.4, rounding_mode="floor") - a), (V,), "piecewise"),
    Case(aten.div.Tensor_mode, "down, two carried", both(lambda a, b: torch.div(a, b.abs() + 0.2, rounding_mode="floor") + b),
         (V, V), "piecewise"),
    Case(aten.round.default, "", of(lambda a: (3 * a).round()), (V,), "quotient"),
    Case(aten.round.decimals, "", of(lambda a: a.round(decimals=1)), (V,), "quotient"),
    Case(aten.trunc.default, "", of(lambda a: (3 * a).trunc()), (V,), "quotient"),
    Case(aten.frac.default, "", of(lambda a: (3 * a).frac()), (V,), "quotient"),
    Case(aten.fmod.Scalar, "", of(lambda a: a.fmod(0.4)), (V,), "quotient"),
    Case(aten.nan_to_num.default, "", of(lambda a: a.nan_to_num()), (V,), "jacobian"),
)
# fmt: on
