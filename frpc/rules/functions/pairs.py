"""Functions of two numbers: logarithms of sums, products with logarithms, remainders.

With one operand carried they are functions of one number, and M is the secant through 0 (method §2). With both carried, a
function of degree k in both, ``f(ta, tb) = t^k f(a, b)``, has its average derivative on the way from (0, 0):
``f = (a f_a + b f_b) / k``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frpc.core.traits import always
from frpc.maps import LinearMap, scaled
from frpc.rules.functions.arithmetic import Term
from frpc.rules.functions.quotients import log1p_over, over
from frpc.rules.table import Affine, Call, Operand, rule

aten = torch.ops.aten
SECANT = "method §2: secant through 0"
EULER = "method §2: secant through 0, of two numbers"


def _tensors(call: Call, a: Term, b: Term) -> tuple[Tensor, Tensor]:
    """Both operands as tensors of the result's type."""
    made = [torch.as_tensor(x, dtype=call.value.dtype, device=call.value.device) for x in (a, b)]
    return made[0], made[1]


def _shared(call: Call, parts: dict[Operand, Tensor | float], constant: Tensor | float | None = None) -> Affine:
    """Builds the affine form of the operands that carry."""
    terms: dict[Operand, LinearMap] = {}
    for name, part in parts.items():
        if call.carries(name):
            terms[name] = scaled(part, call.args[str(name)].shape, call.value.shape)
    return Affine(terms, constant)


def _logaddexp_over(a: Tensor, b: Tensor) -> Tensor:
    """``(log(e^a + e^b) - log(1 + e^b)) / a``: near 0 ``log1p(sigmoid(-b) (e^a - 1)) / a``, else the larger ones apart."""
    near = a.abs() < 1.0
    small = torch.where(near, a, 0.5)
    middle = torch.sigmoid(-b) * torch.where(small == 0, 1.0, log1p_over(torch.sigmoid(-b) * torch.expm1(small)))
    middle = middle * torch.where(small == 0, 1.0, torch.expm1(small) / torch.where(small == 0, 1.0, small))
    ahead = torch.maximum(a, b) - torch.clamp(b, min=0.0)
    ahead = torch.where(torch.isneginf(a) & torch.isneginf(b), -math.inf, ahead)
    rest = torch.log1p(torch.exp(-(a - b).abs())) - torch.log1p(torch.exp(-b.abs()))
    return torch.where(near, middle, (ahead + rest) / torch.where(near, 1.0, a))


def _log_of_sum(call: Call, a: Term, b: Term, rate: float) -> Affine:
    """``log(e^(rate a) + e^(rate b)) / rate``."""
    a, b = _tensors(call, a, b)
    if call.carries("self") and call.carries("other"):
        first = (a >= b).to(call.value.dtype)
        top = torch.maximum(a, b)
        constant = torch.where(torch.isinf(top), 0.0, call.value - top)
        return _shared(call, {"self": first, "other": 1.0 - first}, constant)
    moved, fixed = (a, b) if call.carries("self") else (b, a)
    slope = _logaddexp_over(moved * rate, fixed * rate)
    at_zero = call.op(torch.zeros_like(fixed), fixed)
    return _shared(call, {"self": slope, "other": slope}, at_zero)


@rule(
    aten.logaddexp.default,
    carries=("self", "other"),
    formula="1 on the larger, c = log(1 + e^-|a - b|); of a constant b the secant, c = log(1 + e^b)",
    source="method §2: from the largest element",
    pointwise=True,
    in_file="constants",
)
def logaddexp(call: Call, a: Tensor, b: Tensor) -> Affine:
    return _log_of_sum(call, a, b, 1.0)


@rule(
    aten.logaddexp2.default,
    carries=("self", "other"),
    formula="1 on the larger, c = log2(1 + 2^-|a - b|); of a constant b the secant, c = log2(1 + 2^b)",
    source="method §2: from the largest element",
    pointwise=True,
    in_file="constants",
)
def logaddexp2(call: Call, a: Tensor, b: Tensor) -> Affine:
    return _log_of_sum(call, a, b, math.log(2.0))


def _times_log(call: Call, a: Tensor, b: Tensor, logarithm: Tensor, slope: Tensor) -> Affine:
    """``a f(b)``: f(b) on a, and a times f's secant on b; half of each where both carry."""
    share = 0.5 if call.carries("self") and call.carries("other") else 1.0
    return _shared(call, {"self": share * logarithm, "other": share * slope})


@rule(
    aten.xlogy.Tensor,
    aten.xlogy.Scalar_Self,
    aten.xlogy.Scalar_Other,
    carries=("self", "other"),
    formula="log(b) on a, z/b on b; both carried: half of each",
    source="method §2: products, half",
    pointwise=True,
    in_file="constants",
)
def xlogy(call: Call, a: Term, b: Term) -> Affine:
    a, b = _tensors(call, a, b)
    logarithm = torch.log(torch.where((a == 0) & (b <= 0), 1.0, b))  # PyTorch's 0 log 0 is 0
    return _times_log(call, a, b, logarithm, over(call.value, b.expand_as(call.value)))


@rule(
    aten.special_xlog1py.default,
    aten.special_xlog1py.self_scalar,
    aten.special_xlog1py.other_scalar,
    carries=("self", "other"),
    formula="log(1 + b) on a, a log(1 + b)/b on b; both carried: half of each",
    source="method §2: products, half",
    pointwise=True,
    in_file="constants",
)
def xlog1py(call: Call, a: Term, b: Term) -> Affine:
    a, b = _tensors(call, a, b)
    inside = torch.where((a == 0) & (b <= -1), 0.0, b)
    return _times_log(call, a, b, torch.log1p(inside), a * log1p_over(inside))


@rule(
    aten.copysign.Tensor,
    aten.copysign.Scalar,
    carries=("self", "other"),
    formula="sgn(a) sgn(b) on a, 0 on b; of a constant a: 0, c = z",
    source="method §2: slope 0 and a jump at 0",
    pointwise=True,
    in_file="constants",
)
def copysign(call: Call, a: Tensor, b: Term) -> Affine:
    if not call.carries("self"):
        return _shared(call, {"other": 0.0}, call.value)
    return _shared(call, {"self": torch.copysign(torch.ones_like(a), b) * a.sgn()})


@rule(
    aten.heaviside.default,
    carries=("self", "values"),
    formula="[a = 0] on b, c = [a > 0]; of a constant b: 0, c = z",
    source="method §2: slope 0 and a jump at 0",
    pointwise=True,
    in_file="constants",
)
def heaviside(call: Call, a: Tensor, values: Tensor) -> Affine:
    if not call.carries("values"):
        return _shared(call, {"self": 0.0}, call.value)
    return _shared(call, {"values": (a == 0).to(call.value.dtype)}, (a > 0).to(call.value.dtype))


@rule(
    aten.div.Tensor_mode,
    carries=("self", "other"),
    formula="0, c = floor(a / b)",
    source="method §2: slope 0 and a jump at 0",
    pointwise=True,
    in_file="constants",
)
def div_floor(call: Call, a: Tensor, b: Term, rounding_mode: str | None = None) -> Affine:
    return _shared(call, {"self": 0.0, "other": 0.0}, call.value)


def _steps(call: Call, a: Term, b: Term) -> Affine:
    """``a - k b`` with k whole: of degree 1 in both. A constant operand is part of c."""
    a, b = _tensors(call, a, b)
    each = over((call.value - a), b.expand_as(call.value))
    constant = None if call.carries("self") and call.carries("other") else call.value - a if call.carries("self") else a
    return _shared(call, {"self": 1.0, "other": each}, constant)


@rule(
    aten.remainder.Tensor,
    carries=("self", "other"),
    formula="1 on a, -floor(a / b) on b",
    source=EULER,
    pointwise=True,
    in_file="constants",
)
def remainder(call: Call, a: Term, b: Term) -> Affine:
    return _steps(call, a, b)


@rule(
    aten.fmod.Tensor,
    carries=("self", "other"),
    formula="1 on a, -trunc(a / b) on b; of a constant b: 1 inside (-b, b), else fmod(a, b) / a",
    source=EULER,
    pointwise=True,
    in_file="constants",
)
def fmod(call: Call, a: Term, b: Term) -> Affine:
    if call.carries("other"):
        return _steps(call, a, b)
    a, b = _tensors(call, a, b)
    return _shared(call, {"self": torch.where(a.abs() < b.abs(), 1.0, over(call.value, a.expand_as(call.value)))})


@rule(
    aten.igamma.default,
    carries="other",
    formula="P(s, x) / x on x",
    source=SECANT,
    pointwise=True,
    nonnegative=always,
    in_file="constants",
)
def igamma(call: Call, s: Tensor, x: Tensor) -> Affine:
    return _shared(call, {"other": over(call.value, x.expand_as(call.value))})


@rule(
    aten.igammac.default,
    carries="other",
    formula="-P(s, x) / x on x, c = 1",
    source=SECANT,
    pointwise=True,
    nonnegative=always,
    in_file="constants",
)
def igammac(call: Call, s: Tensor, x: Tensor) -> Affine:
    return _shared(call, {"other": -over(torch.igamma(s, x), x.expand_as(call.value))}, 1.0)
