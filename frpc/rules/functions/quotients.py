"""Quotients ``f(a) / a`` that keep their digits where a is near 0.

Where the quotient would divide by something near 0, a series takes over below ``sqrt(eps)``: its first neglected term is
then below the rounding of the dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "asin_over",
    "atan_over",
    "erf_over",
    "exp_over",
    "expm1_over",
    "log1p_over",
    "over",
    "quotient",
    "sin_over",
    "sinh_over",
    "softplus_over",
    "tanh_over",
]


def quotient(a: Tensor, numerator: Tensor, series: Tensor | float) -> Tensor:
    """Returns ``numerator / a``, and ``series`` where |a| is below sqrt(eps)."""
    near = a.abs() < math.sqrt(torch.finfo(a.dtype).eps)
    return torch.where(near, series, numerator / torch.where(near, 1.0, a))


def expm1_over(a: Tensor) -> Tensor:
    """``(e^a - 1) / a``."""
    return quotient(a, torch.expm1(a), 1.0 + 0.5 * a)


def tanh_over(a: Tensor) -> Tensor:
    """``tanh(a) / a``."""
    return quotient(a, torch.tanh(a), 1.0 - a * a / 3.0)


def sin_over(a: Tensor) -> Tensor:
    """``sin(a) / a``; torch.sinc, which multiplies by pi again, loses the phase of a large a."""
    return quotient(a, torch.sin(a), 1.0 - a * a / 6.0)


def softplus_over(a: Tensor) -> Tensor:
    """``(log(1 + e^a) - log 2) / a``, as ``(max(a, 0) + log1p(expm1(-|a|)/2)) / a``: no digits are lost near 0 or far out."""
    return quotient(a, a.clamp(min=0.0) + torch.log1p(torch.expm1(-a.abs()) * 0.5), 0.5 + 0.125 * a)


def exp_over(a: Tensor, value: Tensor, rate: float) -> Tensor:
    """``(b^a - 1) / a``, ``rate = log b``: expm1 near 0, where b^a - 1 cancels; b^a far out, where rounding a log b shows."""
    near = (a * rate).abs() < 1.0
    far = (value - 1.0) / torch.where(near, 1.0, a)
    return torch.where(near, rate * expm1_over(torch.where(near, a * rate, 0.0)), far)


def sinh_over(a: Tensor) -> Tensor:
    """``sinh(a) / a``."""
    return quotient(a, torch.sinh(a), 1.0 + a * a / 6.0)


def asin_over(a: Tensor) -> Tensor:
    """``asin(a) / a``."""
    return quotient(a, torch.asin(a), 1.0 + a * a / 6.0)


def atan_over(a: Tensor) -> Tensor:
    """``atan(a) / a``."""
    return quotient(a, torch.atan(a), 1.0 - a * a / 3.0)


def log1p_over(a: Tensor) -> Tensor:
    """``log(1 + a) / a``."""
    return quotient(a, torch.log1p(a), 1.0 - 0.5 * a)


def erf_over(a: Tensor) -> Tensor:
    """``erf(a) / a``."""
    return quotient(a, torch.erf(a), 2.0 / math.sqrt(math.pi) * (1.0 - a * a / 3.0))


def over(value: Tensor, a: Tensor) -> Tensor:
    """``f(a) / a``, and 0 at a = 0: all of the result is carried, and nothing where there is nothing to carry."""
    return torch.where(a == 0, 0.0, value / torch.where(a == 0, 1.0, a))
