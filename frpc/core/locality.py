"""Locality: which cells the result of an operator can see, position by position, from what its operands see.

Every function here is a :data:`~frpc.core.traits.Locality`, or makes one. A value ``[B, C, *spatial]`` has an interval of input
cells for each position of each spatial axis. A function returns None where it does not know: such a result is taken to see
everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from frpc.core.traits import Axes, Interval, Locality, Operand

__all__ = [
    "along",
    "cells",
    "concatenated",
    "expanded",
    "flipped",
    "mirrored",
    "on_border",
    "padded",
    "permuted",
    "pixels_shuffled",
    "pixels_unshuffled",
    "products",
    "repeated",
    "reshaped",
    "resized",
    "rolled",
    "running",
    "sliced",
    "trailing",
    "windows_of_adaptive_pool",
    "windows_of_convolution",
    "windows_of_pool",
    "written",
]

Arguments = Mapping[str, Any]
Seen = Mapping[Operand, Axes]


def _only(seen: Seen, name: str) -> Axes | None:
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
    return None if _only(seen, "self") is None else cells(arguments, seen, shape)


def reshaped(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Reshapes that leave the spatial axes alone, and move channels or samples at most."""
    axes = _only(seen, "self")
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
    return _only(seen, "self") if order[2:] == list(range(2, rank)) else None


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
        axes, dims, rank = _only(seen, "self") or _only(seen, "input"), arguments[name], len(shape)
        if axes is None:
            return None
        named = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims) or list(range(rank))
        return _mixed(axes, [d % rank for d in named], shape)

    return locality


def trailing(name: str) -> Locality:
    """The result mixes what lies along the last dimensions, as many as an argument has sizes."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, rank = _only(seen, "input"), len(shape)
        return None if axes is None else _mixed(axes, range(rank - len(arguments[name]), rank), shape)

    return locality


def running(name: str) -> Locality:
    """Each position sees what lies before it along a dimension, and itself."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, axis = _only(seen, "self"), arguments[name] % len(shape) - 2
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
        left, rank = _only(seen, "input") or _only(seen, "self"), len(shape)
        if left is not None:
            return _mixed(left, [rank - 1], shape)
        axes = _only(seen, right) if right != "weight" else None
        return None if axes is None else _mixed(axes, [rank - 2], shape)

    return locality


# Moved about ------------------------------------------------------------------------------------------------------------


def sliced(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``slice``."""
    axes, rank = _only(seen, "self"), len(shape)
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
    axes, dims = _only(seen, "self"), [d % len(shape) for d in arguments["dims"]]
    if axes is None:
        return None
    return tuple((low.flip(0), high.flip(0)) if i + 2 in dims else (low, high) for i, (low, high) in enumerate(axes))


def rolled(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``roll`` along named dimensions; without names it rolls the flattened tensor."""
    axes, shifts, dims = _only(seen, "self"), arguments["shifts"], arguments["dims"]
    if axes is None or not dims:
        return None
    shift = dict.fromkeys(range(len(axes)), 0)
    for s, d in zip([shifts] if isinstance(shifts, int) else shifts, [dims] if isinstance(dims, int) else dims, strict=True):
        if d % len(shape) >= 2:
            shift[d % len(shape) - 2] += s
    return tuple((low.roll(shift[i]), high.roll(shift[i])) for i, (low, high) in enumerate(axes))


def repeated(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``repeat``."""
    axes = _only(seen, "self")
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
    axes = _only(seen, "self")
    return None if axes is None else _on_border(arguments["pad"], axes)


def on_border(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Replication padding: padded cells are the border cell."""
    axes = _only(seen, "self")
    return None if axes is None else _on_border(arguments["padding"], axes)


def _on_border(padding: Sequence[int], axes: Axes) -> Axes:
    out = []
    for interval, (before, after) in zip(axes, _margins(padding, len(axes)), strict=True):
        n = len(interval[0])
        out.append(_at(interval, (torch.arange(n + before + after) - before).clamp(0, n - 1)))
    return tuple(out)


def mirrored(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Reflection padding: cell -i is cell i."""
    axes = _only(seen, "self")
    if axes is None:
        return None
    out = []
    for interval, (before, after) in zip(axes, _margins(arguments["padding"], len(axes)), strict=True):
        last = len(interval[0]) - 1
        positions = (torch.arange(last + 1 + before + after) - before).abs()
        out.append(_at(interval, last - (last - positions).abs()))
    return tuple(out)


# Windows ----------------------------------------------------------------------------------------------------------------


def _gathered(interval: Interval, taps: Tensor, inside: Tensor) -> Interval:
    """Unites the intervals of the taps ``[positions, taps]`` that lie inside. A position without any, of padding alone, gets
    the border it lies at."""
    low, high = interval
    at = taps.clamp(0, len(low) - 1)
    new_low = torch.where(inside, low[at], torch.iinfo(torch.int64).max).amin(1)
    new_high = torch.where(inside, high[at], 0).amax(1)
    empty, edge = ~inside.any(1), at[:, 0]
    return torch.where(empty, low[edge], new_low), torch.where(empty, high[edge], new_high)


def _windows(interval: Interval, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Position i reads ``i * stride - padding + k * dilation``."""
    taps = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel)[None] * dilation
    return _gathered(interval, taps, (taps >= 0) & (taps < len(interval[0])))


def _transposed_windows(interval: Interval, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Position i of a transposed convolution gathers positions j with ``j * stride - padding + k * dilation == i``."""
    reach = torch.arange(count)[:, None] + padding - torch.arange(kernel)[None] * dilation
    at = torch.div(reach, stride, rounding_mode="floor")
    return _gathered(interval, at, (reach % stride == 0) & (at >= 0) & (at < len(interval[0])))


def windows_of_convolution(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``convolution``, transposed or not."""
    axes, kernel = _only(seen, "input"), arguments["weight"].shape[2:]
    if axes is None:
        return None
    windows = _transposed_windows if arguments["transposed"] else _windows
    count = len(axes)
    steps = [_each(arguments[name], count) for name in ("stride", "padding", "dilation")]
    return tuple(windows(axes[i], int(shape[2 + i]), int(kernel[i]), steps[0][i], steps[1][i], steps[2][i]) for i in range(count))


def windows_of_pool(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Average and max pools."""
    axes = _only(seen, "self")
    if axes is None:
        return None
    count = len(axes)
    kernel = _each(arguments["kernel_size"], count)
    stride = _each(arguments["stride"], count) or kernel
    padding, dilation = _each(arguments["padding"], count), _each(arguments.get("dilation", 1), count)
    return tuple(_windows(axes[i], int(shape[2 + i]), kernel[i], stride[i], padding[i], dilation[i]) for i in range(count))


def windows_of_adaptive_pool(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Window i of an adaptive pool covers ``floor(i n/m) .. ceil((i + 1) n/m)``."""
    axes = _only(seen, "self")
    if axes is None:
        return None
    out = []
    for interval, size in zip(axes, shape[2:], strict=True):
        n, m = len(interval[0]), int(size)
        i = torch.arange(m)
        first, behind = (i * n) // m, ((i + 1) * n + m - 1) // m
        taps = first[:, None] + torch.arange(int((behind - first).max()))[None]
        out.append(_gathered(interval, taps, taps < behind[:, None]))
    return tuple(out)


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


# Resized ----------------------------------------------------------------------------------------------------------------

Interpolation = Literal["nearest", "nearest-exact", "linear", "cubic"]


def resized(how: Interpolation) -> Locality:
    """Interpolation. Where a position falls is computed in float32 and in float64, and both count: PyTorch rounds in either."""

    def locality(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
        axes, factors = _only(seen, "input"), arguments["scale_factors"]
        if axes is None:
            return None
        out = []
        for i, (interval, size) in enumerate(zip(axes, shape[2:], strict=True)):
            factor = None if factors is None else factors[i]
            places = [
                _places(how, len(interval[0]), int(size), factor, bool(arguments.get("align_corners")), dtype)
                for dtype in (torch.float32, torch.float64)
            ]
            first, last = torch.minimum(*(f for f, _ in places)), torch.maximum(*(t for _, t in places))
            taps = first[:, None] + torch.arange(int((last - first).max()) + 1)[None]
            taps = torch.minimum(taps, last[:, None]).clamp(0, len(interval[0]) - 1)
            out.append(_gathered(interval, taps, torch.ones_like(taps, dtype=torch.bool)))
        return tuple(out)

    return locality


def _places(how: Interpolation, n: int, m: int, factor: float | None, corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first and the last of n cells that each of m positions reads, some beyond the border."""
    i = torch.arange(m, dtype=dtype)
    if corners and how in ("linear", "cubic"):
        at = i * torch.tensor((n - 1) / (m - 1) if m > 1 else 0.0, dtype=dtype)
    else:
        scale = torch.tensor(n / m if factor is None else 1.0 / factor, dtype=dtype)
        at = i * scale if how == "nearest" else (i + 0.5) * scale - (0.0 if how == "nearest-exact" else 0.5)
    if how == "linear":
        at = at.clamp(min=0.0)
    floor, between = at.floor().long(), (at != at.floor()).long()  # on a cell, that cell alone counts
    before, behind = {"nearest": (0, 0), "nearest-exact": (0, 0), "linear": (0, 1), "cubic": (1, 2)}[how]
    return floor - before * between, floor + behind * between


def pixels_shuffled(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``pixel_shuffle``: position i comes from position ``i // r``."""
    axes, r = _only(seen, "self"), arguments["upscale_factor"]
    return None if axes is None else tuple((low.repeat_interleave(r), high.repeat_interleave(r)) for low, high in axes)


def pixels_unshuffled(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``pixel_unshuffle``: position i comes from the positions ``i r .. (i + 1) r``."""
    axes, r = _only(seen, "self"), arguments["downscale_factor"]
    return None if axes is None else tuple((low.reshape(-1, r).amin(1), high.reshape(-1, r).amax(1)) for low, high in axes)
