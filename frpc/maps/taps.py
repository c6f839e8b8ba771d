"""Windows of pooling, tap by tap: which elements each result reads, and sums over them with separate weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frpc.core.sizes import Shape, numel
from frpc.maps.base import Compose, Cost, LinearMap, Total
from frpc.maps.pointwise import Scale
from frpc.maps.pooling import Select, Window

__all__ = ["Taps", "WindowSum"]


@dataclass(frozen=True, eq=False)
class Taps:
    """The windows of a pooling operator: which elements each of them looks at.

    Attributes:
        size: the sizes of the spatial axes of the pooled tensor.
        lines: for each axis ``[taps, positions]``: the row that a tap reads at a position; -1 outside.
        window: the step of the windows, if it is constant.
    """

    size: Sequence[int]
    lines: Sequence[Tensor]
    window: Window | None = None

    @staticmethod
    def stepping(size: Sequence[int], positions: Sequence[int], window: Window, device: torch.device) -> Taps:
        """Windows that step evenly; taps in the padding are outside."""
        lines = []
        for n, m, (kernel, stride, padding, dilation) in zip(size, positions, window, strict=True):
            first = torch.arange(m, device=device) * stride - padding
            rows = first[None] + torch.arange(kernel, device=device)[:, None] * dilation
            lines.append(torch.where((rows >= 0) & (rows < n), rows, -1))
        return Taps(size, lines, window)

    @staticmethod
    def adaptive(size: Sequence[int], positions: Sequence[int], device: torch.device) -> Taps:
        """The windows of adaptive pooling: from ``floor(i n / m)`` up to ``ceil((i + 1) n / m)``, of uneven width."""
        lines = []
        for n, m in zip(size, positions, strict=True):
            place = torch.arange(m, device=device)
            first, last = place * n // m, -((place + 1) * -n // m)
            rows = first[None] + torch.arange(-(-n // m) + 1, device=device)[:, None]
            lines.append(torch.where(rows < last, rows, -1))
        return Taps(size, lines)

    @property
    def places(self) -> Tensor:
        """Where the elements lie in the flattened spatial axes, ``[taps, *positions]``; -1 outside."""
        axes, flat, inside = len(self.lines), torch.zeros([], dtype=torch.int64), torch.ones([], dtype=torch.bool)
        for axis, (n, line) in enumerate(zip(self.size, self.lines, strict=True)):
            shape = [1] * (2 * axes)
            shape[axis], shape[axes + axis] = line.shape
            rows = line.reshape(shape)
            flat, inside = flat.to(rows) * n + rows, inside.to(rows.device) & (rows >= 0)
        return torch.where(inside, flat, -1).flatten(0, axes - 1)

    def elements(self, x: Tensor, outside: float) -> Tensor:
        """The elements of every window, ``[..., taps, *positions]`` of ``[..., *size]``, and ``outside`` at taps outside."""
        if self.window is not None and len(self.window) == 2:
            return torch.stack(self._cut(x, outside), -3)
        places = self.places
        read = x.flatten(-len(self.size)).index_select(-1, places.clamp(min=0).flatten())
        return read.unflatten(-1, list(places.shape)).masked_fill(places < 0, outside)

    def _cut(self, x: Tensor, outside: float) -> list[Tensor]:
        """The elements of every tap of windows over rows and columns."""
        assert self.window is not None
        ends = [
            max(0, (line.shape[1] - 1) * stride + dilation * (kernel - 1) + 1 - n - padding)
            for n, line, (kernel, stride, padding, dilation) in zip(self.size, self.lines, self.window, strict=True)
        ]
        (kh, sh, ph, dh), (kw, sw, pw, dw) = self.window
        h, w = (int(line.shape[1]) for line in self.lines)
        framed = torch.constant_pad_nd(x, [pw, ends[1], ph, ends[0]], outside) if any((ph, pw, *ends)) else x
        return [
            framed[..., i * dh : i * dh + (h - 1) * sh + 1 : sh, j * dw : j * dw + (w - 1) * sw + 1 : sw]
            for i in range(kh)
            for j in range(kw)
        ]

    def added(self, parts: Tensor) -> Tensor:
        """Adds up what every tap gives to the element it reads: ``[..., *size]`` of ``[..., taps, *positions]``."""
        if self.window is not None and len(self.window) == 2:
            return self._tiled(parts) if all(k == s and (p, d) == (0, 1) for k, s, p, d in self.window) else self._added(parts)
        axes, places = len(self.size), self.places
        zeros = parts.new_zeros([*parts.shape[: -axes - 1], math.prod(self.size)])
        flat = torch.where(places < 0, 0.0, parts).flatten(-axes - 1)
        return zeros.index_add(-1, places.clamp(min=0).flatten(), flat).unflatten(-1, list(self.size))

    def _tiled(self, parts: Tensor) -> Tensor:
        """Windows side by side: every element has one tap."""
        assert self.window is not None
        rank, (kh, kw) = parts.dim() - 3, (self.window[0][0], self.window[1][0])
        h, w = (int(line.shape[1]) for line in self.lines)
        tiles = parts.unflatten(-3, [kh, kw]).permute([*range(rank), rank + 2, rank, rank + 3, rank + 1])
        whole = tiles.reshape([*parts.shape[:-3], h * kh, w * kw])
        rest = [n - m for n, m in zip(self.size, (h * kh, w * kw), strict=True)]  # below 0 where the last window runs over
        return torch.constant_pad_nd(whole, [0, rest[1], 0, rest[0]]) if any(rest) else whole

    def _added(self, parts: Tensor) -> Tensor:
        assert self.window is not None
        kernel, stride, padding, dilation = ([line[k] for line in self.window] for k in range(4))
        size = [
            (line.shape[1] - 1) * s + d * (k - 1) + 1 for line, k, s, d in zip(self.lines, kernel, stride, dilation, strict=True)
        ]
        lead = parts.shape[:-3]
        samples = parts.flatten(-2).reshape([-1, lead[-1] * parts.shape[-3], parts.shape[-2] * parts.shape[-1]])
        frame = torch.ops.aten.col2im(samples, size, kernel, dilation, [0, 0], stride)
        around = [-padding[1], self.size[1] + padding[1] - size[1], -padding[0], self.size[0] + padding[0] - size[0]]
        return torch.constant_pad_nd(frame, around).reshape([*lead, *self.size])


class WindowSum(Total):
    """``z[p] = sum_t weights[t, p] a[element that tap t reads at p]``: each result is a sum over its window.

    Shapes: operand ``[B, C, *size]``, weights ``[B, C, taps, *positions]``; they are 0 at taps outside.
    """

    def __init__(self, weights: Tensor, taps: Taps, operand: Shape) -> None:
        self.weights, self.taps = weights, taps
        self.operand, self.result = operand, [*weights.shape[:2], *weights.shape[3:]]

    @property
    def parts(self) -> tuple[LinearMap, ...]:  # type: ignore[override]
        """One selection, scaled, for each tap."""
        places = self.taps.places
        inside = torch.where(places < 0, places.amax(0, keepdim=True), places)  # weight 0: any element of the window will do
        selects = [Select(p.expand([int(n) for n in self.result]), self.operand, None, self.taps.window) for p in inside]
        return tuple(Compose(s, Scale(self.weights[:, :, t], s.result)) for t, s in enumerate(selects))

    def push(self, u: Tensor) -> Tensor:
        return (self.taps.elements(u, 0.0) * self.weights).sum(-1 - len(self.taps.size))

    def pull(self, v: Tensor) -> Tensor:
        return self.taps.added(v.unsqueeze(-1 - len(self.taps.size)) * self.weights)

    def cost(self, itemsize: int = 4) -> Cost:
        size = numel(self.weights.shape)
        return Cost(2.0 * size, float((2 * size + numel(self.operand) + numel(self.result)) * itemsize))
