"""Locality: which cells the result of an operator can see, where it computes cell by cell, mixes axes, or moves cells.

Every function here is a :data:`~frpc.core.traits.Locality`, or makes one. A value ``[B, C, *spatial]`` has an interval of input
cells for each position of each spatial axis. A function returns None where it does not know: such a result is taken to see
everything. Operators that look through windows are in :mod:`frpc.rules.locality_windows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import Axes, Interval, Locality, Operand

__all__ = [
    "Arguments",
    "Seen",
    "along",
    "cells",
    "concatenated",
    "expanded",
    "flipped",
    "mirrored",
    "on_border",
    "only",
    "padded",
    "permuted",
    "products",
    "repeated",
    "reshaped",
    "rolled",
    "running",
    "sliced",
    "trailing",
    "written",
]

Arguments = Mapping[str, Any]
Seen = Mapping[Operand, Axes]


def only(seen: Seen, name: str) -> Axes | None:
    """What one operand sees, where no other comes from the input."""
    return seen[name] if set(seen) == {name} else None


def _joined(one: Interval, other: Interval) -> Interval:
    return torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])


def _at(interval: Interval, positions: Tensor) -> Interval:
    return interval[0][positions], interval[1][positions]


def _hull(interval: Interval, count: int) -> Interval:
    """Every one of ``count`` positions sees all that the axis sees."""
    low, high = interval
    return low.amin().expand(count), high.amax().expand(count)


# Cell by cell -----------------------------------------------------------------------------------------------------------


def cells(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Each cell sees what the cells at its place in the operands see; an axis of one cell stands for all."""
    united: list[Interval] = []
    for i, size in enumerate(shape[2:]):
        here = [axes[i] for axes in seen.values()]
        if any(len(low) not in (1, int(size)) for low, _ in here):
            return None
        low, high = here[0]
        for other in here[1:]:
            low, high = _joined((low, high), other)
        united.append((low.expand(int(size)), high.expand(int(size))))
    return tuple(united)


def expanded(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``expand``: as :func:`cells`, of the one operand."""
    return None if only(seen, "self") is None else cells(arguments, seen, shape)


def reshaped(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Reshapes that leave the spatial axes alone, and move channels or samples at most."""
    axes = only(seen, "self")
    same = axes is not None and all(len(low) == int(size) for (low, _), size in zip(axes, shape[2:], strict=True))
    return axes if same else None


def permuted(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Permutations that leave each spatial axis where it is."""
    rank = len(shape)
    if "dims" in arguments:
        order = [d % rank for d in arguments["dims"]]
    elif "dim0" in arguments:
        order = list(range(rank))
        first, second = arguments["dim0"] % rank, arguments["dim1"] % rank
        order[first], order[second] = order[second], order[first]
    else:
        return None
    return only(seen, "self") if order[2:] == list(range(2, rank)) else None


# Mixed along axes -------------------------------------------------------------------------------------------------------


def _mixed(axes: Axes, dims: Sequence[int], shape: Sequence[Any]) -> Axes | None:
    mixed: list[Interval] = []
    for i, (interval, size) in enumerate(zip(axes, shape[2:], strict=True)):
        if i + 2 in dims:
            mixed.append(_hull(interval, int(size)))
        elif len(interval[0]) == int(size):
            mixed.append(interval)
        else:
            return None
    return tuple(mixed)


def along(name: str) -> Locality:
    """The result mixes what lies along some dimensions, named by an argument, and nothing else; none named means all."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, dims, rank = only(seen, "self") or only(seen, "input"), arguments[name], len(shape)
        if axes is None:
            return None
        named = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims) or list(range(rank))
        return _mixed(axes, [d % rank for d in named], shape)

    return locality


def trailing(name: str) -> Locality:
    """The result mixes what lies along the last dimensions, as many as an argument has sizes."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, rank = only(seen, "input"), len(shape)
        return None if axes is None else _mixed(axes, range(rank - len(arguments[name]), rank), shape)

    return locality


def running(name: str) -> Locality:
    """Each position sees what lies before it along a dimension, and itself."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, axis = only(seen, "self"), arguments[name] % len(shape) - 2
        if axes is None:
            return None
        return tuple(
            (low.cummin(0).values, high.cummax(0).values) if i == axis else (low, high) for i, (low, high) in enumerate(axes)
        )

    return locality


def products(right: str) -> Locality:
    """Products of matrices with a constant: what is multiplied from the right is mixed along its last axis, what is multiplied
    from the left along the one before. ``right`` names the factor on the right."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        left, rank = only(seen, "input") or only(seen, "self"), len(shape)
        if left is not None:
            return _mixed(left, [rank - 1], shape)
        axes = only(seen, right) if right != "weight" else None
        return None if axes is None else _mixed(axes, [rank - 2], shape)

    return locality


# Moved about ------------------------------------------------------------------------------------------------------------


def sliced(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``slice``."""
    axes, rank = only(seen, "self"), len(shape)
    if axes is None:
        return None
    cut = slice(arguments["start"], arguments["end"], arguments["step"])
    axis = arguments["dim"] % rank - 2
    return tuple((low[cut], high[cut]) if i == axis else (low, high) for i, (low, high) in enumerate(axes))


def written(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``slice_scatter``: the source inside the slice, the operand outside it."""
    axis = arguments["dim"] % len(shape) - 2
    if axis < 0:
        return cells(arguments, seen, shape) if set(seen) == {"self", "src"} else None
    if set(seen) != {"self", "src"}:
        return None
    cut, out = slice(arguments["start"], arguments["end"], arguments["step"]), []
    for i, (here, there) in enumerate(zip(seen["self"], seen["src"], strict=True)):
        if i == axis:
            low, high = here[0].clone(), here[1].clone()
            low[cut], high[cut] = there
            out.append((low, high))
        else:
            out.append(_joined(here, there))
    return tuple(out)


def concatenated(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``cat``: along channels each cell sees what it sees in any operand; along a spatial axis the operands follow each other."""
    axis = arguments["dim"] % len(shape) - 2
    if axis < 0:
        return cells(arguments, seen, shape)
    out: list[Interval] = []
    for i in range(len(shape) - 2):
        if i == axis:
            out.append(_one_behind_another(arguments["tensors"], seen, axis))
        else:
            parts = [axes[i] for axes in seen.values()]
            low, high = parts[0]
            for part in parts[1:]:
                low, high = _joined((low, high), part)
            out.append((low, high))
    return tuple(out)


def _one_behind_another(tensors: Sequence[Any], seen: Seen, axis: int) -> Interval:
    """The intervals of operands along the axis they follow each other on; constants count as the cell they lie next to."""
    lows, highs, places, start = [], [], [], 0
    for k, tensor in enumerate(tensors):
        size = int(tensor.shape[axis + 2])
        if ("tensors", k) in seen:
            low, high = seen["tensors", k][axis]
            lows.append(low)
            highs.append(high)
            places.append(torch.arange(start, start + size))
        start += size
    known = torch.cat(places)
    nearest = (torch.arange(start)[:, None] - known[None]).abs().argmin(1)
    return torch.cat(lows)[nearest], torch.cat(highs)[nearest]


def flipped(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``flip``."""
    axes, dims = only(seen, "self"), [d % len(shape) for d in arguments["dims"]]
    if axes is None:
        return None
    return tuple((low.flip(0), high.flip(0)) if i + 2 in dims else (low, high) for i, (low, high) in enumerate(axes))


def rolled(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``roll`` along named dimensions; without names it rolls the flattened tensor."""
    axes, shifts, dims = only(seen, "self"), arguments["shifts"], arguments["dims"]
    if axes is None or not dims:
        return None
    shift = dict.fromkeys(range(len(axes)), 0)
    for s, d in zip([shifts] if isinstance(shifts, int) else shifts, [dims] if isinstance(dims, int) else dims, strict=True):
        if d % len(shape) >= 2:
            shift[d % len(shape) - 2] += s
    return tuple((low.roll(shift[i]), high.roll(shift[i])) for i, (low, high) in enumerate(axes))


def repeated(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``repeat``."""
    axes = only(seen, "self")
    if axes is None or len(arguments["repeats"]) != len(shape):
        return None
    times = arguments["repeats"][2:]
    return tuple((low.repeat(n), high.repeat(n)) for (low, high), n in zip(axes, times, strict=True))


def _margins(padding: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Cells in front of and behind each axis: ``pad`` lists them from the last axis on."""
    pairs = [(padding[k], padding[k + 1]) for k in range(0, min(len(padding), 2 * count), 2)]
    return [*[(0, 0)] * (count - len(pairs)), *reversed(pairs)]


def padded(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Constant padding: padded cells count as the border cell they lie at. Negative padding cuts."""
    axes = only(seen, "self")
    return None if axes is None else _on_border(arguments["pad"], axes)


def on_border(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Replication padding: padded cells are the border cell."""
    axes = only(seen, "self")
    return None if axes is None else _on_border(arguments["padding"], axes)


def _on_border(padding: Sequence[int], axes: Axes) -> Axes:
    out = []
    for interval, (before, after) in zip(axes, _margins(padding, len(axes)), strict=True):
        n = len(interval[0])
        out.append(_at(interval, (torch.arange(n + before + after) - before).clamp(0, n - 1)))
    return tuple(out)


def mirrored(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Reflection padding: cell -i is cell i."""
    axes = only(seen, "self")
    if axes is None:
        return None
    out = []
    for interval, (before, after) in zip(axes, _margins(arguments["padding"], len(axes)), strict=True):
        last = len(interval[0]) - 1
        positions = (torch.arange(last + 1 + before + after) - before).abs()
        out.append(_at(interval, last - (last - positions).abs()))
    return tuple(out)
