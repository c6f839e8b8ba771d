"""Windows through sliding kernels: convolution, pooling, and cuts and frames in space."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from frpc.maps import Conv, LinearPool, Select, Window
from frpc.windows.producer import Span, clipped
from frpc.windows.rows import Rows

__all__ = ["ConvRows", "CutRows", "MeanRows", "Scratch", "TapRows", "WinnerRows", "needs"]

_CHUNK = 1 << 20  # elements gathered for one product: 4 MB of float32
_LINES = 512  # but at least so many lines of it, or packing the weights would cost more than the product

Line = tuple[int, int, int, int]


class Tap(NamedTuple):
    """One place of a kernel along an axis, and the positions where it lies inside the border.

    Attributes:
        shift: how far it moves windows.
        theirs, ours: positions of the operand and own ones, counted in the bands at hand.
    """

    tap: int
    shift: int
    theirs: slice
    ours: slice


class TapRows(Rows):
    """Base of sliding kernels.

    Args:
        geometry: ``(kernel, stride, padding, dilation)`` along rows and along columns.
    """

    def __init__(self, operand: Rows, geometry: Window, size: tuple[int, int, int]) -> None:
        rows, columns = geometry
        grids = (operand.grids[0].taps(*rows), operand.grids[1].taps(*columns))
        self.geometry = (rows, columns)
        super().__init__((operand,), grids, size)

    def needs_rows(self, rows: Span) -> Span:
        return needs(self.geometry[0], rows)

    def needs_columns(self, span: Span) -> Span:
        return needs(self.geometry[1], span)

    def strips(self, first: int, last: int) -> Iterator[tuple[slice, list[Reach]]]:
        """Yields own rows, counted from ``first``, with the taps along rows that reach into the operand from them.

        Where the operand's rows are few, all of them at once; where they are large, row by row, so that none is copied to lie
        beside the others.
        """
        operand = self.operands[0]
        low, high = clipped(self.needs_rows((first, last)), operand.size[1])
        if operand.small(high - low):
            source = operand.band(low, high)
            yield slice(0, last - first), [Reach(tap, source) for tap in self.taps(0, (first, last), (low, high))]
            return
        for i in range(first, last):
            for row in range(*clipped(self.needs_rows((i, i + 1)), operand.size[1])):
                operand.made(row)  # one after another, or a dilated kernel would ask for a row after its turn
            reached = self.taps(0, (i, i + 1), (low, high))
            bands = [operand.band(low + tap.theirs.start, low + tap.theirs.start + 1) for tap in reached]
            here = [Reach(tap._replace(theirs=slice(0, 1)), band) for tap, band in zip(reached, bands, strict=True)]
            yield slice(i - first, i - first + 1), here

    def pairs(self, out: Tensor, first: int, last: int) -> Iterator[tuple[Tensor, Tensor, Tap, Tap]]:
        """Yields, for every pair of taps, the part of a band it writes, the operand's part it reads, and the taps.

        Taps along rows count own rows from ``first`` on.
        """
        across = self.taps(1, self.span, self.operands[0].span)
        rh, rw = (g.side for g in self.operands[0].grids)
        for rows, reached in self.strips(first, last):
            for down, source in reached:
                ours = slice(rows.start + down.ours.start, rows.start + down.ours.stop)
                for right in across:
                    windows = (slice(down.shift, down.shift + rh), slice(right.shift, right.shift + rw))
                    part = out[:, :, ours, right.ours, *windows]
                    yield part, source[:, :, down.theirs, right.theirs], down._replace(ours=ours), right

    def taps(self, axis: int, mine: Span, theirs: Span) -> list[Tap]:
        """Returns the taps that reach from own positions ``mine`` into the operand's ``theirs``."""
        k, t, p, d = self.geometry[axis]
        found = []
        for tap in range(k):
            first = max(mine[0], -((theirs[0] + p - tap * d) // -t))
            last = min(mine[1], (theirs[1] - 1 + p - tap * d) // t + 1)
            if first < last:
                start = first * t - p + tap * d - theirs[0]
                reach = slice(start, start + (last - first - 1) * t + 1, t)
                found.append(Tap(tap, tap * d * self.operands[0].grids[axis].jump, reach, slice(first - mine[0], last - mine[0])))
        return found


class Reach(NamedTuple):
    """A tap along rows, and the operand's rows it reaches into, ``[B, C, h', w', rh, rw]``."""

    tap: Tap
    source: Tensor


def needs(line: Line, span: Span) -> Span:
    k, t, p, d = line
    return span[0] * t - p, (span[1] - 1) * t - p + (k - 1) * d + 1


class Piece(NamedTuple):
    """Cells ``[low, high)`` of windows along one axis that the same taps, ``[first, last)``, write."""

    low: int
    high: int
    first: int
    last: int


def pieces(kernel: int, shift: int, inner: int, outer: int) -> list[Piece]:
    """Splits windows of side ``outer`` where the windows of side ``inner`` of a kernel's taps begin and end.

    Args:
        shift: cells from one tap's window to the next one's.
    """
    ends = sorted({0, outer} | {b * shift + edge for b in range(kernel) for edge in (0, inner)})
    found = []
    for low, high in pairwise(ends):
        covering = [b for b in range(kernel) if b * shift <= low and high <= b * shift + inner]
        found.append(Piece(low, high, covering[0], covering[-1] + 1) if covering else Piece(low, high, 0, 0))
    return found


class ConvRows(TapRows):
    """``U'[c', i', j'] += K[c', c, a, b] U[c, i' t + a d - p, j' t + b d - p]``, shifted by ``(a, b) d s`` in the window.

    Windows split into rectangles of cells that the same taps write. Each is one matrix product: the operand's cells of all its
    taps side by side, times the kernel's part. Every cell of the result is written once, and nothing is added in memory.
    """

    def __init__(self, operand: Rows, conv: Conv, size: tuple[int, int, int]) -> None:
        weight = conv.weight if conv.weight.dim() == 4 else conv.weight.unsqueeze(2)
        lines = list(zip(weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=False))
        if conv.weight.dim() == 3:
            lines = [(1, 1, 0, 1), (int(weight.shape[3]), conv.stride[0], conv.padding[0], conv.dilation[0])]
        super().__init__(operand, [tuple(int(v) for v in line) for line in lines], size)  # type: ignore[misc]
        g = conv.groups
        self.weight = weight.reshape(g, -1, *weight.shape[1:]).permute(0, 3, 4, 2, 1).contiguous()  # [G, kh, kw, C/G, C'/G]
        self.groups, self.kernel = g, weight

    def compute(self, first: int, last: int) -> Tensor:
        if self.weight.shape[3] == self.weight.shape[4] == 1:
            return self._depthwise(first, last)
        out = self.blank(last - first, zeros=False)
        scratch = Scratch(out)
        for rows, reached in self.strips(first, last):
            down = {reach.tap.tap: reach for reach in reached}
            for top in self._pieces(0):
                here = [down[a] for a in range(top.first, top.last) if a in down]
                for left in self._pieces(1):
                    cells = out[:, :, rows, :, top.low : top.high, left.low : left.high].permute(0, 2, 3, 4, 5, 1)
                    if here and left.first < left.last:
                        self._product(cells, here, top.low, left, scratch)
                    else:
                        cells.zero_()
        return out

    def _depthwise(self, first: int, last: int) -> Tensor:
        """One channel to one channel: a coefficient for each channel and tap."""
        out = self.blank(last - first)
        for part, source, down, right in self.pairs(out, first, last):
            part.addcmul_(source, self.weight[:, down.tap, right.tap].reshape(-1, 1, 1, 1, 1))
        return out

    def _pieces(self, axis: int) -> list[Piece]:
        k, _, _, d = self.geometry[axis]
        inner = self.operands[0].grids[axis]
        return pieces(k, d * inner.jump, inner.side, self.grids[axis].side)

    def _product(self, out: Tensor, down: list[Reach], top: int, left: Piece, scratch: Scratch) -> None:
        """Writes the cells that the taps ``down`` and ``[left.first, left.last)`` reach.

        Shapes: out ``[B, h, w, height, width, C']``, the cells from ``(top, left.low)`` on.
        """
        reached = slice(down[0].tap.tap, down[-1].tap.tap + 1)
        matrix = self.weight[:, reached, left.first : left.last].flatten(1, 3)  # [G, taps C/G, C'/G]
        batch, h, w, height, width, _ = out.shape
        lines = max(_LINES, _CHUNK // (self.groups * int(matrix.shape[1])))
        columns = max(1, min(w, lines // (batch * h * height * width)))
        tall = max(1, min(height, lines // (batch * h * columns * width)))
        for low in range(0, w, columns):
            high = min(low + columns, w)
            right = self.taps(1, (self.span[0] + low, self.span[0] + high), self.operands[0].span)
            across = {tap.tap: tap for tap in right}
            for start in range(0, height, tall):
                part = out[:, :, low:high, start : start + tall]
                shape = [*part.shape[:5], self.groups, len(down), left.last - left.first, -1]
                gathered = scratch.take(0, part[..., 0].numel() * self.groups * int(matrix.shape[1])).view(shape)
                for k, reach in enumerate(down):
                    for b in range(left.first, left.last):
                        place = (top + start, left.low - b * self._shift(1))
                        _gather(gathered[..., k, b - left.first, :], reach, across.get(b), place)
                flat = gathered.view(-1, self.groups, matrix.shape[1])
                product = scratch.take(1, part.numel()).view(-1, self.groups, matrix.shape[2])
                if self.groups == 1:
                    torch.mm(flat[:, 0], matrix[0], out=product[:, 0])
                else:
                    torch.bmm(flat.transpose(0, 1), matrix, out=product.transpose(0, 1))
                part.copy_(product.view(part.shape))

    def _shift(self, axis: int) -> int:
        return self.geometry[axis][3] * self.operands[0].grids[axis].jump

    def taps_each(self) -> float:
        """Multiplications for one result: taps times channels of a group."""
        return float(self.weight.shape[1] * self.weight.shape[2] * self.weight.shape[3])

    def moved(self) -> float:
        taps = self.weight.shape[1] * self.weight.shape[2]
        gathered = taps * self.operands[0].row_elements() * self.size[2] / self.operands[0].size[2]
        return (3.0 * gathered + 3.0 * self.row_elements()) * self.size[1]

    def calls(self) -> float:
        down, right = ([max(1, p.last - p.first) for p in self._pieces(axis)] for axis in (0, 1))
        chunks = max(1.0, self.height * self.row_elements() * self.batch / _CHUNK)
        return self.bands() * max(sum(down) * sum(right) + 4.0 * len(down) * len(right), 8.0 * chunks)

    def flops(self) -> float:
        source = self.operands[0]
        window = source.grids[0].side * source.grids[1].side
        return 2.0 * self.taps_each() * self.size[0] * self.size[1] * self.size[2] * window


class Scratch:
    """Memory used again from one product to the next."""

    def __init__(self, like: Tensor) -> None:
        self.buffers = [like.new_empty([0]), like.new_empty([0])]

    def take(self, which: int, count: int) -> Tensor:
        if self.buffers[which].numel() < count:
            self.buffers[which] = self.buffers[which].new_empty([count])
        return self.buffers[which][:count]


def _gather(out: Tensor, reach: Reach, right: Tap | None, place: tuple[int, int]) -> None:
    """Lays the operand's cells that one tap brings to a rectangle of cells: zeros where the tap lies on the border.

    Shapes: out ``[B, h, w, height, width, G, C/G]``; ``place`` is the rectangle's corner, in the result's windows along rows, in
    the operand's along columns.
    """
    height, width = out.shape[3:5]
    down, source = reach
    if right is None:
        out.zero_()
        return
    rows, columns = down.ours, right.ours
    for border in (out[:, : rows.start], out[:, rows.stop :], out[:, :, : columns.start], out[:, :, columns.stop :]):
        if border.numel():
            border.zero_()
    top, left = place[0] - down.shift, place[1]
    cells = source[:, :, down.theirs, right.theirs, top : top + height, left : left + width].permute(0, 2, 3, 4, 5, 1)
    out[:, rows, columns].copy_(cells.unflatten(-1, out.shape[5:]))


class MeanRows(TapRows):
    """Average pooling: the windows of all taps added, over the divisor of the position."""

    def __init__(self, operand: Rows, pool: LinearPool, size: tuple[int, int, int]) -> None:
        super().__init__(operand, pool.geometry_2d(), size)
        self.inverse = pool.inverse_divisor()  # [H, W]

    def compute(self, first: int, last: int) -> Tensor:
        out = self.blank(last - first)
        for part, source, _, _ in self.pairs(out, first, last):
            part.add_(source)
        return out.mul_(self.inverse[first:last, self.span[0] : self.span[1], None, None].to(out))


class WinnerRows(TapRows):
    """Max pooling: the winner's window, moved to the place of the winning tap."""

    def __init__(self, operand: Rows, select: Select, geometry: Window, size: tuple[int, int, int]) -> None:
        super().__init__(operand, geometry, size)
        self.indices = select.indices if select.indices.dim() == 4 else select.indices.unsqueeze(2)

    def won(self, row: int, column: int, height: int, width: int, a: int, b: int) -> Tensor:
        """Says where tap (a, b) won, ``[B, C, height, width]`` from position (row, column) on."""
        (_, t, p, d), (_, tw, pw, dw) = self.geometry
        here = self.indices[:, :, row : row + height, column : column + width]
        tap_row = torch.arange(row, row + height)[:, None] * t - p + a * d
        tap_column = torch.arange(column, column + width) * tw - pw + b * dw
        inside = (tap_column >= 0) & (tap_column < self.operands[0].size[2])
        return (here == tap_row * self.operands[0].size[2] + tap_column) & inside

    def compute(self, first: int, last: int) -> Tensor:
        out = self.blank(last - first)
        low, high = self.span
        for part, source, down, right in self.pairs(out, first, last):
            won = self.won(first, low, last - first, high - low, down.tap, right.tap)[:, :, down.ours, right.ours, None, None]
            part.addcmul_(source, won.to(source.dtype))
        return out


class CutRows(TapRows):
    """A slice or a frame of zeros in space: position ``i`` is position ``i t - p`` of the operand, or nothing."""

    def compute(self, first: int, last: int) -> Tensor:
        out = self.blank(last - first)
        for part, source, _, _ in self.pairs(out, first, last):
            part.copy_(source)
        return out
