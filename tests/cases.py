"""One line for each operator in the rule table, and more where its parameters are odd; the tests of the rules run them all.

A case is a function or a module of one or two carried tensors, batch first. Where an operator never survives into a
canonical graph (a copy, an alias), the case names the call itself with `direct`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

from reference import ACTIVATIONS

aten = torch.ops.aten
Shape = tuple[int, ...]
Twin = Literal["reference", "jacobian", "piecewise", "quotient", "frozen"]


class One(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a)


class Two(nn.Module):
    """A function of two tensors, both carried."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op: the row of the rule table it is for.
        note: what is odd about it.
        build: makes the module; parameters are drawn from the seed the caller set.
        shapes: of the operands, batch first. The batch is 3: capture looks at two samples, and what it bakes in must show.
        twin: where the expected map comes from. "reference": `reference.py` knows the function. "jacobian": the function is
            J x + f(0) at its input, so the map is x * J^T seed. "piecewise": it is J x + c, with another c at another input.
            "quotient": elementwise, the map is f(x) - f(0). "frozen": the function with its coefficients held, see `frozen`.
        positive: the function is defined for positive operands only.
        frozen: `g(*x, *at)`, affine in x with coefficients taken at `at`, and equal to the function at x = at.
        arguments: None where the operator stands in the canonical graph; else the call's own, and the rule is asked directly.
    """

    op: OpOverload
    note: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    twin: Twin = "reference"
    positive: bool = False
    arguments: tuple[object, ...] | None = None
    frozen: Callable[..., Tensor] | None = None

    @property
    def id(self) -> str:
        return f"{str(self.op).removeprefix('aten.').removesuffix('.default')} {self.note}".strip()

    def module(self) -> nn.Module:
        """The model in float64 and evaluation mode; batch statistics and affine parameters are no identities."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.build().double().eval()
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_()
                    part.running_var.uniform_(0.5, 2.0)
                    if part.affine:
                        nn.init.normal_(part.weight)
                        nn.init.normal_(part.bias)
        return module if len(self.shapes) > 1 else nn.Sequential(module)

    def inputs(self, batch: int | None = None, seed: int = 1) -> tuple[Tensor, ...]:
        """Operands, all with a batch of `batch` samples in place of the case's own."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [shape if batch is None else (batch, *shape[1:]) for shape in self.shapes]
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        return tuple(x.abs() + 0.1 if self.positive else x for x in drawn)


def frozen(
    op: OpOverload,
    note: str,
    function: Callable[..., Tensor],
    held: Callable[..., Tensor],
    *shapes: Shape,
    positive: bool = False,
) -> Case:
    """A function whose account holds some of its values as coefficients: `held` says which."""
    return Case(op, note, of(function) if len(shapes) == 1 else both(function), shapes, "frozen", positive, frozen=held)


def of(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: One(function)


def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Two(function)


def direct(op: OpOverload, *arguments: object, shape: Shape, twin: Twin = "jacobian") -> Case:
    """A call that the canonical graph spells in another way."""
    return Case(op, "", of(lambda a: op(a, *arguments)), (shape,), twin, arguments=arguments)


def constant(*shape: int) -> Tensor:
    """A fixed tensor, no entry of which is near 0."""
    return 0.3 + torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape) / 4


V, S, I, D = (3, 4), (3, 4, 6), (3, 4, 7, 5), (3, 2, 4, 5, 3)  # noqa: E741 - a vector, a sequence, an image, a volume


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


K4, K1 = constant(4), constant(4, 1, 1)
KW, KB = constant(6), constant(6) - 1.0


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


GRID = torch.linspace(-1.1, 0.9, 24, dtype=torch.float64).reshape(1, 3, 4, 2)
GRID3 = torch.linspace(-0.9, 1.1, 36, dtype=torch.float64).reshape(1, 2, 3, 2, 3)

# fmt: off
CASES: tuple[Case, ...] = (
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

    # layers
    Case(aten.linear.default, "", lambda: nn.Linear(4, 5), (V,)),
    Case(aten.linear.default, "of tokens, no bias", lambda: nn.Linear(6, 3, bias=False), (S,)),
    Case(aten.convolution.default, "1d", lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2), ((3, 4, 9),)),
    Case(aten.convolution.default, "1d same, even kernel", lambda: nn.Conv1d(4, 3, 4, padding="same", dilation=3), ((3, 4, 9),)),
    Case(aten.convolution.default, "1d valid", lambda: nn.Conv1d(4, 3, 2, padding="valid", bias=False), ((3, 4, 9),)),
    Case(aten.convolution.default, "2d", lambda: nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2), ((3, 4, 8, 9),)),
    Case(aten.convolution.default, "2d, rest", lambda: nn.Conv2d(4, 3, 3, 3), ((3, 4, 8, 10),)),
    Case(aten.convolution.default, "2d same", lambda: nn.Conv2d(4, 3, (2, 5), padding="same"), (I,)),
    Case(aten.convolution.default, "2d depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (I,)),
    Case(aten.convolution.default, "2d 1x1, strided", lambda: nn.Conv2d(4, 3, 1, 2), (I,)),
    Case(aten.convolution.default, "2d, padding wider than the kernel", lambda: nn.Conv2d(4, 3, 2, padding=3), (I,)),
    Case(aten.convolution.default, "2d reflected", lambda: nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect"), (I,)),
    Case(aten.convolution.default, "3d", lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), (0, 1, 1), (2, 1, 1), 2), (D,)),
    Case(aten.convolution.default, "3d same", lambda: nn.Conv3d(2, 3, (2, 3, 2), padding="same"), (D,)),
    Case(aten.convolution.default, "transposed 1d", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (S,)),
    Case(aten.convolution.default, "transposed 1d, output padding as large as the stride",
         lambda: nn.ConvTranspose1d(4, 2, 3, 2, output_padding=2, dilation=3), (S,)),
    Case(aten.convolution.default, "transposed 2d",
         lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, dilation=(1, 2)), (I,)),
    Case(aten.convolution.default, "transposed 2d, output padding larger than the stride",
         lambda: nn.ConvTranspose2d(4, 3, 2, 1, output_padding=3, dilation=4, bias=False), (I,)),
    Case(aten.convolution.default, "transposed 3d", lambda: nn.ConvTranspose3d(2, 2, 2, (2, 1, 2), (0, 1, 0), (1, 0, 0)), (D,)),
    Case(aten._native_batch_norm_legit_no_training.default, "", lambda: nn.BatchNorm2d(4), (I,)),
    Case(aten._native_batch_norm_legit_no_training.default, "of features", lambda: nn.BatchNorm1d(4, eps=0.1), (V,)),
    Case(aten._native_batch_norm_legit_no_training.default, "without affine", lambda: nn.BatchNorm3d(2, affine=False), (D,)),

    # pooling
    Case(aten.max_pool2d_with_indices.default, "", of(lambda a: F.max_pool2d(a, (3, 2), (2, 1), (1, 0), (1, 2))), (I,)),
    Case(aten.max_pool2d_with_indices.default, "ceil", of(lambda a: F.max_pool2d(a, 3, 2, 1, ceil_mode=True)), ((3, 3, 6, 8),)),
    Case(aten.max_pool2d_with_indices.default, "with indices",
         of(lambda a: F.max_pool2d(a, 2, return_indices=True)[0]), (I,), "jacobian"),
    Case(aten.max_pool2d_with_indices.default, "1d", of(lambda a: F.max_pool1d(a, 3, 2, 1, 1, True)), (S,)),
    Case(aten.max_pool2d_with_indices.default, "1d, stride not given", of(lambda a: F.max_pool1d(a, 2)), (S,)),
    Case(aten.max_pool3d_with_indices.default, "", of(lambda a: F.max_pool3d(a, (2, 3, 2), (2, 1, 1), (1, 1, 0))), (D,)),
    Case(aten.max_pool3d_with_indices.default, "ceil, dilated", of(lambda a: F.max_pool3d(a, 2, 2, 1, (1, 2, 1), True)), (D,)),
    Case(aten.adaptive_max_pool2d.default, "", of(lambda a: F.adaptive_max_pool2d(a, (3, 2))), (I,)),
    Case(aten.adaptive_max_pool3d.default, "", of(lambda a: F.adaptive_max_pool3d(a, (3, 2, 2))), (D,)),
    Case(aten.avg_pool1d.default, "", of(lambda a: F.avg_pool1d(a, 3, 2, 1)), (S,)),
    Case(aten.avg_pool1d.default, "ceil, padding not counted", of(lambda a: F.avg_pool1d(a, 3, 2, 1, True, False)), (S,)),
    Case(aten.avg_pool2d.default, "", of(lambda a: F.avg_pool2d(a, (3, 2), (2, 1), (1, 0))), (I,)),
    Case(aten.avg_pool2d.default, "ceil", of(lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True)), ((3, 3, 6, 8),)),
    Case(aten.avg_pool2d.default, "padding not counted", of(lambda a: F.avg_pool2d(a, 3, 2, 1, count_include_pad=False)), (I,)),
    Case(aten.avg_pool2d.default, "divisor", of(lambda a: F.avg_pool2d(a, 2, divisor_override=3)), (I,)),
    Case(aten.avg_pool3d.default, "", of(lambda a: F.avg_pool3d(a, (2, 3, 2), (2, 1, 1), (1, 1, 0), True)), (D,)),
    Case(aten.adaptive_avg_pool1d.default, "uneven", of(lambda a: F.adaptive_avg_pool1d(a, 4)), (S,)),
    Case(aten.adaptive_avg_pool2d.default, "global", of(lambda a: F.adaptive_avg_pool2d(a, 1)), (I,)),
    Case(aten.adaptive_avg_pool2d.default, "uneven", of(lambda a: F.adaptive_avg_pool2d(a, (3, 2))), (I,)),
    Case(aten.adaptive_avg_pool2d.default, "enlarging", of(lambda a: F.adaptive_avg_pool2d(a, (None, 8))), (I,)),
    Case(aten._adaptive_avg_pool2d.default, "", of(lambda a: aten._adaptive_avg_pool2d(a, [3, 2])), (I,), "jacobian"),
    Case(aten.adaptive_avg_pool3d.default, "", of(lambda a: F.adaptive_avg_pool3d(a, (2, 2, 3))), (D,)),
    Case(aten._adaptive_avg_pool3d.default, "", of(lambda a: aten._adaptive_avg_pool3d(a, [2, 2, 1])), (D,), "jacobian"),

    # copies
    Case(aten.clone.default, "", of(lambda a: a.clone()), (V,)),
    Case(aten.detach.default, "", of(lambda a: a.detach()), (V,), arguments=()),
    direct(aten.lift_fresh_copy.default, shape=V),
    direct(aten.alias.default, shape=V),
    direct(aten.contiguous.default, shape=V),
    direct(aten.dropout.default, 0.5, False, shape=V),

    # views
    Case(aten.expand.default, "", of(lambda a: a.expand(-1, 4, -1)), ((3, 1, 6),)),
    Case(aten.expand.default, "new dimension", of(lambda a: a.unsqueeze(2).expand(-1, -1, 5)), (V,)),
    Case(aten.slice.Tensor, "", of(lambda a: a[:, 1:3]), (I,)),
    Case(aten.slice.Tensor, "steps, from the end", of(lambda a: a[..., -5:-1:3]), (I,)),
    Case(aten.slice.Tensor, "pieces", of(lambda a: torch.cat([a.split([1, 3], 1)[1], a.chunk(3, 1)[0]], 1)), (I,)),
    Case(aten.view.default, "", of(lambda a: a.view(a.shape[0], 2, -1)), (I,)),
    Case(aten.view.default, "samples spread over two dimensions", of(lambda a: a.view(-1, 2, 2).view(-1, 4) * 2), (V,)),
    Case(aten._unsafe_view.default, "", of(lambda a: aten._unsafe_view(a, [a.shape[0], 24])), (S,), "jacobian"),
    Case(aten._unsafe_view.default, "reshape of a transposed", of(lambda a: a.transpose(1, 2).reshape(a.shape[0], -1)), (I,)),
    direct(aten.reshape.default, [-1, 5, 28], shape=I),
    direct(aten.flatten.using_ints, 1, 2, shape=I),
    direct(aten.unflatten.int, 1, [2, -1], shape=I),
    Case(aten.squeeze.default, "", of(lambda a: a.squeeze()), ((3, 1, 4, 1),)),
    Case(aten.squeeze.dim, "", of(lambda a: a.squeeze(-1)), ((3, 1, 4, 1),)),
    Case(aten.squeeze.dims, "", of(lambda a: a.squeeze((1, 2, 3))), ((3, 1, 4, 1),)),
    Case(aten.unsqueeze.default, "", of(lambda a: a.unsqueeze(1)), (I,)),
    Case(aten.unsqueeze.default, "last", of(lambda a: a.unsqueeze(-1)), (V,)),
    Case(aten.permute.default, "", of(lambda a: a.permute(0, -1, 1, 2)), (I,)),
    Case(aten.permute.default, "batch second", of(lambda a: a.permute(1, 0, 2).tanh().permute(1, 2, 0)), (S,)),
    Case(aten.transpose.int, "", of(lambda a: a.transpose(1, -1)), (I,)),
    Case(aten.t.default, "", of(lambda a: a.t().tanh().t()), (V,)),
    Case(aten.select.int, "", of(lambda a: a[:, 2]), (I,)),
    Case(aten.select.int, "last", of(lambda a: a.unbind(-1)[-2]), (I,)),
    Case(aten.flip.default, "", of(lambda a: a.flip((1, -1))), (I,)),
    Case(aten.roll.default, "", of(lambda a: a.roll((1, -2), (2, 3))), (I,)),
    Case(aten.repeat.default, "", of(lambda a: a.repeat(1, 2, 1, 3)), (I,)),
    Case(aten.repeat.default, "new dimension", of(lambda a: a.unsqueeze(1).repeat(1, 3, 2)), (V,)),
    Case(aten.tril.default, "", of(lambda a: a.tril(1)), (S,), "jacobian"),
    Case(aten.triu.default, "", of(lambda a: a.triu()), (I,), "jacobian"),
    Case(aten.diag_embed.default, "", of(lambda a: a.diag_embed(1, 1, 3)), (S,), "jacobian"),
    Case(aten.rot90.default, "", of(lambda a: a.rot90(1, (2, -1))), (I,), "jacobian"),
    Case(aten.as_strided.default, "a reshape", of(lambda a: (a * 2).as_strided((a.shape[0], 24), (24, 1))), (S,), "jacobian"),
    Case(aten.constant_pad_nd.default, "", of(lambda a: F.pad(a, (1, 2, 0, 3))), (I,)),
    Case(aten.constant_pad_nd.default, "a value, cropping", of(lambda a: F.pad(a, (1, -2, -1, 3, 1, 0), value=0.7)), (I,)),
    Case(aten.channel_shuffle.default, "", of(lambda a: F.channel_shuffle(a, 3)), ((3, 6, 3, 2),), "jacobian"),
    Case(aten.channel_shuffle.default, "as written in ShuffleNet",
         of(lambda a: a.view(a.shape[0], 2, 3, 3, 2).transpose(1, 2).contiguous().view(a.shape[0], 6, 3, 2)), ((3, 6, 3, 2),)),
    Case(aten.reflection_pad1d.default, "", of(lambda a: F.pad(a, (2, 1), "reflect")), (S,)),
    Case(aten.reflection_pad2d.default, "", of(lambda a: F.pad(a, (2, 1, 0, 3), "reflect")), (I,)),
    Case(aten.reflection_pad3d.default, "", of(lambda a: F.pad(a, (2, 1, 0, 3, 1, 1), "reflect")), (D,)),
    Case(aten.replication_pad1d.default, "", of(lambda a: F.pad(a, (2, 1), "replicate")), (S,)),
    Case(aten.replication_pad2d.default, "", of(lambda a: F.pad(a, (2, 1, 0, 3), "replicate")), (I,)),
    Case(aten.replication_pad3d.default, "", of(lambda a: F.pad(a, (2, 1, 0, 3, 1, 1), "replicate")), (D,)),

    # resizing
    Case(aten.upsample_nearest1d.vec, "", of(lambda a: F.interpolate(a, size=9)), (S,)),
    Case(aten.upsample_nearest2d.vec, "", of(lambda a: F.interpolate(a, scale_factor=(2, 1.5))), (I,)),
    Case(aten.upsample_nearest3d.vec, "", of(lambda a: F.interpolate(a, scale_factor=2)), (D,)),
    Case(aten._upsample_nearest_exact1d.vec, "", of(lambda a: F.interpolate(a, size=9, mode="nearest-exact")), (S,)),
    Case(aten._upsample_nearest_exact2d.vec, "", of(lambda a: F.interpolate(a, size=(9, 4), mode="nearest-exact")), (I,)),
    Case(aten._upsample_nearest_exact3d.vec, "", of(lambda a: F.interpolate(a, size=(3, 6, 7), mode="nearest-exact")), (D,)),
    Case(aten.upsample_linear1d.vec, "", of(lambda a: F.interpolate(a, size=9, mode="linear")), (S,)),
    Case(aten.upsample_bilinear2d.vec, "", of(lambda a: F.interpolate(a, size=(3, 9), mode="bilinear")), (I,)),
    Case(aten.upsample_bilinear2d.vec, "corners",
         of(lambda a: F.interpolate(a, scale_factor=2, mode="bilinear", align_corners=True)), (I,)),
    Case(aten.upsample_trilinear3d.vec, "", of(lambda a: F.interpolate(a, size=(3, 6, 7), mode="trilinear")), (D,)),
    Case(aten.upsample_bicubic2d.vec, "", of(lambda a: F.interpolate(a, size=(9, 4), mode="bicubic")), (I,)),
    Case(aten._upsample_bilinear2d_aa.vec, "",
         of(lambda a: F.interpolate(a, size=(3, 9), mode="bilinear", antialias=True)), (I,)),
    Case(aten._upsample_bicubic2d_aa.vec, "smaller",
         of(lambda a: F.interpolate(a, size=(4, 3), mode="bicubic", antialias=True)), (I,), "jacobian"),
    Case(aten._upsample_bicubic2d_aa.vec, "by a factor, corners",
         of(lambda a: F.interpolate(a, scale_factor=(0.6, 1.7), mode="bicubic", antialias=True, align_corners=True)), (I,),
         "jacobian"),
    Case(aten._upsample_bicubic2d_aa.vec, "",
         of(lambda a: aten._upsample_bicubic2d_aa.vec(a, None, False, [0.6, 1.7])), (I,), "jacobian"),
    Case(aten.im2col.default, "", of(lambda a: F.unfold(a, (3, 2), (1, 2), (1, 0), 2)), (I,), "jacobian"),
    Case(aten.col2im.default, "", of(lambda a: F.fold(a, (4, 5), 2, 1, 0, (2, 1))), ((3, 12, 8),), "jacobian"),
    Case(aten.grid_sampler_2d.default, "",
         of(lambda a: F.grid_sample(a, GRID.repeat(a.shape[0], 1, 1, 1), align_corners=False)), (I,),
         "jacobian"),
    Case(aten.grid_sampler_2d.default, "by a carried grid",
         of(lambda a: F.grid_sample(a, a[:, :2, :3].movedim(1, -1).detach(), "bilinear", "border", True)), (I,),
         "piecewise"),
    Case(aten.grid_sampler_3d.default, "",
         of(lambda a: F.grid_sample(a, GRID3.repeat(a.shape[0], 1, 1, 1, 1), "nearest", "reflection", False)), (D,), "jacobian"),
    Case(aten.pixel_shuffle.default, "", of(lambda a: F.pixel_shuffle(a, 2)), ((3, 8, 3, 2),)),
    Case(aten.pixel_unshuffle.default, "", of(lambda a: F.pixel_unshuffle(a, 2)), ((3, 2, 4, 6),), "jacobian"),
)
# fmt: on


@dataclass(frozen=True)
class Curve:
    """An elementwise operator and what it ought to compute.

    Attributes:
        op: the row of the rule table.
        exact: the function in arithmetic of many digits.
        arguments, named: of the operator, after the operand.
        low, high: the function is defined in between, both excluded.
        whole: it has no value at 0 to subtract, so that all of the result is carried.
    """

    op: OpOverload
    exact: Callable[[Any], Any]
    arguments: tuple[Any, ...] = ()
    low: float = -float("inf")
    high: float = float("inf")
    whole: bool = False
    named: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        name = str(self.op).removeprefix("aten.").removesuffix(".default")
        values = [x if not isinstance(x, Tensor) else x.item() for x in (*self.arguments, *self.named.values())]
        return " ".join(map(str, (name, *values)))


def known(name: str, **options: Any) -> Callable[[Any], Any]:
    """A function of `reference.py`."""
    return partial(ACTIVATIONS[name], **options)


SLOPE = torch.tensor([0.25])

# fmt: off
CURVES: tuple[Curve, ...] = (
    Curve(aten.relu.default, known("relu")),
    Curve(aten.prelu.default, known("leaky_relu", negative_slope=0.25), (SLOPE,)),
    Curve(aten._prelu_kernel.default, known("leaky_relu", negative_slope=0.25), (SLOPE,)),
    Curve(aten.log_sigmoid_forward.default, known("logsigmoid")),
    Curve(aten.relu6.default, known("relu6")),
    Curve(aten.hardtanh.default, known("hardtanh")),
    Curve(aten.hardtanh.default, known("hardtanh", min_val=0.25, max_val=2.0), (0.25, 2.0)),
    Curve(aten.clamp.default, known("clamp", min=-0.5, max=0.75), (-0.5, 0.75)),
    Curve(aten.clamp.default, known("clamp", min=0.0), (0.0,)),
    Curve(aten.clamp.default, known("clamp", max=0.0), (None, 0.0)),
    Curve(aten.clamp.default, known("clamp", min=-4.0, max=-0.5), (-4.0, -0.5)),
    Curve(aten.clamp_min.default, known("clamp", min=0.25), (0.25,)),
    Curve(aten.clamp_min.default, known("clamp", min=-0.25), (-0.25,)),
    Curve(aten.clamp_max.default, known("clamp", max=-0.25), (-0.25,)),
    Curve(aten.clamp_max.default, known("clamp", max=0.25), (0.25,)),
    Curve(aten.leaky_relu.default, known("leaky_relu", negative_slope=0.125), (0.125,)),
    Curve(aten.elu.default, known("elu")),
    Curve(aten.elu.default, lambda z: 2 * z if z > 0 else mpmath.expm1(4 * z), (0.5, 2.0, 4.0)),
    Curve(aten.celu.default, known("celu", alpha=0.5), (0.5,)),
    Curve(aten.selu.default, known("selu")),
    Curve(aten.gelu.default, known("gelu")),
    Curve(aten.gelu.default, known("gelu", approximate="tanh"), named={"approximate": "tanh"}),
    Curve(aten.silu.default, known("silu")),
    Curve(aten.mish.default, known("mish")),
    Curve(aten.hardswish.default, known("hardswish")),
    Curve(aten.sigmoid.default, known("sigmoid")),
    Curve(aten.hardsigmoid.default, known("hardsigmoid")),
    Curve(aten.tanh.default, known("tanh")),
    Curve(aten.softplus.default, known("softplus")),
    Curve(aten.softplus.default, known("softplus", beta=0.5, threshold=2.0), (0.5, 2.0)),
    Curve(aten.softplus.default, known("softplus", beta=2.0, threshold=100.0), (2.0, 100.0)),
    Curve(aten.softplus.default, known("softplus", beta=-1.0), (-1.0,)),
    Curve(aten.softplus.default, known("softplus", beta=2.0, threshold=-1.0), (2.0, -1.0)),
    Curve(aten.softshrink.default, known("softshrink")),
    Curve(aten.hardshrink.default, known("hardshrink")),
    Curve(aten.threshold.default, known("threshold", threshold=0.5, value=2.0), (0.5, 2.0)),
    Curve(aten.threshold.default, known("threshold", threshold=-0.5, value=2.0), (-0.5, 2.0)),
    Curve(aten.threshold.default, known("threshold", threshold=0.0, value=0.0), (0.0, 0.0)),
    Curve(aten.exp.default, known("exp")),
    Curve(aten.expm1.default, known("expm1")),
    Curve(aten.log1p.default, known("log1p"), low=-1.0),
    Curve(aten.sin.default, known("sin")),
    Curve(aten.cos.default, known("cos")),
    Curve(aten.tan.default, mpmath.tan),
    Curve(aten.atan.default, known("atan")),
    Curve(aten.erf.default, known("erf")),
    Curve(aten.abs.default, known("abs")),
    Curve(aten.neg.default, lambda z: -z),
    Curve(aten.square.default, known("square")),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**3, (3,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**2, (2.0,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z, (1,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: mpmath.mpf(1), (0,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**1.5, (1.5,), low=0.0),
    Curve(aten.pow.Tensor_Scalar, lambda z: 1 / z, (-1,), low=0.0, whole=True),
    Curve(aten.sqrt.default, mpmath.sqrt, low=0.0, whole=True),
    Curve(aten.rsqrt.default, lambda z: 1 / mpmath.sqrt(z), low=0.0, whole=True),
    Curve(aten.reciprocal.default, lambda z: 1 / z, low=0.0, whole=True),
    Curve(aten.reciprocal.default, lambda z: 1 / z, high=0.0, whole=True),
    Curve(aten.log.default, mpmath.log, low=0.0, whole=True),
    Curve(aten.erfc.default, mpmath.erfc),
    Curve(aten.exp2.default, lambda z: mpmath.mpf(2) ** z),
    Curve(aten.sinh.default, mpmath.sinh),
    Curve(aten.cosh.default, mpmath.cosh),
    Curve(aten.asinh.default, mpmath.asinh),
    Curve(aten.atanh.default, mpmath.atanh, low=-1.0, high=1.0),
    Curve(aten.asin.default, mpmath.asin, low=-1.0, high=1.0),
    Curve(aten.acos.default, mpmath.acos, low=-1.0, high=1.0),
    Curve(aten.rad2deg.default, mpmath.degrees),
    Curve(aten.deg2rad.default, mpmath.radians),
    Curve(aten.log2.default, lambda z: mpmath.log(z, 2), low=0.0, whole=True),
    Curve(aten.log10.default, mpmath.log10, low=0.0, whole=True),
    Curve(aten.logit.default, lambda z: mpmath.log(z / (1 - z)), low=0.0, high=1.0, whole=True),
    Curve(aten.acosh.default, mpmath.acosh, low=1.0, whole=True),
    Curve(aten.sinc.default, lambda z: mpmath.sincpi(z)),
    Curve(aten.erfinv.default, mpmath.erfinv, low=-1.0, high=1.0),
    Curve(aten.special_erfcx.default, lambda z: mpmath.exp(z * z) * mpmath.erfc(z), high=20.0),
    Curve(aten.special_log_ndtr.default, lambda z: mpmath.log(mpmath.erfc(-z / mpmath.sqrt(2)) / 2), low=-20.0),
    Curve(aten.i0.default, lambda z: mpmath.besseli(0, z)),
    Curve(aten.special_i0e.default, lambda z: mpmath.exp(-abs(z)) * mpmath.besseli(0, z)),
    Curve(aten.special_i1.default, lambda z: mpmath.besseli(1, z)),
    Curve(aten.special_i1e.default, lambda z: mpmath.exp(-abs(z)) * mpmath.besseli(1, z)),
    Curve(aten.special_entr.default, lambda z: -z * mpmath.log(z), low=0.0, whole=True),
    Curve(aten.lgamma.default, mpmath.loggamma, low=0.0, whole=True),
    Curve(aten.digamma.default, mpmath.digamma, low=0.0, whole=True),
    Curve(aten.mvlgamma.default, lambda z: mpmath.log(mpmath.pi) / 2 + mpmath.loggamma(z) + mpmath.loggamma(z - 0.5), (2,),
          low=0.6, whole=True),
    Curve(aten.special_ndtri.default, lambda z: mpmath.sqrt(2) * mpmath.erfinv(2 * z - 1), low=0.0, high=1.0, whole=True),
    Curve(aten.round.default, mpmath.nint),
    Curve(aten.round.decimals, mpmath.nint, named={"decimals": 0}),
    Curve(aten.trunc.default, lambda z: mpmath.sign(z) * mpmath.floor(abs(z))),
    Curve(aten.frac.default, lambda z: z - mpmath.sign(z) * mpmath.floor(abs(z))),
    Curve(aten.fmod.Scalar, lambda z: z - mpmath.sign(z) * mpmath.floor(abs(z) / 0.75) * 0.75, (0.75,)),
)
# fmt: on
