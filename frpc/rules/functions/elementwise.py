"""Elementwise operators: secants through 0 in closed form (method §2).

``M = (f(a) - f(0)) / a`` and ``c = f(0)``. A comment gives each function's f.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frpc.core.traits import if_all
from frpc.maps import ReLUGate, Scale
from frpc.rules.functions.quotients import (
    asin_over,
    atan_over,
    erf_over,
    exp_over,
    expm1_over,
    log1p_over,
    over,
    quotient,
    sin_over,
    sinh_over,
    softplus_over,
    tanh_over,
)
from frpc.rules.functions.ranges import (
    BOUNDS,
    KEEPS_SIGN,
    PLAIN,
    POSITIVE,
    RELU,
    bounded_below,
    cut_at_zero,
    power_sign,
    softplus_sign,
    threshold_sign,
)
from frpc.rules.table import Affine, Call, elementwise, rule

aten = torch.ops.aten
LOG2 = math.log(2.0)


def _softplus(a: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    # The operator switches to the identity above its threshold, where softplus differs from it by e^-threshold.
    h = a * beta
    above = h > threshold
    if threshold < 0:  # then 0 lies above it, f(0) = 0
        below = torch.where(above, -1.0, h)
        return torch.where(above, 1.0, torch.nn.functional.softplus(below) / below)
    return torch.where(above, (h - LOG2) / torch.where(above, h, 1.0), softplus_over(h))


def _softplus_at_zero(beta: float = 1.0, threshold: float = 20.0) -> float:
    return LOG2 / beta if threshold >= 0 else 0.0


def _leaky_relu(a: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(a > 0, torch.ones_like(a), slope)  # of two numbers, where would make float32


def _gelu(a: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return torch.special.ndtr(a)
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * a * a * a)))


def _elu(a: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    below = a.clamp(max=0.0) * input_scale  # clamped: e^a of a large positive a would be inf in the branch not taken
    return torch.where(a > 0, scale, scale * alpha * input_scale * expm1_over(below))


def _clamp_at_zero(low: float | None, high: float | None) -> float:
    value = 0.0 if low is None else max(0.0, float(low))
    return value if high is None else min(value, float(high))


def _clamp(a: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    base = _clamp_at_zero(low, high)
    if base == 0.0:
        # Inside the interval the quotient is exactly 1; at a = 0 the slope is 1 only if 0 is not the upper end alone.
        safe = torch.where(a == 0, 1.0, a)
        return torch.where(a == 0, 0.0 if low == 0 else 1.0, torch.clamp(a, low, high) / safe)
    safe = torch.where(a == 0, 1.0, a)
    return torch.where(a == 0, 0.0, (torch.clamp(a, low, high) - base) / safe)


def _hardsigmoid(a: Tensor) -> Tensor:
    return 1.0 / 6.0 * torch.where(a.abs() <= 3.0, 1.0, 3.0 / a.abs().clamp(min=3.0))


def _softshrink(a: Tensor, bound: float = 0.5) -> Tensor:
    outside = a.abs() > bound
    return torch.where(outside, (a.abs() - bound) / torch.where(outside, a.abs(), 1.0), 0.0)


def _threshold_at_zero(threshold: float, value: float) -> float:
    return 0.0 if threshold < 0 else float(value)


def _threshold(a: Tensor, threshold: float, value: float) -> Tensor:
    base = _threshold_at_zero(threshold, value)
    safe = torch.where(a == 0, 1.0, a)
    return torch.where(a == 0, 1.0 if threshold < 0 else 0.0, (torch.where(a > threshold, a, value) - base) / safe)


def _power(a: Tensor, exponent: float) -> Tensor:
    # a^p = a^(p-1) * a; a negative p has no value at 0 to subtract, so the whole result is carried.
    if exponent == 0:
        return torch.zeros_like(a)
    return torch.where(a == 0, 1.0 if exponent == 1 else 0.0, torch.pow(torch.where(a == 0, 1.0, a), exponent - 1))


# The rules --------------------------------------------------------------------------------------------------------------


@rule(aten.relu.default, formula="[a > 0]", source="T 3.5, 3.8: |sgn(out)|", elementwise=True, **RELU)
def relu(call: Call, a: Tensor) -> Affine:
    return Affine({"self": ReLUGate(call.value)})


@rule(
    aten.prelu.default,
    formula="1 if a > 0 else w",
    source="method §2: secant through 0",
    elementwise=True,
    activation=True,
    nonnegative=if_all("self"),
)
@rule(
    aten._prelu_kernel.default,
    formula="1 if a > 0 else w",
    source="method §2: secant through 0",
    elementwise=True,
    activation=True,
    **KEEPS_SIGN,
)
def prelu(call: Call, a: Tensor, weight: Tensor) -> Affine:
    shape = [-1 if i == 1 else 1 for i in range(a.dim())] if weight.dim() == 1 and a.dim() > 1 else list(weight.shape)
    return Affine({"self": Scale(torch.where(a > 0, 1.0, weight.reshape(shape)), a.shape)})


@rule(
    aten.log_sigmoid_forward.default,
    formula="(log(1+e^-a) - log 2)/(-a), c = -log 2",
    source="method §2: secant through 0",
    elementwise=True,
    **PLAIN,
)
def log_sigmoid(call: Call, a: Tensor) -> Affine:
    return Affine({"self": Scale(softplus_over(-a), a.shape)}, -LOG2)


elementwise(aten.relu6.default, lambda a: _clamp(a, 0.0, 6.0), formula="min(max(a, 0), 6) / a", **RELU)
elementwise(
    aten.hardtanh.default,
    lambda a, low=-1.0, high=1.0: _clamp(a, low, high),
    _clamp_at_zero,
    formula="(clamp(a) - clamp(0)) / a",
    activation=True,
    nonnegative=bounded_below("min_val", "max_val"),
    rectifies=cut_at_zero("min_val", "max_val"),
    **PLAIN,
)
elementwise(
    aten.clamp.default,
    _clamp,
    _clamp_at_zero,
    formula="(clamp(a) - clamp(0)) / a",
    activation=True,
    rectifies=cut_at_zero("min", "max"),
    **BOUNDS,
)
elementwise(
    aten.clamp_min.default,
    lambda a, low: _clamp(a, low, None),
    lambda low: _clamp_at_zero(low, None),
    formula="(clamp(a) - clamp(0)) / a",
    activation=True,
    rectifies=cut_at_zero("min", "max"),
    **BOUNDS,
)
elementwise(
    aten.clamp_max.default,
    lambda a, high: _clamp(a, None, high),
    lambda high: _clamp_at_zero(None, high),
    formula="(clamp(a) - clamp(0)) / a",
    **BOUNDS,
)
elementwise(aten.leaky_relu.default, _leaky_relu, formula="1 if a > 0 else slope", activation=True, **KEEPS_SIGN)
elementwise(
    aten.elu.default, _elu, formula="1 if a > 0 else (e^a - 1)/a", activation=True, nonnegative=if_all("self", "scale"), **PLAIN
)
elementwise(
    aten.celu.default,
    lambda a, alpha=1.0: _elu(a, alpha, 1.0, 1.0 / alpha),
    formula="1 if a > 0 else alpha (e^(a/alpha) - 1)/a",
    activation=True,
    **KEEPS_SIGN,
)
elementwise(
    aten.selu.default,
    lambda a: _elu(a, 1.6732632423543772, 1.0507009873554805),
    formula="scale * elu's",
    activation=True,
    **KEEPS_SIGN,
)
elementwise(aten.gelu.default, _gelu, formula="Phi(a), the normal distribution function", activation=True, **KEEPS_SIGN)
elementwise(aten.silu.default, torch.sigmoid, formula="sigmoid(a)", activation=True, **KEEPS_SIGN)
elementwise(
    aten.mish.default,
    lambda a: torch.tanh(torch.nn.functional.softplus(a)),
    formula="tanh(softplus(a))",
    activation=True,
    **KEEPS_SIGN,
)
elementwise(aten.hardswish.default, torch.nn.functional.hardsigmoid, formula="relu6(a + 3) / 6", activation=True, **KEEPS_SIGN)
elementwise(
    aten.sigmoid.default,
    lambda a: 0.25 * tanh_over(0.5 * a),
    0.5,
    formula="tanh(a/2) / (2a), c = 1/2",
    activation=True,
    gate=True,
    **POSITIVE,
)
elementwise(
    aten.hardsigmoid.default,
    _hardsigmoid,
    0.5,
    formula="1/6 inside [-3, 3], 1/(2|a|) outside, c = 1/2",
    activation=True,
    gate=True,
    **POSITIVE,
)
elementwise(aten.tanh.default, tanh_over, formula="tanh(a) / a", activation=True, **KEEPS_SIGN)
elementwise(
    aten.softplus.default,
    _softplus,
    _softplus_at_zero,
    formula="(softplus(a) - log 2) / a, c = log 2",
    activation=True,
    nonnegative=softplus_sign,
    **PLAIN,
)
elementwise(
    aten.softshrink.default, _softshrink, formula="1 - bound/|a| outside the bound, 0 inside", activation=True, **KEEPS_SIGN
)
elementwise(
    aten.hardshrink.default,
    lambda a, bound=0.5: (a.abs() > bound).to(a.dtype),
    formula="[|a| > bound]",
    activation=True,
    **KEEPS_SIGN,
)
elementwise(
    aten.threshold.default,
    _threshold,
    _threshold_at_zero,
    formula="(f(a) - f(0)) / a",
    activation=True,
    nonnegative=threshold_sign,
    rectifies=lambda given: given["threshold"] == 0 == given["value"],
    **PLAIN,
)
elementwise(aten.exp.default, expm1_over, 1.0, formula="(e^a - 1) / a, c = 1", gate=True, **POSITIVE)
elementwise(aten.expm1.default, expm1_over, formula="(e^a - 1) / a", **KEEPS_SIGN)
elementwise(aten.log1p.default, log1p_over, formula="log(1 + a) / a", **KEEPS_SIGN)
elementwise(aten.sin.default, sin_over, formula="sin(a) / a", **PLAIN)
elementwise(aten.cos.default, lambda a: -torch.sin(0.5 * a) * sin_over(0.5 * a), 1.0, formula="(cos(a) - 1) / a, c = 1", **PLAIN)
elementwise(aten.tan.default, lambda a: quotient(a, torch.tan(a), 1.0 + a * a / 3.0), formula="tan(a) / a", **PLAIN)
elementwise(aten.atan.default, atan_over, formula="atan(a) / a", **KEEPS_SIGN)
elementwise(aten.erf.default, erf_over, formula="erf(a) / a", **KEEPS_SIGN)
elementwise(aten.erfc.default, lambda a: -erf_over(a), 1.0, formula="-erf(a) / a, c = 1", **POSITIVE)
elementwise(aten.exp2.default, lambda a: exp_over(a, torch.exp2(a), LOG2), 1.0, formula="(2^a - 1) / a, c = 1", **POSITIVE)
elementwise(aten.sinh.default, sinh_over, formula="sinh(a) / a", **KEEPS_SIGN)
elementwise(
    aten.cosh.default, lambda a: torch.sinh(0.5 * a) * sinh_over(0.5 * a), 1.0, formula="(cosh(a) - 1) / a, c = 1", **POSITIVE
)
elementwise(aten.asinh.default, lambda a: quotient(a, torch.asinh(a), 1.0 - a * a / 6.0), formula="asinh(a) / a", **KEEPS_SIGN)
elementwise(aten.atanh.default, lambda a: quotient(a, torch.atanh(a), 1.0 + a * a / 3.0), formula="atanh(a) / a", **KEEPS_SIGN)
elementwise(aten.asin.default, asin_over, formula="asin(a) / a", **KEEPS_SIGN)
elementwise(aten.acos.default, lambda a: -asin_over(a), 0.5 * math.pi, formula="-asin(a) / a, c = pi/2", **POSITIVE)
elementwise(aten.rad2deg.default, lambda a: 180.0 / math.pi, formula="180 / pi", **KEEPS_SIGN)
elementwise(aten.deg2rad.default, lambda a: math.pi / 180.0, formula="pi / 180", **KEEPS_SIGN)
elementwise(aten.abs.default, torch.sign, formula="sgn(a)", **POSITIVE)
elementwise(aten.neg.default, lambda a: -1.0, formula="-1", **PLAIN)
elementwise(aten.square.default, lambda a: a, formula="a", **POSITIVE)
elementwise(aten.pow.Tensor_Scalar, _power, lambda p: 1.0 if p == 0 else 0.0, formula="a^(p-1)", nonnegative=power_sign, **PLAIN)
elementwise(aten.sqrt.default, lambda a: over(torch.sqrt(a), a), formula="1 / sqrt(a)", gate=True, **POSITIVE)
elementwise(
    aten.rsqrt.default, lambda a: over(torch.rsqrt(a), a), formula="f(a) / a (no value at 0: all carried)", gate=True, **PLAIN
)
elementwise(
    aten.reciprocal.default,
    lambda a: over(torch.reciprocal(a), a),
    formula="f(a) / a (no value at 0: all carried)",
    gate=True,
    **PLAIN,
)
elementwise(aten.log.default, lambda a: over(torch.log(a), a), formula="f(a) / a (no value at 0: all carried)", **PLAIN)
elementwise(aten.log2.default, lambda a: over(torch.log2(a), a), formula="f(a) / a (no value at 0: all carried)", **PLAIN)
elementwise(aten.log10.default, lambda a: over(torch.log10(a), a), formula="f(a) / a (no value at 0: all carried)", **PLAIN)
elementwise(
    aten.logit.default, lambda a, eps=None: over(torch.logit(a, eps), a), formula="f(a) / a (no value at 0: all carried)", **PLAIN
)
elementwise(aten.acosh.default, lambda a: over(torch.acosh(a), a), formula="f(a) / a (no value at 0: all carried)", **POSITIVE)
