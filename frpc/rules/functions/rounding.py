"""Rounding and casts: steps keep the secant where they are flat around 0; where they jump at 0 the result is a constant.

``round`` and ``trunc`` are 0 around 0, so their secant is bounded by 2 and by 1. ``sign``, ``floor`` and ``ceil`` jump there: no
factor is bounded, their slope is 0 everywhere else, and all of the value is ``c``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import Operand, if_all
from frpc.maps import Cast, Identity, Scale
from frpc.rules.functions.quotients import over
from frpc.rules.functions.ranges import KEEPS_SIGN, PLAIN
from frpc.rules.table import Affine, Call, elementwise, rule

aten = torch.ops.aten


CAST: dict[str, Any] = {
    "linear": True,
    "pointwise": True,
    "casts": True,
    "passes_gates": True,
    "keeps_tokens": True,
    "nonnegative": if_all("self"),
}


@rule(aten._to_copy.default, formula="a, in another floating type", source="method §2: identity", in_file="constants", **CAST)
@rule(aten.to.dtype, formula="a, in another floating type", source="method §2: identity", **CAST)
@rule(
    aten.to.other,
    aten.type_as.default,
    formula="a, in another floating type",
    source="method §2: identity",
    ignores=("other",),
    **CAST,
)
def cast(call: Call, a: Tensor, *arguments: Any) -> Affine:
    return Affine({"self": Cast(a, call.value)})


@rule(
    aten.sign.default,
    aten.sgn.default,
    aten.floor.default,
    aten.ceil.default,
    formula="0, c = f(a)",
    source="method §2: slope 0 and a jump at 0",
    elementwise=True,
    **KEEPS_SIGN,
)
def step(call: Call, a: Tensor) -> Affine:
    return Affine({"self": Scale(0.0, a.shape)}, call.value)


@rule(
    aten.remainder.Scalar,
    formula="1, c = -b floor(a / b)",
    source="method §2: slope 1 and a jump at 0",
    elementwise=True,
    nonnegative=if_all("other"),
    **PLAIN,
)
def remainder(call: Call, a: Tensor, b: Tensor | float) -> Affine:
    return Affine({"self": Identity(a.shape)}, call.value - a)


def _finite_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The sign of a with numbers in place of NaN and infinity; minus infinity is not among those that are not negative."""
    return "self" in positive and all(arguments[name] is None or arguments[name] >= 0 for name in ("nan", "posinf"))


@rule(
    aten.nan_to_num.default,
    formula="[a is finite], c = the value elsewhere",
    source="method §2: selection",
    elementwise=True,
    nonnegative=_finite_sign,
    **PLAIN,
)
def nan_to_num(call: Call, a: Tensor, *arguments: Any) -> Affine:
    finite = torch.isfinite(a)
    return Affine({"self": Scale(finite.to(a.dtype), a.shape)}, torch.where(finite, 0.0, call.value))


elementwise(aten.round.default, lambda a: over(torch.round(a), a), formula="round(a) / a", **KEEPS_SIGN)
elementwise(
    aten.round.decimals, lambda a, decimals: over(torch.round(a, decimals=decimals), a), formula="round(a) / a", **KEEPS_SIGN
)
elementwise(aten.trunc.default, lambda a: over(torch.trunc(a), a), formula="trunc(a) / a", **KEEPS_SIGN)
elementwise(
    aten.frac.default,
    lambda a: torch.where(a.abs() < 1, 1.0, torch.frac(a) / a),
    formula="1 inside (-1, 1), else frac(a) / a",
    **KEEPS_SIGN,
)
elementwise(
    aten.fmod.Scalar,
    lambda a, b: torch.where(a.abs() < abs(b), 1.0, torch.fmod(a, b) / a),
    formula="1 inside (-b, b), else fmod(a, b) / a",
    **KEEPS_SIGN,
)
