"""Forward carry in receptive-field windows: every neuron's map at about the price of one forward pass.

A convolution moves the windows of each kernel tap to a shifted place, multiplied over channels; max pooling selects windows and
shifts them; an activation multiplies by its coefficient; sums and concatenations align windows and unite them. Small layers are
one band of rows; of large ones a band is a row.

Shapes: a band is ``[B, C, h, w, Rh, Rw]``: the windows of ``w`` neighbouring positions of ``h`` neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.windows.producer import Grid, Grids, Producer

__all__ = ["ChannelRows", "ConcatRows", "FramedRows", "PointRows", "Rows", "SettledRows", "SourceRows", "SumRows"]

_BAND = 1 << 22  # elements of a band of several rows: 16 MB of float32


class Rows(Producer):
    """Windows side by side, of the same size for every channel and position.

    Args:
        like: the input; by default that of the operands.
    """

    def __init__(
        self, operands: Sequence[Producer], grids: Grids, size: tuple[int, int, int], like: Tensor | None = None
    ) -> None:
        super().__init__((), grids, size, operands[0].like if like is None else like)
        self.height = int(max(1, min(size[1], _BAND // max(1.0, self.batch * self.row_elements()))))
        self._attach(operands)

    def band(self, first: int, last: int) -> Tensor:
        """Returns the rows ``[first, last)``, ``[B, C, h, w, Rh, Rw]``; they must not be changed."""
        parts = []
        while first < last:
            start = self.band_start(first)
            stop = min(start + self.height, self.wanted[1])
            parts.append(self.made(first)[:, :, first - start : min(last, stop) - start])
            first = stop
        return parts[0] if len(parts) == 1 else _joined(parts)

    def above(self, reader: Producer, first: int, last: int) -> Tensor:
        """Returns the rows ``[first, last)`` in the columns of a reader, where another one may need more of them."""
        low, high = (column - self.span[0] for column in reader.span)
        return self.band(first, last)[:, :, :, low:high]

    def taken(self, reader: Producer, first: int, last: int) -> Tensor:
        """Returns the same to a reader that changes it."""
        found = self.above(reader, first, last)
        return found.clone() if self.uses > 1 else found

    def compute(self, first: int, last: int) -> Tensor:
        """Computes the rows ``[first, last)`` from rows of the operands."""
        raise TypeError(f"{type(self).__name__} computes no rows")

    def blank(self, rows: int, *, zeros: bool = True) -> Tensor:
        """Returns a band for some rows and the requested columns, ``[B, C, h, w, Rh, Rw]``, with channels innermost in memory.

        A tap lays small windows into larger ones; with channels innermost its runs are long, and products of channels need no
        copy.

        Args:
            zeros: whether it is filled with zeros, or not at all.
        """
        shape = [self.batch, rows, self.span[1] - self.span[0], self.grids[0].side, self.grids[1].side, self.size[0]]
        return (self.like.new_zeros(shape) if zeros else self.like.new_empty(shape)).permute(0, 5, 1, 2, 3, 4)

    def small(self, rows: int) -> bool:
        """Says whether so many rows are few enough to lie side by side in one piece."""
        return rows * self.row_elements() * self.batch <= _BAND


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Bands one above the other, in the order they lie in memory."""
    return torch.cat([part.permute(0, 2, 3, 4, 5, 1) for part in parts], 1).permute(0, 5, 1, 2, 3, 4)


class SourceRows(Rows):
    """The input: every cell sees itself, ``[B, C, h, W, 1, 1]`` a band."""

    def __init__(self, x: Tensor) -> None:
        point = Grid(1, 0, 1)
        super().__init__((), (point, point), (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), x)
        self.x = x

    def taken(self, reader: Producer, first: int, last: int) -> Tensor:
        return self.above(reader, first, last).clone()  # the input itself must not be changed

    def compute(self, first: int, last: int) -> Tensor:
        return self.x[:, :, first:last, self.span[0] : self.span[1], None, None]


class PointRows(Rows):
    """``g * a`` with a coefficient that broadcasts to ``[B, C, H, W]``; None for ``a`` itself."""

    def __init__(self, operand: Rows, coefficient: Tensor | float | None) -> None:
        super().__init__((operand,), operand.grids, operand.size)
        self.coefficient = coefficient

    def compute(self, first: int, last: int) -> Tensor:
        g = self.coefficient
        windows = self.operands[0].taken(self, first, last)
        if g is None:
            return windows
        if isinstance(g, Tensor):
            g = g if g.shape[-2] == 1 else g[..., first:last, :]
            g = g if g.shape[-1] == 1 else g[..., self.span[0] : self.span[1]]
            g = g[..., None, None]
        return windows.mul_(g)

    def in_place(self) -> bool:
        return bool(self.operands[0].uses == 1)


class SettledRows(Rows):
    """Windows along one axis laid out over the whole input: where they would outgrow it, absolute places are cheaper.

    From here on the axis has jump 0: all positions share one window, the input itself.
    """

    def __init__(self, operand: Rows, axis: int, size: int) -> None:
        whole = Grid(0, 0, size)
        grids = (whole, operand.grids[1]) if axis == 0 else (operand.grids[0], whole)
        super().__init__((operand,), grids, operand.size)
        self.axis = axis

    def compute(self, first: int, last: int) -> Tensor:
        source = self.operands[0].above(self, first, last)
        out = self.blank(last - first)
        if self.axis == 0:
            for i in range(first, last):
                inner, outer = self._overlap(i)
                out[:, :, i - first, :, outer] = source[:, :, i - first, :, inner]
            return out
        for j in range(*self.span):
            inner, outer = self._overlap(j)
            out[:, :, :, j - self.span[0], :, outer] = source[:, :, :, j - self.span[0], :, inner]
        return out

    def _overlap(self, position: int) -> tuple[slice, slice]:
        grid, size = self.operands[0].grids[self.axis], self.grids[self.axis].side
        corner = position * grid.jump + grid.offset
        low, high = max(0, corner), max(0, min(size, corner + grid.side))
        return slice(low - corner, max(low, high) - corner), slice(low, max(low, high))


class SumRows(Rows):
    """The sum of several values, their windows aligned and united."""

    def __init__(self, operands: Sequence[Rows]) -> None:
        super().__init__(operands, _united(operands), operands[0].size)

    def compute(self, first: int, last: int) -> Tensor:
        bands = [operand.above(self, first, last) for operand in self.operands]
        out = self.blank(last - first, zeros=self.operands[0].grids != self.grids)
        _window_of(out, self.operands[0].grids, self.grids).copy_(bands[0])
        for operand, band in zip(self.operands[1:], bands[1:], strict=True):
            _window_of(out, operand.grids, self.grids).add_(band)
        return out


class ConcatRows(Rows):
    """Several values behind one another along the channels."""

    def __init__(self, operands: Sequence[Rows], starts: Sequence[int], size: tuple[int, int, int]) -> None:
        super().__init__(operands, _united(operands), size)
        self.starts = list(starts)

    def compute(self, first: int, last: int) -> Tensor:
        bands = [operand.above(self, first, last) for operand in self.operands]
        out = self.blank(last - first)
        for operand, band, start in zip(self.operands, bands, self.starts, strict=True):
            _window_of(out[:, start : start + operand.size[0]], operand.grids, self.grids).copy_(band)
        return out


class ChannelRows(Rows):
    """Channels chosen or put in another order."""

    def __init__(self, operand: Rows, channels: Tensor) -> None:
        super().__init__((operand,), operand.grids, (int(channels.numel()), *operand.size[1:]))
        self.channels = channels

    def compute(self, first: int, last: int) -> Tensor:
        return self.operands[0].above(self, first, last).index_select(1, self.channels)


def _united(operands: Sequence[Rows]) -> Grids:
    rows, columns = operands[0].grids
    for operand in operands[1:]:
        rows, columns = rows.unite(operand.grids[0]), columns.unite(operand.grids[1])
    return rows, columns


def _window_of(out: Tensor, inner: Grids, outer: Grids) -> Tensor:
    """The part of the windows ``out`` that the smaller windows ``inner`` cover."""
    top, left = inner[0].offset - outer[0].offset, inner[1].offset - outer[1].offset
    return out[..., top : top + inner[0].side, left : left + inner[1].side]


class FramedRows(Rows):
    """A value between channels of zeros: ``start`` of them before, the rest behind."""

    def __init__(self, operand: Rows, start: int, channels: int) -> None:
        super().__init__((operand,), operand.grids, (channels, *operand.size[1:]))
        self.start = start

    def compute(self, first: int, last: int) -> Tensor:
        inner = self.operands[0].above(self, first, last)
        out = self.blank(last - first)
        out[:, self.start : self.start + inner.shape[1]].copy_(inner)
        return out
