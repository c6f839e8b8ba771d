"""Locality of windows: which cells the result of a convolution, a pool or an interpolation can see.

The functions are as in :mod:`frpc.rules.locality`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from frpc.core.traits import Axes, Interval, Locality
from frpc.rules.locality import Arguments, Seen, only

__all__ = [
    "pixels_shuffled",
    "pixels_unshuffled",
    "resized",
    "windows_of_adaptive_pool",
    "windows_of_convolution",
    "windows_of_pool",
]

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
    axes, kernel = only(seen, "input"), arguments["weight"].shape[2:]
    if axes is None:
        return None
    windows = _transposed_windows if arguments["transposed"] else _windows
    count = len(axes)
    steps = [_each(arguments[name], count) for name in ("stride", "padding", "dilation")]
    return tuple(windows(axes[i], int(shape[2 + i]), int(kernel[i]), steps[0][i], steps[1][i], steps[2][i]) for i in range(count))


def windows_of_pool(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Average and max pools."""
    axes = only(seen, "self")
    if axes is None:
        return None
    count = len(axes)
    kernel = _each(arguments["kernel_size"], count)
    stride = _each(arguments["stride"], count) or kernel
    padding, dilation = _each(arguments["padding"], count), _each(arguments.get("dilation", 1), count)
    return tuple(_windows(axes[i], int(shape[2 + i]), kernel[i], stride[i], padding[i], dilation[i]) for i in range(count))


def windows_of_adaptive_pool(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """Window i of an adaptive pool covers ``floor(i n/m) .. ceil((i + 1) n/m)``."""
    axes = only(seen, "self")
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
        axes, factors = only(seen, "input"), arguments["scale_factors"]
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
    axes, r = only(seen, "self"), arguments["upscale_factor"]
    return None if axes is None else tuple((low.repeat_interleave(r), high.repeat_interleave(r)) for low, high in axes)


def pixels_unshuffled(arguments: Arguments, seen: Seen, shape: Sequence[Any]) -> Axes | None:
    """``pixel_unshuffle``: position i comes from the positions ``i r .. (i + 1) r``."""
    axes, r = only(seen, "self"), arguments["downscale_factor"]
    return None if axes is None else tuple((low.reshape(-1, r).amin(1), high.reshape(-1, r).amax(1)) for low, high in axes)
