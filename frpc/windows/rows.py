"""Forward carry in receptive-field windows: every neuron's map at about the price of one forward pass.

The local part of a neuron's map lives in its receptive field. Position ``i`` of a layer keeps a window of ``side`` input cells
whose corner is ``i * jump + offset``; jump, offset and side are known before anything runs (method: windows). A convolution
is then, for each kernel tap, one matrix product over channels, added at a shifted place in the window; max pooling selects
windows and shifts them; an activation multiplies by its coefficient; sums and concatenations align windows and unite them.

Layers are produced row by row. Every operator computes a row on demand, from rows of its operands, and keeps it only until no
later row needs it: a layer far larger than memory streams through, and nothing is computed twice.

Shapes: a row is ``[B, C, w, Rh, Rw]``: the windows of ``w`` neighbouring positions of one row of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "ChannelRows",
    "ConcatRows",
    "FramedRows",
    "Grid",
    "Grids",
    "PointRows",
    "Rows",
    "SettledRows",
    "SourceRows",
    "Span",
    "SumRows",
    "blank_row",
]


@dataclass(frozen=True)
class Grid:
    """Windows along one axis: position ``i`` sees the cells ``[i * jump + offset, i * jump + offset + side)``."""

    jump: int
    offset: int
    side: int

    def taps(self, kernel: int, stride: int, padding: int, dilation: int) -> Grid:
        """The windows after a sliding kernel: ``s' = s t, o' = o - p s, r' = r + (k - 1) d s``."""
        reach = (kernel - 1) * dilation * self.jump
        return Grid(self.jump * stride, self.offset - padding * self.jump, self.side + reach)

    def unite(self, other: Grid) -> Grid:
        """The smallest windows that hold both."""
        low = min(self.offset, other.offset)
        high = max(self.offset + self.side, other.offset + other.side)
        return Grid(self.jump, low, high - low)


Grids = tuple[Grid, Grid]
Span = tuple[int, int]


class Rows:
    """Produces the rows of windows of one value.

    Attributes:
        operands: what it is computed from.
        grids: windows along rows and columns.
        size: channels, rows and columns of the value, ``(C, H, W)``.
        uses: how many others compute from it.
        span: the columns asked for in this run.
    """

    def __init__(self, operands: Sequence[Rows], grids: Grids, size: tuple[int, int, int]) -> None:
        self.operands, self.grids, self.size = tuple(operands), grids, size
        self.uses = 0
        self.span: Span = (0, size[2])
        self._kept: dict[int, Tensor] = {}
        for operand in operands:
            operand.uses += 1
            first, last = self.needs_rows(0)
            operand.lookback = max(operand.lookback, float(last - first))

    def row(self, i: int) -> Tensor:
        """Returns row ``i``, ``[B, C, w, Rh, Rw]``; it must not be changed."""
        found = self._kept.get(i)
        if found is None:
            found = self._kept[i] = self.compute(i)
        return found

    def taken(self, i: int) -> Tensor:
        """Returns row ``i`` to a sole user, who may change it."""
        if self.uses > 1:
            return self.row(i).clone()
        return self._kept.pop(i) if i in self._kept else self.compute(i)

    def release(self, below: int) -> None:
        """Forgets the rows under ``below``."""
        for i in [i for i in self._kept if i < below]:
            del self._kept[i]

    def compute(self, i: int) -> Tensor:
        """Computes row ``i`` from rows of the operands."""
        raise TypeError(f"{type(self).__name__} computes no rows")

    def needs_rows(self, i: int) -> Span:
        """Which rows of the operands row ``i`` needs, possibly beyond the border."""
        return i, i + 1

    def needs_columns(self, span: Span) -> Span:
        """Which columns of the operands these columns need, possibly beyond the border."""
        return span

    def flops(self) -> float:
        """Floating-point operations for the whole value of one sample."""
        return self.row_elements() * self.size[1]

    def moved(self) -> float:
        """Elements read and written for the whole value of one sample."""
        return 2.0 * self.row_elements() * self.size[1]

    def calls(self) -> float:
        """Operator calls for the whole value."""
        return 2.0 * self.size[1]

    def row_elements(self) -> float:
        """Elements of one full row of one sample."""
        return float(self.size[0] * self.size[2] * self.grids[0].side * self.grids[1].side)

    def kept(self) -> float:
        """Elements held at one time while the layer streams: the rows its users look back on."""
        return self.row_elements() * self.lookback

    lookback = 1.0


def blank_row(like: Tensor, channels: int, width: int, grids: Grids) -> Tensor:
    """Returns a row of zeros, ``[B, C, w, Rh, Rw]``, with channels innermost in memory.

    A tap adds small windows into larger ones; with channels innermost its runs are long, and products of channels need no
    copy.
    """
    rows, columns = grids
    return like.new_zeros([like.shape[0], width, rows.side, columns.side, channels]).permute(0, 4, 1, 2, 3)


class SourceRows(Rows):
    """The input: every cell sees itself, ``[B, C, W, 1, 1]`` a row."""

    def __init__(self, x: Tensor) -> None:
        point = Grid(1, 0, 1)
        super().__init__((), (point, point), (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
        self.x = x

    def compute(self, i: int) -> Tensor:
        return self.x[:, :, i, self.span[0] : self.span[1], None, None]


class PointRows(Rows):
    """``g * a`` with a coefficient that broadcasts to ``[B, C, H, W]``; None for ``a`` itself."""

    def __init__(self, operand: Rows, coefficient: Tensor | float | None) -> None:
        super().__init__((operand,), operand.grids, operand.size)
        self.coefficient = coefficient

    def compute(self, i: int) -> Tensor:
        g = self.coefficient
        if g is None:
            return self.operands[0].row(i)
        windows = self.operands[0].taken(i) if not isinstance(self.operands[0], SourceRows) else self.operands[0].row(i).clone()
        if isinstance(g, Tensor):
            g = g if g.shape[-2] == 1 else g[..., i : i + 1, :]
            g = g if g.shape[-1] == 1 else g[..., self.span[0] : self.span[1]]
            g = g[..., 0, :, None, None]
        return windows.mul_(g)


class SettledRows(Rows):
    """Windows along one axis laid out over the whole input: where they would outgrow it, absolute places are cheaper.

    From here on the axis has jump 0: all positions share one window, the input itself.
    """

    def __init__(self, operand: Rows, axis: int, size: int) -> None:
        whole = Grid(0, 0, size)
        grids = (whole, operand.grids[1]) if axis == 0 else (operand.grids[0], whole)
        super().__init__((operand,), grids, operand.size)
        self.axis = axis

    def compute(self, i: int) -> Tensor:
        source = self.operands[0].row(i)
        out = blank_row(source, self.size[0], source.shape[2], self.grids)
        if self.axis == 0:
            inner, outer = self._overlap(i)
            out[..., outer, :] = source[..., inner, :]
            return out
        for j in range(*self.span):
            inner, outer = self._overlap(j)
            out[:, :, j - self.span[0], :, outer] = source[:, :, j - self.span[0], :, inner]
        return out

    def _overlap(self, position: int) -> tuple[slice, slice]:
        grid, size = self.operands[0].grids[self.axis], self.grids[self.axis].side
        corner = position * grid.jump + grid.offset
        low, high = max(0, corner), max(0, min(size, corner + grid.side))
        return slice(low - corner, max(low, high) - corner), slice(low, max(low, high))


class SumRows(Rows):
    """The sum of several values, their windows aligned and united."""

    def __init__(self, operands: Sequence[Rows]) -> None:
        grids = _united(operands)
        super().__init__(operands, grids, operands[0].size)

    def compute(self, i: int) -> Tensor:
        first = _placed(self.operands[0], self.operands[0].row(i), self.grids)
        out = first.clone() if first is self.operands[0].row(i) else first
        for operand in self.operands[1:]:
            _window_of(out, operand.grids, self.grids).add_(operand.row(i))
        return out


class ConcatRows(Rows):
    """Several values behind one another along the channels."""

    def __init__(self, operands: Sequence[Rows], starts: Sequence[int], size: tuple[int, int, int]) -> None:
        super().__init__(operands, _united(operands), size)
        self.starts = list(starts)

    def compute(self, i: int) -> Tensor:
        like = self.operands[0].row(i)
        out = blank_row(like, self.size[0], like.shape[2], self.grids)
        for operand, start in zip(self.operands, self.starts, strict=True):
            _window_of(out[:, start : start + operand.size[0]], operand.grids, self.grids).copy_(operand.row(i))
        return out


class ChannelRows(Rows):
    """Channels chosen or put in another order."""

    def __init__(self, operand: Rows, channels: Tensor) -> None:
        super().__init__((operand,), operand.grids, (int(channels.numel()), *operand.size[1:]))
        self.channels = channels

    def compute(self, i: int) -> Tensor:
        return self.operands[0].row(i).index_select(1, self.channels)


def _united(operands: Sequence[Rows]) -> Grids:
    rows, columns = operands[0].grids
    for operand in operands[1:]:
        rows, columns = rows.unite(operand.grids[0]), columns.unite(operand.grids[1])
    return rows, columns


def _window_of(out: Tensor, inner: Grids, outer: Grids) -> Tensor:
    """The part of the windows ``out`` that the smaller windows ``inner`` cover."""
    top, left = inner[0].offset - outer[0].offset, inner[1].offset - outer[1].offset
    return out[..., top : top + inner[0].side, left : left + inner[1].side]


def _placed(operand: Rows, row: Tensor, grids: Grids) -> Tensor:
    if operand.grids == grids:
        return row
    out = blank_row(row, operand.size[0], row.shape[2], grids)
    _window_of(out, operand.grids, grids).copy_(row)
    return out


class FramedRows(Rows):
    """A value between channels of zeros: ``start`` of them before, the rest behind."""

    def __init__(self, operand: Rows, start: int, channels: int) -> None:
        super().__init__((operand,), operand.grids, (channels, *operand.size[1:]))
        self.start = start

    def compute(self, i: int) -> Tensor:
        inner = self.operands[0].row(i)
        out = blank_row(inner, self.size[0], inner.shape[2], self.grids)
        out[:, self.start : self.start + inner.shape[1]].copy_(inner)
        return out
