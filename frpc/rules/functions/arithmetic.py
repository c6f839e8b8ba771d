"""Sums of carried values, constants and numbers; concatenation, choices between values, and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import if_all
from frpc.errors import SamplesUnknownError
from frpc.maps import LinearMap, Place, scaled
from frpc.rules.locality import along, concatenated, running
from frpc.rules.table import Affine, Call, Operand, linear_op, rule

aten = torch.ops.aten
Number = int | float
Term = Tensor | Number


def unmasked(constant: Term) -> Term:
    """Puts 0 in place of minus infinity, which marks what a softmax leaves out: its coefficient is 0, and 0 inf is NaN."""
    if isinstance(constant, Tensor):
        return torch.where(constant == -math.inf, 0.0, constant) if constant.is_floating_point() else constant
    return 0.0 if constant == -math.inf else constant


def _sum(call: Call, signed: dict[str, tuple[Term, float]]) -> Affine:
    """Builds ``z = sum_k factor_k * operand_k``: carried operands become terms, the others constants."""
    terms: dict[Operand, LinearMap] = {}
    constant: Term | None = None
    for name, (operand, factor) in signed.items():
        if call.carries(name):
            assert isinstance(operand, Tensor)
            terms[name] = scaled(factor, operand.shape, call.value.shape)
        else:
            share = unmasked(operand if factor == 1 else operand * factor)
            constant = share if constant is None else constant + share
    return Affine(terms, constant)


ADDITION: dict[str, Any] = {
    "linear": True,
    "pointwise": True,
    "passes_gates": True,
    "in_file": "constants",
}


@rule(
    aten.add.Tensor,
    aten.add.Scalar,
    carries=("self", "other"),
    formula="a + alpha b",
    source="method §2: addition",
    keeps_tokens=True,
    nonnegative=if_all("self", "other", "alpha"),
    **ADDITION,
)
def add(call: Call, a: Term, b: Term, alpha: Number = 1) -> Affine:
    return _sum(call, {"self": (a, 1.0), "other": (b, float(alpha))})


@rule(
    aten.sub.Tensor,
    carries=("self", "other"),
    formula="a - alpha b",
    source="method §2: addition",
    keeps_tokens=True,
    **ADDITION,
)
def sub(call: Call, a: Term, b: Term, alpha: Number = 1) -> Affine:
    return _sum(call, {"self": (a, 1.0), "other": (b, -float(alpha))})


@rule(
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    carries=("self", "other"),
    formula="b - alpha a",
    source="method §2: addition",
    **ADDITION,
)
def rsub(call: Call, a: Term, b: Term, alpha: Number = 1) -> Affine:
    return _sum(call, {"self": (a, -float(alpha)), "other": (b, 1.0)})


@rule(
    aten.cat.default,
    carries="tensors",
    formula="each operand at its place",
    source="method §2: concatenation",
    linear=True,
    picks=True,
    locality=concatenated,
    in_file="constants",
)
def cat(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Affine:
    result = call.value.shape
    dim = dim % len(result)
    terms: dict[Operand, LinearMap] = {}
    offset = 0
    for position, tensor in enumerate(tensors):
        if call.carries(("tensors", position)):
            terms["tensors", position] = Place(dim, offset, tensor.shape, result)
        offset += tensor.shape[dim]
    fixed = [t if not call.carries(("tensors", i)) else torch.zeros_like(t) for i, t in enumerate(tensors)]
    return Affine(terms, torch.cat(fixed, dim) if len(terms) < len(tensors) else None)


def _between(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The sign of ``(1 - w) a + w b``."""
    return {"self", "end"} <= set(positive) and 0 <= arguments["weight"] <= 1


@rule(
    aten.lerp.Scalar,
    carries=("self", "end"),
    formula="(1 - w) a + w b",
    source="method §2: addition",
    linear=True,
    pointwise=True,
    nonnegative=_between,
    in_file="constants",
)
def lerp(call: Call, a: Tensor, b: Tensor, weight: Number) -> Affine:
    return _sum(call, {"self": (a, 1.0 - float(weight)), "end": (b, float(weight))})


@rule(
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    carries=("self", "other"),
    formula="[condition] on a, [not condition] on b",
    source="method §2: selection",
    linear=True,
    pointwise=True,
    keeps_tokens=True,
    nonnegative=if_all("self", "other"),
    in_file="constants",
)
def where(call: Call, condition: Tensor, a: Term, b: Term) -> Affine:
    result = call.value.shape
    terms: dict[Operand, LinearMap] = {}
    constant: Tensor | None = None
    for name, operand, mask in (("self", a, condition), ("other", b, ~condition)):
        chosen = mask.to(call.value.dtype)
        if call.carries(name) and isinstance(operand, Tensor):
            terms[name] = scaled(chosen, operand.shape, result)
        else:
            share = chosen * unmasked(operand)
            constant = share if constant is None else constant + share
    return Affine(terms, constant)


@rule(
    aten.copy.default,
    carries=("self", "src"),
    formula="the source, broadcast; what it overwrites is gone",
    source="method §2: linear",
    linear=True,
    pointwise=True,
    keeps_tokens=True,
    ignores=("self",),
    nonnegative=if_all("src"),
    in_file="constants",
)
def copy(call: Call, a: Tensor, source: Tensor, non_blocking: bool = False) -> Affine:
    if not call.carries("src"):
        return Affine({}, source)
    return Affine({"src": scaled(1, source.shape, call.value.shape)})


def back(dim: int, rank: int) -> int:
    """Counts a dimension from the end, so that columns may come in front."""
    return dim if dim < 0 else dim - rank


def from_end(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Counts dimensions from the end, so that columns may come in front; none named means all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return list(range(-rank, 0))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [back(d, rank) for d in listed]


def refuse_batch(a: Tensor, dims: Sequence[int]) -> None:
    """Declines an operator that works along the dimension of the samples."""
    if any(isinstance(a.shape[d], torch.SymInt) for d in dims):
        raise SamplesUnknownError("it works along the batch: the result mixes samples")


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Callable[[Tensor], Tensor]]:
    """Returns, for a call of a reduction, the linear function it is; columns stay in front."""

    def build(call: Call, a: Tensor, dim: Any, keepdim: bool = False, dtype: Any = None) -> Callable[[Tensor], Tensor]:
        dims = from_end(dim, a.dim())
        refuse_batch(a, dims)
        return lambda u: reduce(u, dims, keepdim=keepdim)

    return build


REDUCTION: dict[str, Any] = {"nonnegative": if_all("self"), "locality": along("dim"), "in_file": "constants"}
linear_op(aten.sum.dim_IntList, _reduced(torch.sum), formula="sum over dimensions", **REDUCTION)
linear_op(aten.mean.dim, _reduced(torch.mean), formula="mean over dimensions", **REDUCTION)


def _accumulated(call: Call, a: Tensor, dim: int, dtype: Any = None) -> Callable[[Tensor], Tensor]:
    """Returns the running sum along a dimension; columns stay in front."""
    along = back(dim, a.dim())
    refuse_batch(a, [along])
    return lambda u: u.cumsum(along)


linear_op(aten.cumsum.default, _accumulated, formula="running sum", **REDUCTION | {"locality": running("dim")})
