"""Where the samples lie in every value of a graph, and sums over what belongs to one sample.

Sizes tell it where the batch is free: the dimension that grows with the batch. They tell nothing where a dimension holds more
than samples, or the batch is fixed and other dimensions divide by it. So the graph is also tried (:mod:`frpc.capture.mixing`):
samples are changed, and the elements that change with one belong to it. What the trial contradicts is not known, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import describe, first_result, origin_of
from frpc.core.torch_compat import expression_of
from frpc.rules.table import traits_of

__all__ = [
    "FIRST",
    "Batch",
    "Evidence",
    "axes_of",
    "batches_of",
    "fitting",
    "guessed",
    "of_sample",
    "one_per_sample",
    "place_of",
    "spread_out",
]

aten = torch.ops.aten

_REPEATING = {aten.repeat.default, aten.cat.default}  # whole batches behind one another


@dataclass(frozen=True)
class Batch:
    """Where the samples are in a tensor: dimension ``axis`` has size ``batch * factor``.

    Of the ``factor`` parts of a sample, ``outer`` lie further apart than samples: the dimension is ``[outer, batch, inner]``,
    flattened. A batch that leads has ``outer`` 1; time steps in front of samples make it the number of steps.
    """

    axis: int
    factor: int
    outer: int = 1

    @property
    def inner(self) -> int:
        return self.factor // self.outer


FIRST = Batch(0, 1)
"""Samples first, with nothing else in their dimension: ``[B, ...]``."""


def one_per_sample(v: Tensor, rank: int, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Sums everything that belongs to one sample.

    Shapes: v ``[*L, *shape]`` with ``shape`` of ``rank`` dimensions; returns ``[*L, B]``, summed in ``dtype`` if one is given.
    """
    if rank == 0:  # all of the only sample
        return v.to(dtype or v.dtype).unsqueeze(-1)
    rest = [d - rank for d in range(rank) if d != batch.axis]
    found = v.sum(rest, dtype=dtype or v.dtype) if rest else v.to(dtype or v.dtype)
    if batch.factor != 1:
        found = found.unflatten(-1, (batch.outer, -1, batch.inner)).sum((-3, -1))
    return found


def spread_out(share: Tensor, rank: int, batch: Batch) -> Tensor:
    """Lays one number for each sample out so that it broadcasts over a value; the transpose of :func:`one_per_sample`.

    Shapes: share ``[*L, B]``; returns ``[*L, 1, ..., factor * B, ..., 1]`` of ``rank`` dimensions beside ``*L``.
    """
    if rank == 0:
        return share.squeeze(-1)
    if batch.factor != 1:
        parts = share.unsqueeze(-2).unsqueeze(-1)  # [*L, 1, B, 1]
        share = parts.expand([*share.shape[:-1], batch.outer, share.shape[-1], batch.inner]).flatten(-3)
    return share.reshape([*share.shape[:-1], *[1] * batch.axis, share.shape[-1], *[1] * (rank - 1 - batch.axis)])


def of_sample(value: Tensor, place: Batch, sample: int) -> Tensor:
    """What belongs to one sample: ``value[sample]`` where samples come first and alone."""
    parts = value.unflatten(place.axis, (place.outer, -1, place.inner)).select(place.axis + 1, sample)
    one = parts.flatten(place.axis, place.axis + 1)
    return one.squeeze(place.axis) if place.factor == 1 else one


def guessed(value: Tensor, fixed: int | None) -> Batch | None:
    """Reads off a value's sizes where its samples are, taken to be outermost in their dimension.

    Args:
        value: an example value with a symbolic batch, or with real sizes where the batch is fixed.
        fixed: the fixed batch size, or None if it is symbolic.

    Returns:
        None where no dimension, or more than one, grows with the batch.
    """
    sizes: list[Any] = list(value.shape)
    if not sizes and fixed == 1:
        return FIRST
    grown = []
    for axis, size in enumerate(sizes):
        if isinstance(size, torch.SymInt):
            grown += [(axis, factor)] if (factor := _times_batch(size)) else []
        elif fixed is not None and size and size % fixed == 0:
            return Batch(axis, size // fixed)
    return Batch(*grown[0]) if grown else None


def _times_batch(size: Any) -> int:
    """The factor of a symbolic size that is a multiple of the batch; 0 for any other size."""
    expression = expression_of(size)
    symbols = expression.free_symbols
    if len(symbols) != 1:
        return 0
    (symbol,) = symbols
    factor = expression.subs({symbol: 1})
    return int(factor) if expression == factor * symbol and factor.is_Integer else 0


def batches_of(graph: fx.Graph, fixed: int | None) -> dict[fx.Node, Batch]:
    """Finds where the samples are in every node's (first) result.

    Nodes keep what a trial run found; of those that passes have put in since, sizes tell it, followed through views that merge
    dimensions.
    """
    found: dict[fx.Node, Batch] = {}
    for node in graph.nodes:
        tried = node.meta.get("samples")
        if isinstance(tried, Batch):
            found[node] = tried
            continue
        value = first_result(node.meta.get("val"))
        batch = guessed(value, fixed) if isinstance(value, Tensor) else None
        if batch is not None:
            parent = next((n for n in node.all_input_nodes if n in found), None)
            found[node] = batch if parent is None or batch.factor == 1 else _merged(node, batch, parent, found[parent])
    return found


def _merged(node: fx.Node, batch: Batch, parent: fx.Node, before: Batch) -> Batch:
    """Works out how many parts of a sample lie outside the samples, in a dimension that holds more than samples."""
    sizes, previous = first_result(node.meta["val"]).shape, first_result(parent.meta["val"]).shape
    if traits_of(node.target).keeps_order:
        outside = before.outer * math.prod(int(n) for n in previous[: before.axis])
        return _whole(batch, max(1, outside // max(1, math.prod(int(n) for n in sizes[: batch.axis]))))
    grown = batch.factor // before.factor if node.target in _REPEATING else 1
    return _whole(batch, before.outer * max(1, grown))


def _whole(batch: Batch, outer: int) -> Batch:
    """The batch with so many parts outside, where its factor divides by them."""
    return Batch(batch.axis, batch.factor, outer if outer and batch.factor % outer == 0 else 1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Which positions of a value changed, in runs that each changed some samples.

    Attributes:
        axes: for each dimension that may hold samples, ``[runs, size]``: did anything change at this position?
        members: ``[runs, B]``: which samples were changed.
        seen: something changed, wherever.
    """

    axes: Mapping[int, Tensor]
    members: Tensor
    seen: bool

    def allows(self, batch: Batch) -> bool:
        """Says whether nothing changed but what belongs to the samples that were changed."""
        changed = self.axes.get(batch.axis)
        count = self.members.shape[1]
        if changed is None or changed.shape[1] != count * batch.factor:
            return False
        owner = torch.arange(count).repeat_interleave(batch.inner).repeat(batch.outer)
        return not bool((changed & ~self.members[:, owner]).any())


def fitting(evidence: Evidence, guess: Batch | None) -> Batch | None:
    """Returns where samples are: the guess if it matches the evidence, else the only match; None without a match."""
    if guess is not None and evidence.allows(guess):
        return guess
    found = [batch for batch in _candidates(evidence) if evidence.allows(batch)] if evidence.seen else []
    return found[0] if len(found) == 1 else None


def _candidates(evidence: Evidence) -> Iterator[Batch]:
    count = evidence.members.shape[1]
    for axis, changed in evidence.axes.items():
        factor, rest = divmod(changed.shape[1], count)
        if not rest:
            yield from (Batch(axis, factor, outer) for outer in range(1, factor + 1) if factor % outer == 0)


def place_of(node: fx.Node) -> str:
    """A node's module, line, source and shape, for messages."""
    origin = origin_of(node)
    return f"{origin.module or '(top level)'}   {origin.where}   {origin.source}   {describe(node.meta['val'])}"


def axes_of(value: Tensor, fixed: int | None) -> Sequence[int]:
    """The dimensions of an example value that may hold samples."""
    if fixed is None:
        return [axis for axis in range(value.dim()) if not isinstance(value.shape[axis], int)]
    return [axis for axis, size in enumerate(value.shape) if size and int(size) % fixed == 0]
