"""Operators decomposed into others, if PyTorch does not do so itself or not in a form that keeps samples independent.

Each function computes what the operator computes, from the same arguments; :mod:`frpc.capture.decompose` traces it in the
call's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import get_decompositions

__all__ = ["AT_CAPTURE", "COMPOSED"]

aten = torch.ops.aten
Number = int | float

# Scalars and whole tensors ------------------------------------------------------------------------------------------------


def _all(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction of everything, as the same reduction over every dimension."""

    def reduced(a: Tensor, **options: Any) -> Tensor:
        return reduce(a, list(range(a.dim())), **options)

    return reduced


def _product_of_all(a: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return aten.prod.dim_int(a.reshape([-1]), 0, dtype=dtype)


def _ldexp(a: Tensor, exponent: Tensor) -> Tensor:
    return a * torch.pow(2.0, exponent)


def _divided(a: Tensor, b: Tensor | Number, *, rounding_mode: str | None) -> Any:
    """Without rounding, and with rounding towards 0; rounding down is not the floor of the quotient, and stays whole."""
    if rounding_mode == "floor":
        return NotImplemented
    quotient = aten.div.Tensor(a, b)
    return quotient if rounding_mode is None else torch.trunc(quotient)


# Layers -------------------------------------------------------------------------------------------------------------------


def _rrelu(a: Tensor, lower: Number = 1 / 8, upper: Number = 1 / 3, training: bool = False, generator: Any = None) -> Tensor:
    """In evaluation the slope is the middle of its range; in training it is random, which is an error earlier."""
    return aten.leaky_relu.default(a, (lower + upper) / 2)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    new_a: Sequence[int],
    new_b: Sequence[int],
    new_c: Sequence[int],
    summed: Sequence[int],
    unroll_dim: int = 1,
) -> Any:
    """``z[n, o] = sum_ij a[n, i] W[o, i, j] c[n, j]``, the form of a bilinear layer: a linear layer, and a product with it."""
    if (list(new_a), list(new_b), list(new_c), list(summed)) != ([1, 3], [0], [1, 2], [2, 3]):
        return NotImplemented
    out, first, second = b.shape
    inner = aten.linear.default(a, b.transpose(1, 2).reshape(out * second, first)).unflatten(-1, [out, second])
    return (inner * c.unsqueeze(-2)).sum(-1)


def _cross(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """``z_i = a_(i+1) b_(i+2) - a_(i+2) b_(i+1)``."""
    return a.roll(-1, dim) * b.roll(-2, dim) - a.roll(-2, dim) * b.roll(-1, dim)


def _unpooled(spatial: int) -> Callable[..., Tensor]:
    """Max unpooling: every element at its place of an image of zeros."""

    def unpooled(a: Tensor, indices: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
        kept = list(a.shape[: a.dim() - spatial])
        zeros = a.new_zeros([*kept, math.prod(size)])
        return zeros.scatter(-1, indices.flatten(-spatial), a.flatten(-spatial)).reshape([*kept, *size])

    return unpooled


def _batch_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float) -> Any:
    """Batch norm of one image ``[1, C, ...]`` looks at each channel alone; of a batch it mixes samples, and stays whole."""
    if not isinstance(a.shape[0], int) or a.shape[0] != 1 or a.dim() < 3:
        return NotImplemented
    dims, shape = list(range(2, a.dim())), [1, -1, *[1] * (a.dim() - 2)]
    mean, inverse = a.mean(dims, keepdim=True), (a.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    z = (a - mean) * inverse
    z = z if weight is None else z * weight.reshape(shape)
    z = z if bias is None else z + bias.reshape(shape)
    return z, mean.flatten(), inverse.flatten()


# Reductions at places -----------------------------------------------------------------------------------------------------


def _index_reduced(a: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Tensor:
    """The same index for every row is an index for every element."""
    shape = [1] * a.dim()
    shape[dim] = -1
    how = {"prod": "prod", "mean": "mean", "amax": "amax", "amin": "amin"}[reduce]
    return a.scatter_reduce(dim, index.reshape(shape).expand(source.shape), source, how, include_self=include_self)


def _log_running_sums(a: Tensor, dim: int) -> Tensor:
    """``log sum_(j <= i) e^(a_j)``, a row for every i: what comes after i is masked."""
    along = dim % a.dim()
    count, places = a.shape[along], torch.arange(a.shape[along], device=a.device)
    seen = (places[None, :] <= places[:, None]).reshape([count, count, *[1] * (a.dim() - 1 - along)])  # [i, j]
    return torch.where(seen, a.unsqueeze(along), -math.inf).logsumexp(along + 1)


# Losses -------------------------------------------------------------------------------------------------------------------


def _mean_or_sum(z: Tensor, reduction: int) -> Tensor:
    return z if reduction == 0 else aten.mean.default(z) if reduction == 1 else aten.sum.default(z)


def _huber(a: Tensor, b: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    """``c (d - c/2)`` with ``d = |a - b|``, ``c = min(d, delta)``: d^2/2 up to delta, and a straight line from there."""
    distance = (a - b).abs()
    near = distance.clamp(max=delta)
    return _mean_or_sum(near * (distance - near * 0.5), reduction)


def _smooth_l1(a: Tensor, b: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    """Huber's loss over beta, which is the plain distance for beta = 0."""
    if beta == 0:
        return _mean_or_sum((a - b).abs(), reduction)
    return _huber(a, b, reduction, beta) * (1.0 / beta)


def _hinge_embedding(a: Tensor, target: Tensor, margin: float = 1.0, reduction: int = 1) -> Tensor:
    """What is far by less than the margin where it should be far, and the distance itself where it should be near."""
    far, near = torch.where(target != 1, (margin - a).clamp_min(0), 0.0), torch.where(target != -1, a, 0.0)
    return _mean_or_sum(far + near, reduction)


def _margin_ranking(a: Tensor, b: Tensor, target: Tensor, margin: float = 0.0, reduction: int = 1) -> Tensor:
    return _mean_or_sum((margin - target * (a - b)).clamp_min(0), reduction)


def _nll_loss_nd(a: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100) -> Tensor:
    forward = aten.nll_loss_forward.default if a.dim() <= 2 else aten.nll_loss2d_forward.default
    if a.dim() > 4 or a.dim() == 3:  # pixels in a row, or in a volume: as an image
        shape = a.shape
        loss = forward(a.reshape([*shape[:2], 1, -1]), target.reshape([shape[0], 1, -1]), weight, reduction, ignore_index)[0]
        return loss if reduction else loss.reshape([shape[0], *shape[2:]])
    return forward(a, target, weight, reduction, ignore_index)[0]


AT_CAPTURE: dict[Any, Callable[..., Any]] = {
    aten.hinge_embedding_loss.default: _hinge_embedding,
    aten.margin_ranking_loss.default: _margin_ranking,
    aten.nll_loss_nd.default: _nll_loss_nd,
}
"""Losses whose decompositions in PyTorch fail for a free batch size when a captured program is made functional."""

COMPOSED: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten.addmv,
            aten.addr,
            aten.affine_grid_generator,
            aten.aminmax,
            aten.binary_cross_entropy,
            aten.binary_cross_entropy_with_logits,
            aten.floor_divide,
            aten.mse_loss,
            aten.multilabel_margin_loss_forward,
            aten.nansum,
            aten.nll_loss2d_forward,
            aten.nll_loss_forward,
            aten.soft_margin_loss,
            aten.special_ndtr,
        ]
    ),
    **AT_CAPTURE,
    aten.mul.Scalar: lambda a, k: aten.mul.Tensor(a, k),
    aten.div.Scalar: lambda a, k: aten.div.Tensor(a, k),
    aten.sub.Scalar: lambda a, k, alpha=1: aten.sub.Tensor(a, k, alpha=alpha),
    aten.div.Tensor_mode: _divided,
    aten.div.Scalar_mode: lambda a, k, *, rounding_mode: aten.div.Tensor_mode(a, k, rounding_mode=rounding_mode),
    aten.ldexp.Tensor: _ldexp,
    aten.remainder.Scalar_Tensor: lambda k, a: aten.remainder.Tensor(torch.full([], k, dtype=a.dtype, device=a.device), a),
    aten.sum.default: _all(aten.sum.dim_IntList),
    aten.mean.default: _all(aten.mean.dim),
    aten.max.default: _all(aten.amax.default),
    aten.min.default: _all(aten.amin.default),
    aten.prod.default: _product_of_all,
    aten.rrelu.default: _rrelu,
    aten._trilinear.default: _trilinear,
    aten.linalg_cross.default: _cross,
    aten.max_unpool2d.default: _unpooled(2),
    aten.max_unpool3d.default: _unpooled(3),
    aten._native_batch_norm_legit.no_stats: _batch_norm,
    aten.index_reduce.default: _index_reduced,
    aten.logcumsumexp.default: _log_running_sums,
    aten.huber_loss.default: _huber,
    aten.smooth_l1_loss.default: _smooth_l1,
}
"""The operators by their functions; one that returns ``NotImplemented`` leaves the call as it is."""
