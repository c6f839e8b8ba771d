"""Ranges of functions of one number: where their results are negative, which of them are ReLUs, and traits that many share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from frpc.core.traits import Operand, Sign, always, if_all

__all__ = [
    "BOUNDS",
    "KEEPS_SIGN",
    "PLAIN",
    "POSITIVE",
    "RELU",
    "bounded_below",
    "cut_at_zero",
    "power_sign",
    "softplus_sign",
    "threshold_sign",
]


def bounded_below(low: str, high: str) -> Sign:
    """The sign of ``min(max(a, low), high)``; either bound may be missing."""

    def sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
        below, above = arguments.get(low), arguments.get(high)
        return (above is None or above >= 0) and ("self" in positive or (below is not None and below >= 0))

    return sign


def cut_at_zero(low: str, high: str) -> Callable[[Mapping[str, Any]], bool]:
    """``min(max(a, 0), high)`` is a ReLU, up to high."""
    return lambda arguments: arguments[low] == 0 and (arguments.get(high) is None or arguments[high] > 0)


def softplus_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """Of a negative beta the result is negative everywhere; above its threshold, which may be negative too, it is a."""
    return bool(arguments["beta"] > 0 and (arguments["threshold"] >= 0 or "self" in positive))


def threshold_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    return bool(arguments["value"] >= 0 and ("self" in positive or arguments["threshold"] >= 0))


def power_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """Even powers are never negative. Others are not where a is not; but -0.0 to the power of -1 is minus infinity."""
    exponent = arguments["exponent"]
    return bool(exponent % 2 == 0 or ("self" in positive and exponent > 0))


PLAIN: dict[str, Any] = {"in_file": "constants"}
KEEPS_SIGN: dict[str, Any] = {"nonnegative": if_all("self"), **PLAIN}  # f(a) >= 0 where a >= 0
POSITIVE: dict[str, Any] = {"nonnegative": always, **PLAIN}
RELU: dict[str, Any] = {"activation": True, "rectifies": lambda arguments: True, **POSITIVE}
BOUNDS: dict[str, Any] = {"passes_gates": True, "keeps_tokens": True, "nonnegative": bounded_below("min", "max"), **PLAIN}
