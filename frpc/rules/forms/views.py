"""Operators that move elements about: reshape, permute, slice, pad, expand, roll. ``M`` is the operator itself.

Dimensions are counted from the end throughout, so that a map works unchanged on tensors with columns in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.core.traits import if_all
from frpc.errors import RuleDeclinedError
from frpc.maps import Broadcast, Identity, LinearMap, LinearOp, Pad, Scale, Shuffle, Slice, Transpose
from frpc.rules.locality import (
    cells,
    expanded,
    flipped,
    mirrored,
    on_border,
    padded,
    permuted,
    repeated,
    reshaped,
    rolled,
    sliced,
    written,
)
from frpc.rules.table import Affine, Call, Operand, linear_op, rule

aten = torch.ops.aten


@rule(
    aten.clone.default,
    formula="a",
    source="method §2: identity",
    linear=True,
    pointwise=True,
    keeps_order=True,
    in_file="layout",
)
@rule(
    aten.alias.default,
    aten.detach.default,
    formula="a",
    source="method §2: identity",
    linear=True,
    pointwise=True,
    keeps_order=True,
    view=True,
    in_file="constants",
)
@rule(
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    formula="a",
    source="method §2: identity",
    linear=True,
    pointwise=True,
)
def identity(call: Call, a: Tensor, *arguments: Any) -> Affine:
    return Affine({str(schema_of(call.op).arguments[0].name): Identity(a.shape)})


@rule(
    aten.expand.default,
    formula="a, broadcast",
    source="method §2: linear",
    linear=True,
    picks=True,
    view=True,
    locality=expanded,
    in_file="layout",
)
def expand(call: Call, a: Tensor, *arguments: Any) -> Affine:
    return Affine({"self": Broadcast(a.shape, call.value.shape)})


@rule(
    aten.slice.Tensor,
    formula="a[start:stop:step]",
    source="method §2: linear",
    linear=True,
    picks=True,
    view=True,
    locality=sliced,
    in_file="layout",
)
def slice_(call: Call, a: Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Affine:
    begin = 0 if start is None else start
    end = 2**63 - 1 if stop is None else stop
    return Affine({"self": Slice(dim, begin, end, step, a.shape, call.value.shape)})


@rule(
    aten.slice_scatter.default,
    carries=("self", "src"),
    formula="a outside the slice, b inside",
    source="method §2: linear",
    linear=True,
    keeps_tokens=True,
    nonnegative=if_all("self", "src"),
    locality=written,
    in_file="constants",
)
def slice_scatter(
    call: Call, a: Tensor, b: Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Affine:
    end = 2**63 - 1 if stop is None else stop
    cut = Slice(dim, start or 0, end, step, a.shape, b.shape)
    inside = cut.pull(torch.ones_like(b))
    terms: dict[Operand, LinearMap] = {}
    constant: Tensor | None = None
    if call.carries("self"):
        terms["self"] = Scale(1.0 - inside, a.shape)
    else:
        constant = a * (1.0 - inside)
    if call.carries("src"):
        terms["src"] = Transpose(cut)
    else:
        constant = cut.pull(b) if constant is None else constant + cut.pull(b)
    return Affine(terms, constant)


def _reshaped(call: Call, a: Tensor, *arguments: Any) -> Callable[[Tensor], Tensor]:
    """Covers every operator that keeps the order of elements: view, flatten, (un)squeeze, ..."""
    rank, result = a.dim(), list(call.value.shape)
    return lambda u: u.reshape([*u.shape[: u.dim() - rank], *result])


def _dims(dims: int | Sequence[int], rank: int) -> list[int]:
    return [d if d < 0 else d - rank for d in ([dims] if isinstance(dims, int) else dims)]


def _permuted(call: Call, a: Tensor, dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    order = _dims(dims, a.dim())
    return lambda u: u.permute([*range(u.dim() - a.dim()), *(u.dim() + d for d in order)])


RESHAPE: dict[str, Any] = {"keeps_order": True, "view": True, "locality": reshaped}
for _op in (
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
):
    linear_op(_op, _reshaped, formula="a, reshaped", in_file="layout", **RESHAPE)
for _op in (aten._unsafe_view.default, aten.squeeze.default):
    linear_op(_op, _reshaped, formula="a, reshaped", in_file="constants", **RESHAPE)
for _op in (aten.flatten.using_ints, aten.unflatten.int):
    linear_op(_op, _reshaped, formula="a, reshaped", **RESHAPE)
MOVED: dict[str, Any] = {"rearranges": True, "view": True, "locality": permuted, "in_file": "layout"}
linear_op(aten.permute.default, _permuted, formula="a, permuted", **MOVED)
linear_op(
    aten.transpose.int,
    lambda call, a, first, second: lambda u: u.transpose(*_dims([first, second], a.dim())),
    formula="a, transposed",
    **MOVED,
)
linear_op(aten.t.default, lambda call, a: lambda u: u.transpose(-1, -2) if a.dim() == 2 else u, formula="a, transposed", **MOVED)
linear_op(
    aten.select.int,
    lambda call, a, dim, index: lambda u: u.select(_dims(dim, a.dim())[0], index),
    formula="a[index]",
    picks=True,
    view=True,
    in_file="layout",
)
linear_op(
    aten.diagonal.default,
    lambda call, a, offset=0, first=0, second=1: lambda u: u.diagonal(offset, *_dims([first, second], a.dim())),
    formula="a's diagonal",
    picks=True,
    view=True,
    in_file="constants",
)
linear_op(
    aten.unfold.default,
    lambda call, a, dim, size, step: lambda u: u.unfold(_dims(dim, a.dim())[0], size, step),
    formula="a in overlapping pieces",
    picks=True,
    view=True,
    in_file="constants",
)
linear_op(
    aten.flip.default,
    lambda call, a, dims: lambda u: u.flip(_dims(dims, a.dim())),
    formula="a, reversed",
    rearranges=True,
    locality=flipped,
    in_file="layout",
)
linear_op(
    aten.roll.default,
    lambda call, a, shifts, dims=(): lambda u: u.roll(shifts, _dims(dims, a.dim())),
    formula="a, rolled",
    rearranges=True,
    locality=rolled,
    in_file="constants",
)
linear_op(
    aten.repeat.default,
    lambda call, a, repeats: lambda u: u.repeat([*[1] * (u.dim() - a.dim()), *repeats]),
    formula="a, repeated",
    picks=True,
    locality=repeated,
    in_file="constants",
)


for _op in (aten.tril.default, aten.triu.default):
    linear_op(
        _op,
        lambda call, a, diagonal=0: lambda u: call.op(u, diagonal),
        formula="a on one side of its diagonal",
        nonnegative=if_all("self"),
        locality=cells,
        in_file="constants",
    )
linear_op(
    aten.diag_embed.default,
    lambda call, a, offset=0, first=-2, second=-1: (
        lambda u: torch.diag_embed(u, offset, *_dims([first, second], call.value.dim()))
    ),
    formula="a on a diagonal",
    nonnegative=if_all("self"),
    in_file="constants",
)
linear_op(
    aten.rot90.default,
    lambda call, a, k=1, dims=(0, 1): lambda u: u.rot90(k, _dims(dims, a.dim())),
    formula="a, turned",
    rearranges=True,
    in_file="constants",
)


@rule(
    aten.as_strided.default,
    formula="a, reshaped",
    source="method §2: linear",
    linear=True,
    picks=True,
    view=True,
    in_file="constants",
)
def as_strided(call: Call, a: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Affine:
    expected: list[str] = []
    step = 1
    for n in reversed(size):
        expected.insert(0, str(step))
        step = step * n
    whole = not offset and str(step) == str(a.numel()) and a.is_contiguous()
    if not whole or [str(s) for s in stride] != expected:
        raise RuleDeclinedError("it reads memory by address, not by index: use slices, unfold or reshape")
    return Affine({"self": LinearOp(_reshaped(call, a), a.shape, call.value.shape)})


@rule(
    aten.constant_pad_nd.default,
    formula="a inside, c = value outside",
    source="method §2: linear",
    linear=True,
    nonnegative=if_all("self", "value"),
    locality=padded,
    in_file="constants",
)
def constant_pad(call: Call, a: Tensor, padding: Sequence[int], value: float = 0) -> Affine:
    # A frame of minus infinity is there for a max pool to pass over: it reaches nothing, and 0 times it would be NaN.
    frame = aten.constant_pad_nd(torch.zeros_like(a), padding, value) if value not in (0, -math.inf) else None
    return Affine({"self": Pad(padding, a.shape, call.value.shape)}, frame)


@rule(
    aten.channel_shuffle.default,
    formula="a, its channels dealt out",
    source="method §2: linear",
    linear=True,
    rearranges=True,
    locality=cells,
    in_file="constants",
)
def channel_shuffle(call: Call, a: Tensor, groups: int) -> Affine:
    return Affine({"self": Shuffle(groups, a.shape)})


for _ops, _locality in (
    ((aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default), mirrored),
    ((aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default), on_border),
):
    for _op in _ops:
        linear_op(
            _op,
            lambda call, a, padding: lambda u: call.op(u, padding),
            formula="a, padded by its own values",
            pool=True,
            picks=True,
            locality=_locality,
            in_file="constants",
        )
