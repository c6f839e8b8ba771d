"""Cases of sums, products, norms and functions of one number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case import K1, K4, KB, KW, Case, I, S, V, aten, both, constant, frozen, of

__all__ = ["VALUES"]


def scattered(a: Tensor, b: Tensor) -> Tensor:
    """Every second channel replaced by another value's."""
    return torch.slice_scatter(a, b[:, :2], 1, 0, 4, 2)


def scattered_on_constant(a: Tensor) -> Tensor:
    """Two channels inside a constant."""
    return torch.slice_scatter(K4.repeat(len(a), 1), a[:, :2], 1, 1, 3)


def scattered_constant(a: Tensor) -> Tensor:
    """A constant in place of two channels."""
    return torch.slice_scatter(a, K4[:2].repeat(len(a), 1), 1, 1, 3)


def written_in_part(a: Tensor) -> Tensor:
    """Some columns multiplied in place, through a view."""
    b = a.clone()
    b[:, ::2] *= 3.0
    return b


def by_groups(a: Tensor, x: Tensor) -> Tensor:
    """Group norm of four channels in two groups, the deviations held."""
    parts, held = a.unflatten(1, (2, 2)), x.unflatten(1, (2, 2))
    deviation = (held.var((2, 3, 4), correction=0, keepdim=True) + 1e-3).sqrt()
    return ((parts - parts.mean((2, 3, 4), True)) / deviation).flatten(1, 2) * K1 - K1


def soft(a: Tensor, x: Tensor) -> Tensor:
    """Softmax as `1/Z + (e^z - 1)/(z Z) z` of z = a - a_max, the largest element's place, Z and the secant held."""
    top = x.argmax(1, True)
    z, held = a - a.gather(1, top), x - x.gather(1, top)
    secant = torch.where(held == 0, 1.0, held.expm1() / torch.where(held == 0, 1.0, held))
    return (1 + secant * z) / held.exp().sum(1, True)


# fmt: off
VALUES: tuple[Case, ...] = (
    # sums, products, quotients
    Case(aten.add.Tensor, "two carried", both(lambda a, b: a + b), (I, I)),
    Case(aten.add.Tensor, "alpha", both(lambda a, b: torch.add(a, b, alpha=-0.5)), (V, V)),
    Case(aten.add.Tensor, "broadcast", both(lambda a, b: a + b), (I, (3, 1, 7, 1))),
    Case(aten.add.Tensor, "lower rank result", both(lambda a, b: a[:, :1] + b), (V, V)),
    Case(aten.add.Tensor, "constant", of(lambda a: a + K4), (V,)),
    Case(aten.add.Tensor, "constant that enlarges", of(lambda a: a + K1), ((3, 1, 3, 2),)),
    Case(aten.add.Tensor, "number", of(lambda a: 1.5 + a), (V,)),
    Case(aten.add.Tensor, "itself", of(lambda a: a + a), (V,)),
    Case(aten.sub.Tensor, "two carried", both(lambda a, b: torch.sub(a, b, alpha=2)), (I, I)),
    Case(aten.sub.Tensor, "broadcast", both(lambda a, b: a - b), ((3, 1, 6), S)),
    Case(aten.sub.Tensor, "constant", of(lambda a: a - K4), (V,)),
    Case(aten.sub.Tensor, "from a constant", of(lambda a: K4 - a), (V,)),
    Case(aten.rsub.Scalar, "", of(lambda a: 1.0 - a), (V,)),
    Case(aten.rsub.Scalar, "alpha", of(lambda a: torch.rsub(a, 2.0, alpha=3)), (V,), "jacobian"),
    Case(aten.rsub.Tensor, "", both(lambda a, b: torch.rsub(a, b)), (V, V), "jacobian"),
    Case(aten.mul.Tensor, "two carried", both(lambda a, b: a * b), (I, I)),
    Case(aten.mul.Tensor, "two carried, broadcast", both(lambda a, b: a * b), (I, (3, 4, 1, 1))),
    Case(aten.mul.Tensor, "square of itself", of(lambda a: a * a), (V,)),
    Case(aten.mul.Tensor, "constant", of(lambda a: K4 * a), (V,)),
    Case(aten.mul.Tensor, "constant that enlarges", of(lambda a: a * K1), ((3, 1, 3, 2),)),
    Case(aten.mul.Tensor, "number", of(lambda a: -0.3 * a), (V,)),
    Case(aten.mul.Tensor, "one", of(lambda a: a * 1), (V,)),
    Case(aten.div.Tensor, "two carried", both(lambda a, b: a / (2 + b.square())), (I, I)),
    Case(aten.div.Tensor, "constant", of(lambda a: a / K4), (V,)),
    Case(aten.div.Tensor, "whole numbers", of(lambda a: a / torch.tensor([1, 3, 7, 9])), (V,)),
    Case(aten.div.Tensor, "number", of(lambda a: a / 3), (V,)),
    Case(aten.div.Tensor, "of a constant", of(lambda a: torch.div(K4, a)), (V,), "quotient", positive=True),
    Case(aten.cat.default, "", both(lambda a, b: torch.cat([a, b, a], 1)), (I, (3, 3, 7, 5))),
    Case(aten.cat.default, "last, with a constant",
         of(lambda a: torch.cat([a, a.new_ones(a.shape[0], 2), 2 * a], -1)), (V,), "jacobian"),
    Case(aten.where.self, "two carried", both(lambda a, b: torch.where(K4 > 0, a, b)), (V, V), "jacobian"),
    Case(aten.where.self, "constant", of(lambda a: torch.where(K4 > 0.4, a, -K4)), (V,), "jacobian"),
    Case(aten.where.self, "condition of a carried value", of(lambda a: torch.where(a > 0.1, a, K4)), (V,), "piecewise"),
    Case(aten.where.ScalarSelf, "", of(lambda a: torch.where(K4 > 0.4, -1.5, a)), (V,), "jacobian"),
    Case(aten.where.ScalarOther, "", of(lambda a: torch.where(K4 > 0.4, a, -1.5)), (V,), "jacobian"),
    Case(aten.copy.default, "", of(written_in_part), (V,), "jacobian"),
    Case(aten.mm.default, "", of(lambda a: torch.mm(a, constant(4, 5))), (V,), "jacobian"),
    Case(aten.addmm.default, "", of(lambda a: torch.addmm(constant(5), a, constant(4, 5), beta=0.5, alpha=2)), (V,), "jacobian"),
    Case(aten.slice_scatter.default, "two carried", both(scattered), (I, I), "jacobian"),
    Case(aten.slice_scatter.default, "constant base",
         of(scattered_on_constant), (V,), "jacobian"),
    Case(aten.slice_scatter.default, "constant part",
         of(scattered_constant), (V,), "jacobian"),
    Case(aten.diagonal.default, "", of(lambda a: a.diagonal(1, 1, -1)), (I,), "jacobian"),
    Case(aten.unfold.default, "overlapping", of(lambda a: a.unfold(2, 3, 2)), (I,), "jacobian"),
    Case(aten.lerp.Scalar, "", both(lambda a, b: torch.lerp(a, b, 0.3)), (V, V), "jacobian"),
    Case(aten.sum.dim_IntList, "", of(lambda a: a.sum((1, -1))), (I,)),
    Case(aten.sum.dim_IntList, "kept", of(lambda a: a.sum(2, keepdim=True)), (I,)),
    Case(aten.mean.dim, "", of(lambda a: a.mean((2, 3))), (I,)),
    Case(aten.mean.dim, "kept", of(lambda a: a.mean(-1, True)), (S,)),

    # products of two values and of matrices, powers, choices
    frozen(aten.add.Scalar, "", lambda a: F.pairwise_distance(a, K4, eps=0.5, keepdim=True),
           lambda a, x: ((a - K4 + 0.5) * (x - K4 + 0.5)).sum(-1, True) / (x - K4 + 0.5).norm(dim=-1, keepdim=True), V),
    Case(aten.mm.default, "constant on the left", of(lambda a: torch.mm(constant(5, 4), a.t()).t()), (V,), "jacobian"),
    Case(aten.matmul.default, "constant on the right", of(lambda a: a @ constant(6, 5)), (S,), "jacobian"),
    Case(aten.matmul.default, "constant on the left", of(lambda a: constant(5, 4) @ a), (S,), "jacobian"),
    Case(aten.matmul.default, "constant batch on the left",
         of(lambda a: constant(2, 5, 3) @ a.unsqueeze(1)), ((3, 3, 2),), "jacobian"),
    Case(aten.matmul.default, "constant vector", of(lambda a: a @ constant(6)), (S,), "jacobian"),
    frozen(aten.matmul.default, "two carried", lambda a, b: a @ b, lambda a, b, x, y: (a @ y + x @ b) / 2, S, (3, 6, 5)),
    frozen(aten.matmul.default, "one a softmax", lambda a, b: a.softmax(-1) @ b, lambda a, b, x, y: x.softmax(-1) @ b,
           S, (3, 6, 5)),
    frozen(aten.bmm.default, "two carried", lambda a, b: a.bmm(b), lambda a, b, x, y: (a @ y + x @ b) / 2, S, (3, 6, 5)),
    Case(aten.mv.default, "", of(lambda a: torch.mv(a, K4)[:, None] * K4), (V,), "jacobian"),
    frozen(aten.addmm.default, "summand carried", lambda a, b: torch.addmm(a, b, constant(5, 4), beta=0.5, alpha=2),
           lambda a, b, x, y: 0.5 * a + 2 * b @ constant(5, 4), V, (3, 5)),
    frozen(aten.baddbmm.default, "two carried", lambda a, b: torch.baddbmm(a[:, :1, :1], a, b, beta=0.5, alpha=2),
           lambda a, b, x, y: 0.5 * a[:, :1, :1] + a @ y + x @ b, S, (3, 6, 5)),
    Case(aten.linear.default, "weight carried", of(lambda a: F.linear(constant(5, 4), a).t()), (V,), "jacobian"),
    Case(aten.pow.Tensor_Tensor, "", of(lambda a: a ** (2 * K4)), (V,), "quotient", positive=True),
    Case(aten.pow.Tensor_Tensor, "exponent", of(lambda a: K4**a), (V,), "quotient"),
    Case(aten.pow.Scalar, "", of(lambda a: 2.5**a), (V,), "quotient"),
    Case(aten.maximum.default, "two carried", both(torch.maximum), (V, V), "jacobian"),
    Case(aten.maximum.default, "constant", of(lambda a: torch.maximum(K4, a)), (V,), "piecewise"),
    Case(aten.minimum.default, "two carried", both(torch.min), (V, V), "jacobian"),
    Case(aten.fmax.default, "", both(torch.fmax), (V, V), "jacobian"),
    Case(aten.fmin.default, "", both(torch.fmin), (V, V), "jacobian"),
    frozen(aten.mul.Tensor, "addcmul", lambda a, b: torch.addcmul(a, a, b, value=-2.0),
           lambda a, b, x, y: a - a * y - x * b, V, V),

    # norms, moments, softmax
    frozen(aten.layer_norm.default, "", lambda a: F.layer_norm(a, [6], KW, KB, 1e-3),
           lambda a, x: (a - a.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * KW + KB, S),
    frozen(aten.layer_norm.default, "two dimensions, plain", lambda a: F.layer_norm(a, [4, 6]),
           lambda a, x: (a - a.mean((1, 2), True)) / (x.var((1, 2), correction=0, keepdim=True) + 1e-5).sqrt(), S),
    frozen(aten.native_layer_norm.default, "", lambda a: aten.native_layer_norm(a, [6], KW, KB, 1e-3)[0],
           lambda a, x: (a - a.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * KW + KB, S),
    frozen(aten.group_norm.default, "", lambda a: F.group_norm(a, 2, K4, -K4, 1e-3), by_groups, I),
    frozen(aten.native_group_norm.default, "",
           lambda a: aten.native_group_norm(a, K4, -K4, a.shape[0], 4, 35, 2, 1e-3)[0], by_groups, I),
    frozen(aten.instance_norm.default, "", lambda a: F.instance_norm(a, None, None, K4, -K4, eps=1e-3),
           lambda a, x: (a - a.mean((2, 3), True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-3).sqrt() * K1 - K1, I),
    Case(aten.instance_norm.default, "running statistics",
         of(lambda a: F.instance_norm(a, K4, K4 + 1, K4, -K4, use_input_stats=False)), (I,), "jacobian"),
    frozen(aten.rms_norm.default, "", lambda a: F.rms_norm(a, [6], KW, 1e-3),
           lambda a, x: a / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * KW, S),
    frozen(aten._fused_rms_norm.default, "", lambda a: aten._fused_rms_norm(a, [6], KW, 1e-3)[0],
           lambda a, x: a / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * KW, S),
    frozen(aten.var.correction, "", lambda a: a.var((1, -1)),
           lambda a, x: (x - x.mean((1, 3), True)).mul(a).sum((1, 3)) / 19, I),
    Case(aten.std.correction, "", of(lambda a: a.std(2, correction=0, keepdim=True)), (I,), "jacobian"),
    Case(aten.linalg_vector_norm.default, "", of(lambda a: torch.linalg.norm(a, dim=-1)), (S,), "jacobian"),
    Case(aten.linalg_vector_norm.default, "of order 3, kept", of(lambda a: a.norm(3, (1, 2), True)), (S,), "jacobian"),
    frozen(aten.linalg_vector_norm.default, "as a divisor", lambda a: F.normalize(a, dim=-1) + a.norm(dim=-1, keepdim=True),
           lambda a, x: a / x.norm(dim=-1, keepdim=True) + (a * x).sum(-1, True) / x.norm(dim=-1, keepdim=True), S),
    frozen(aten._softmax.default, "", lambda a: a.softmax(1), soft, S),
    frozen(aten._safe_softmax.default, "", lambda a: aten._safe_softmax(a, 1), soft, S),
    frozen(aten._log_softmax.default, "", lambda a: a.log_softmax(1),
           lambda a, x: a - a.gather(1, x.argmax(1, True)) + x.amax(1, True) - x.logsumexp(1, True), S),
    frozen(aten.logsumexp.default, "", lambda a: a.logsumexp(-1),
           lambda a, x: a.gather(-1, x.argmax(-1, True)).squeeze(-1) + x.logsumexp(-1) - x.amax(-1), S),

    # elementwise
    Case(aten.relu.default, "", of(F.relu), (I,)),
    Case(aten.prelu.default, "per channel", lambda: nn.PReLU(4, 0.2), (I,)),
    Case(aten.prelu.default, "shared", lambda: nn.PReLU(1, -0.2), (V,)),
    Case(aten._prelu_kernel.default, "", of(lambda a: aten._prelu_kernel(a, 0.1 * K1)), (I,), "jacobian"),
    Case(aten.log_sigmoid_forward.default, "", of(lambda a: aten.log_sigmoid_forward(a)[0]), (V,), "quotient"),
    Case(aten.relu6.default, "", of(lambda a: F.relu6(4 * a)), (I,)),
    Case(aten.hardtanh.default, "", of(lambda a: F.hardtanh(a, -0.5, 0.8)), (I,)),
    Case(aten.hardtanh.default, "0 outside", of(lambda a: F.hardtanh(a, 0.25, 0.8)), (I,)),
    Case(aten.clamp.default, "", of(lambda a: a.clamp(-0.6, 0.3)), (I,)),
    Case(aten.clamp.default, "0 above", of(lambda a: a.clamp(-1.2, -0.3)), (I,)),
    Case(aten.clamp.default, "half open", of(lambda a: torch.clamp(a, max=0.7)), (I,)),
    Case(aten.clamp_min.default, "", of(lambda a: aten.clamp_min(a, 0.2)), (V,), "quotient"),
    Case(aten.clamp_max.default, "", of(lambda a: aten.clamp_max(a, -0.2)), (V,), "quotient"),
    Case(aten.leaky_relu.default, "", of(lambda a: F.leaky_relu(a, 0.2)), (I,)),
    Case(aten.elu.default, "", of(lambda a: F.elu(a, 0.7)), (I,)),
    Case(aten.celu.default, "", of(lambda a: F.celu(a, 1.6)), (I,)),
    Case(aten.selu.default, "", of(F.selu), (I,)),
    Case(aten.gelu.default, "", of(F.gelu), (I,)),
    Case(aten.gelu.default, "tanh", of(lambda a: F.gelu(a, approximate="tanh")), (I,)),
    Case(aten.silu.default, "", of(F.silu), (I,)),
    Case(aten.mish.default, "", of(F.mish), (I,)),
    Case(aten.hardswish.default, "", of(lambda a: F.hardswish(3 * a)), (I,)),
    Case(aten.sigmoid.default, "", of(torch.sigmoid), (I,)),
    Case(aten.hardsigmoid.default, "", of(lambda a: F.hardsigmoid(3 * a)), (I,)),
    Case(aten.tanh.default, "", of(torch.tanh), (I,)),
    Case(aten.softplus.default, "", of(F.softplus), (I,)),
    Case(aten.softplus.default, "beta, threshold", of(lambda a: F.softplus(a, 2.5, 3.0)), (I,)),
    Case(aten.softplus.default, "beta below 0", of(lambda a: F.softplus(a, -1.5)), (I,)),
    Case(aten.softshrink.default, "", of(lambda a: F.softshrink(a, 0.3)), (I,)),
    Case(aten.hardshrink.default, "", of(lambda a: F.hardshrink(a, 0.4)), (I,)),
    Case(aten.threshold.default, "", of(lambda a: F.threshold(a, 0.1, 0.5)), (I,)),
    Case(aten.threshold.default, "below 0", of(lambda a: F.threshold(a, -0.4, -2.0)), (I,)),
    Case(aten.exp.default, "", of(torch.exp), (V,)),
    Case(aten.expm1.default, "", of(torch.expm1), (V,)),
    Case(aten.log1p.default, "", of(torch.log1p), (V,), positive=True),
    Case(aten.sin.default, "", of(torch.sin), (V,)),
    Case(aten.cos.default, "", of(torch.cos), (V,)),
    Case(aten.tan.default, "", of(torch.tan), (V,), "quotient"),
    Case(aten.atan.default, "", of(torch.atan), (V,)),
    Case(aten.erf.default, "", of(torch.erf), (V,)),
    Case(aten.abs.default, "", of(torch.abs), (I,)),
    Case(aten.neg.default, "", of(torch.neg), (I,)),
    Case(aten.square.default, "", of(torch.square), (I,)),
    Case(aten.pow.Tensor_Scalar, "cube", of(lambda a: a**3), (V,)),
    Case(aten.pow.Tensor_Scalar, "first", of(lambda a: a**1), (V,)),
    Case(aten.pow.Tensor_Scalar, "zeroth", of(lambda a: a**0), (V,)),
    Case(aten.pow.Tensor_Scalar, "fraction", of(lambda a: torch.pow(a, 0.7)), (V,), "quotient", positive=True),
    Case(aten.pow.Tensor_Scalar, "negative", of(lambda a: a**-2), (V,), "quotient", positive=True),
    Case(aten.sqrt.default, "", of(torch.sqrt), (V,), "quotient", positive=True),
    Case(aten.rsqrt.default, "", of(torch.rsqrt), (V,), "quotient", positive=True),
    Case(aten.reciprocal.default, "", of(torch.reciprocal), (V,), "quotient", positive=True),
    Case(aten.log.default, "", of(torch.log), (V,), "quotient", positive=True),
    Case(aten.erfc.default, "", of(torch.erfc), (V,), "quotient"),
    Case(aten.exp2.default, "", of(torch.exp2), (V,), "quotient"),
    Case(aten.sinh.default, "", of(torch.sinh), (V,), "quotient"),
    Case(aten.cosh.default, "", of(torch.cosh), (V,), "quotient"),
    Case(aten.asinh.default, "", of(torch.asinh), (V,), "quotient"),
    Case(aten.atanh.default, "", of(lambda a: (a / 4).atanh()), (V,), "quotient"),
    Case(aten.asin.default, "", of(lambda a: (a / 4).asin()), (V,), "quotient"),
    Case(aten.acos.default, "", of(lambda a: (a / 4).acos()), (V,), "quotient"),
    Case(aten.rad2deg.default, "", of(torch.rad2deg), (V,), "jacobian"),
    Case(aten.deg2rad.default, "", of(torch.deg2rad), (V,), "jacobian"),
    Case(aten.log2.default, "", of(torch.log2), (V,), "quotient", positive=True),
    Case(aten.log10.default, "", of(torch.log10), (V,), "quotient", positive=True),
    Case(aten.logit.default, "", of(lambda a: (a / 8).logit()), (V,), "quotient", positive=True),
    Case(aten.acosh.default, "", of(lambda a: (a * 20).acosh()), (V,), "quotient", positive=True),
)
# fmt: on
