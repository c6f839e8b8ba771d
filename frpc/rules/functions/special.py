"""Special functions of one number: secants through 0 in closed form, where the function has a value there (method §2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import always
from frpc.maps import Scale
from frpc.rules.functions.quotients import erf_over, expm1_over, over, quotient
from frpc.rules.table import Affine, Call, elementwise, rule

aten = torch.ops.aten
WHOLE = "f(a) / a (no value at 0: all carried)"


def _polynomial(t: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``sum_k c_k t^k`` by Horner's rule."""
    value = torch.full_like(t, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * t + c
    return value


def _sinc_over(a: Tensor) -> Tensor:
    """``(sinc(a) - 1) / a``: near 0 the series of ``sin(x)/x - 1``, x = pi a, from which nothing is subtracted."""
    x = math.pi * a.clamp(-0.4, 0.4)
    series = _polynomial(x * x, [(-1.0) ** (k + 1) / math.factorial(2 * k + 3) for k in range(10)])
    far = a.abs() > 0.3
    return torch.where(far, (torch.sinc(a) - 1.0) / torch.where(far, a, 1.0), math.pi * x * series)


def _i0_over(a: Tensor) -> Tensor:
    """``(I0(a) - 1) / a``: near 0 ``a/4 sum_k (a^2/4)^k / ((k + 1)!)^2``."""
    near = a.clamp(-1.0, 1.0)
    series = 0.25 * near * _polynomial(0.25 * near * near, [1.0 / math.factorial(k + 1) ** 2 for k in range(10)])
    far = a.abs() > 1.0
    return torch.where(far, (torch.i0(a) - 1.0) / torch.where(far, a, 1.0), series)


def _i0e_over(a: Tensor) -> Tensor:
    """``(e^-|a| I0(a) - 1) / a``, as ``e^-|a| (I0(a) - 1)/a + (e^-|a| - 1)/a``; 0 at its edge."""
    size = a.abs().clamp(max=1.0)
    near = torch.exp(-size) * _i0_over(a.clamp(-1.0, 1.0)) - a.sign() * expm1_over(-size)
    far = a.abs() > 1.0
    return torch.where(far, (torch.special.i0e(a) - 1.0) / torch.where(far, a, 1.0), near)


def _erfcx_over(a: Tensor) -> Tensor:
    """``(e^(a^2) erfc(a) - 1) / a``, near 0 as ``a (e^(a^2) - 1)/a^2 - e^(a^2) erf(a)/a``."""
    near = a.clamp(-1.0, 1.0)
    square = near * near
    middle = near * expm1_over(square) - torch.exp(square) * erf_over(near)
    far = a.abs() > 1.0
    return torch.where(far, (torch.special.erfcx(a) - 1.0) / torch.where(far, a, 1.0), middle)


def _log_ndtr_over(a: Tensor) -> Tensor:
    """``(log Phi(a) + log 2) / a``; above -1 ``log(2 Phi(a))`` is ``log1p(erf(a / sqrt 2))``, which loses no digits at 0."""
    slope = math.sqrt(2.0 / math.pi)
    low = a < -1.0
    logarithm = torch.log1p(torch.erf(torch.where(low, 0.0, a) / math.sqrt(2.0)))
    near = quotient(a, logarithm, slope - 0.5 * slope * slope * a)
    return torch.where(low, (torch.special.log_ndtr(a) + math.log(2.0)) / torch.where(low, a, 1.0), near)


def _entr_over(a: Tensor) -> Tensor:
    """``-log(a)``; at 0 there is nothing to carry, and below 0 the function has no value."""
    return torch.where(a > 0, -torch.log(torch.where(a > 0, a, 1.0)), over(torch.special.entr(a), a))


elementwise(aten.sinc.default, _sinc_over, 1.0, formula="(sin(pi a) / (pi a) - 1) / a, c = 1", in_file="constants")
elementwise(
    aten.erfinv.default,
    lambda a: quotient(a, torch.erfinv(a), 0.5 * math.sqrt(math.pi) * (1.0 + math.pi / 12.0 * a * a)),
    formula="erfinv(a) / a",
    in_file="constants",
)
elementwise(
    aten.special_erfcx.default,
    _erfcx_over,
    1.0,
    formula="(e^(a^2) erfc(a) - 1) / a, c = 1",
    nonnegative=always,
    in_file="constants",
)
elementwise(
    aten.special_log_ndtr.default,
    _log_ndtr_over,
    -math.log(2.0),
    formula="(log Phi(a) + log 2) / a, c = -log 2",
    in_file="constants",
)
elementwise(aten.i0.default, _i0_over, 1.0, formula="(I0(a) - 1) / a, c = 1", nonnegative=always, in_file="constants")
elementwise(
    aten.special_i0e.default,
    _i0e_over,
    1.0,
    formula="(e^-|a| I0(a) - 1) / a, c = 1; 0 at a = 0",
    nonnegative=always,
    in_file="constants",
)
elementwise(
    aten.special_i1.default,
    lambda a: quotient(a, torch.special.i1(a), 0.5 + a * a / 16.0),
    formula="I1(a) / a",
    in_file="constants",
)
elementwise(
    aten.special_i1e.default,
    lambda a: quotient(a, torch.special.i1e(a), 0.5 - 0.5 * a.abs()),
    formula="e^-|a| I1(a) / a",
    in_file="constants",
)
elementwise(aten.special_entr.default, _entr_over, formula="-log(a), 0 at a = 0", in_file="constants")
elementwise(aten.lgamma.default, lambda a: over(torch.lgamma(a), a), formula=WHOLE, in_file="constants")
elementwise(aten.digamma.default, lambda a: over(torch.digamma(a), a), formula=WHOLE, in_file="constants")
elementwise(aten.mvlgamma.default, lambda a, p: over(torch.mvlgamma(a, p), a), formula=WHOLE, in_file="constants")
elementwise(aten.special_ndtri.default, lambda a: over(torch.special.ndtri(a), a), formula=WHOLE, in_file="constants")


@rule(
    aten.polygamma.default,
    carries="self",
    formula=WHOLE,
    source="method §2: secant through 0",
    pointwise=True,
    in_file="constants",
)
def polygamma(call: Call, n: int, a: Tensor, *rest: Any) -> Affine:
    return Affine({"self": Scale(over(call.value, a), a.shape)})
