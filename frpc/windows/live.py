"""Windows of the neurons that count: where windows are large, what an activation has shut is neither computed nor kept.

Of one position only the channels are held whose windows somebody reads and that are not all zero, and of their windows only
the cells inside the input. A convolution is then, for each position and tap, one product of the operand's held windows with the
part of the kernel between held channels; taps of one cell add up at one place, since cells are counted on the input itself.
Behind a ReLU about half of the channels are held, before a pooling layer about a quarter, and at the border half of the cells.

Shapes: a line holds the positions of one row, ``[B][w]`` cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from frpc.windows.producer import Grid, Grids, Producer, Span, clipped
from frpc.windows.rows import PointRows, Rows
from frpc.windows.taps import ConvRows, Scratch, WinnerRows, needs

__all__ = ["LiveConv", "LivePoint", "LiveRows", "LiveSum", "LiveWinner", "Packed", "Unpacked"]


class Cell(NamedTuple):
    """The stored part of one position.

    Attributes:
        channels: which, ascending; None for all.
        windows: ``[h, w, A]`` over the cells of :meth:`LiveRows.rectangle`, one window for each of those channels.
    """

    channels: Tensor | None
    windows: Tensor


Line = list[list[Cell]]


class LiveRows(Producer):
    """Producer of lines.

    Attributes:
        cells: rows and columns of the input.
        held: which windows are held, ``[B, C, H, W]``; None for all.
    """

    def __init__(
        self, operands: Sequence[Producer], grids: Grids, size: tuple[int, int, int], cells: tuple[int, int], held: Tensor | None
    ) -> None:
        super().__init__(operands, grids, size, operands[0].like)
        self.cells, self.held = cells, held

    def line(self, row: int) -> Line:
        """Returns the stored windows of a row's positions, from the first requested column; they must not be changed."""
        found: Line = self.made(row)
        return found

    def above(self, reader: Producer, row: int) -> list[list[tuple[int, Cell]]]:
        """Returns the positions of a row in a reader's columns, each with its column."""
        return [[(j, cells[j - self.span[0]]) for j in range(*reader.span)] for cells in self.line(row)]

    def channels(self, sample: int, row: int, column: int) -> Tensor | None:
        """Which channels of a position are held."""
        return None if self.held is None else self.held[sample, :, row, column].nonzero().flatten()

    def rectangle(self, row: int, column: int) -> tuple[int, int, int, int]:
        """The part of the input that windows at a position cover: ``(top, bottom, left, right)``."""
        (top, bottom), (left, right) = (_covered(g, i, n) for g, i, n in zip(self.grids, (row, column), self.cells, strict=True))
        return top, bottom, left, right

    def fresh(self, sample: int, row: int, column: int) -> Cell:
        """Zeros for a position."""
        top, bottom, left, right = self.rectangle(row, column)
        channels = self.channels(sample, row, column)
        count = self.size[0] if channels is None else int(channels.numel())
        return Cell(channels, self.like.new_zeros([bottom - top, right - left, count]))

    def inside(self, out: Tensor, place: tuple[int, int], part: tuple[int, int, int, int]) -> Tensor:
        """The part of windows at ``place`` that lies over the rectangle ``part`` of the input."""
        top, _, left, _ = self.rectangle(*place)
        return out[part[0] - top : part[1] - top, part[2] - left : part[3] - left]

    def counts(self) -> Tensor:
        """How many windows are held at each position, ``[B, H, W]``."""
        if self.held is None:
            return torch.full([self.batch, *self.size[1:]], float(self.size[0]), dtype=torch.float64)
        return self.held.sum(1).double()

    def areas(self) -> Tensor:
        """How many cells a window has at each position, ``[H, W]``."""
        lengths = []
        for grid, positions, size in zip(self.grids, self.size[1:], self.cells, strict=True):
            spans = [_covered(grid, i, size) for i in range(positions)]
            lengths.append(torch.tensor([float(high - low) for low, high in spans], dtype=torch.float64))
        return lengths[0][:, None] * lengths[1]

    def row_elements(self) -> float:
        return float((self.counts() * self.areas()).sum()) / (self.batch * self.size[1])


def _covered(grid: Grid, position: int, size: int) -> Span:
    """The cells of one axis that a window covers."""
    corner = position * grid.jump + grid.offset
    low = min(max(0, corner), size)
    return low, max(low, min(size, corner + grid.side))


class Packed(LiveRows):
    """Windows that lie side by side, as lines: every channel, without the cells beyond the border."""

    def __init__(self, operand: Rows, cells: tuple[int, int]) -> None:
        super().__init__((operand,), operand.grids, operand.size, cells, None)

    def compute(self, first: int, last: int) -> Line:
        band = self.operands[0].above(self, first, last)[:, :, 0].permute(0, 2, 3, 4, 1)  # [B, w, Rh, Rw, C]
        return [
            [Cell(None, self._clipped(band[b, j], first, self.span[0] + j)) for j in range(band.shape[1])]
            for b in range(self.batch)
        ]

    def _clipped(self, windows: Tensor, row: int, column: int) -> Tensor:
        top, bottom, left, right = self.rectangle(row, column)
        corners = [i * g.jump + g.offset for g, i in zip(self.grids, (row, column), strict=True)]
        return windows[top - corners[0] : bottom - corners[0], left - corners[1] : right - corners[1]].contiguous()

    def in_place(self) -> bool:
        return False


class Unpacked(Rows):
    """Lines as windows side by side, with zeros for what is not stored."""

    def __init__(self, operand: LiveRows, grids: Grids) -> None:
        super().__init__((operand,), grids, operand.size)

    def compute(self, first: int, last: int) -> Tensor:
        out = self.blank(last - first)
        lines = out.permute(0, 2, 3, 4, 5, 1)  # [B, h, w, Rh, Rw, C]
        for row in range(first, last):
            for sample, line in enumerate(self.operands[0].above(self, row)):
                for column, cell in line:
                    self._place(lines[sample, row - first, column - self.span[0]], cell, row, column)
        return out

    def _place(self, out: Tensor, cell: Cell, row: int, column: int) -> None:
        top, bottom, left, right = self.operands[0].rectangle(row, column)
        corners = [i * g.jump + g.offset for g, i in zip(self.grids, (row, column), strict=True)]
        part = out[top - corners[0] : bottom - corners[0], left - corners[1] : right - corners[1]]
        if cell.channels is None:
            part.copy_(cell.windows)
        else:
            part.index_copy_(-1, cell.channels, cell.windows)


class LiveConv(LiveRows):
    """``U'[c', p] = sum over taps and held c of K[c', c, tap] U[c, p + tap]``, for the channels c' that are held."""

    def __init__(self, operand: LiveRows, conv: ConvRows, held: Tensor | None) -> None:
        self.geometry = conv.geometry
        grids = (operand.grids[0].taps(*conv.geometry[0]), operand.grids[1].taps(*conv.geometry[1]))
        super().__init__((operand,), grids, conv.size, operand.cells, held)
        self.by_input = conv.weight[0]  # [kh, kw, C, C']
        self.by_output = self.by_input.transpose(2, 3).contiguous()

    def needs_rows(self, rows: Span) -> Span:
        return needs(self.geometry[0], rows)

    def needs_columns(self, span: Span) -> Span:
        return needs(self.geometry[1], span)

    def compute(self, first: int, last: int) -> Line:
        operand = self.operands[0]
        lines = {i: operand.line(i) for i in range(*clipped(self.needs_rows((first, last)), operand.size[1]))}
        scratch = Scratch(self.like)
        return [[self._cell(lines, b, first, j, scratch) for j in range(*self.span)] for b in range(self.batch)]

    def _reached(self, axis: int, position: int) -> list[tuple[int, int]]:
        """``(tap, position of the operand)`` along one axis."""
        k, t, p, d = self.geometry[axis]
        places = [(tap, position * t - p + tap * d) for tap in range(k)]
        return [(tap, place) for tap, place in places if 0 <= place < self.operands[0].size[1 + axis]]

    def _cell(self, lines: dict[int, Line], sample: int, row: int, column: int, scratch: Scratch) -> Cell:
        operand, out = self.operands[0], self.fresh(sample, row, column)
        if not out.windows.numel():
            return out
        wanted = None if out.channels is None else self.by_output.index_select(2, out.channels)  # [kh, kw, A', C]
        for a, i in self._reached(0, row):
            for b, j in self._reached(1, column):
                cell = lines[i][sample][j - operand.span[0]]
                kernel = _between(self.by_input[a, b], None if wanted is None else wanted[a, b], cell.channels)
                part = self.inside(out.windows, (row, column), operand.rectangle(i, j))
                product = scratch.take(0, part.numel()).view(-1, part.shape[2])
                part.add_(torch.mm(cell.windows.flatten(0, 1), kernel, out=product).view(part.shape))
        return out

    def _cells_read(self) -> Tensor:
        """Held windows' cells that reach each position over all taps, ``[B, H, W]``."""
        operand = self.operands[0]
        (kh, t, p, d), (kw, tw, pw, dw) = self.geometry
        work = (operand.counts() * operand.areas())[:, None]
        taps = F.conv2d(work, work.new_ones([1, 1, kh, kw]), None, (t, tw), (p, pw), (d, dw))
        return taps[:, 0, : self.size[1], : self.size[2]]

    def flops(self) -> float:
        return 2.0 * float((self._cells_read() * self.counts()).sum()) / self.batch

    def moved(self) -> float:
        channels = self.operands[0].counts().mean()
        written = self._cells_read() / channels.clamp(min=1) * self.counts()  # each tap's product is written, read and added
        return 4.0 * float(written.sum()) / self.batch + float(self._cells_read().sum()) / self.batch

    def calls(self) -> float:
        taps = self.geometry[0][0] * self.geometry[1][0]
        return float(self.batch * self.size[1] * self.size[2] * (4.0 * taps + 4.0))


def _between(by_input: Tensor, wanted: Tensor | None, held: Tensor | None) -> Tensor:
    """The kernel of one tap between held channels, ``[A, A']``.

    Args:
        by_input: ``[C, C']``.
        wanted: the rows of its transpose that are wanted, ``[A', C]``, or None for all.
        held: which input channels are held.
    """
    if wanted is None:
        return by_input if held is None else by_input.index_select(0, held)
    return (wanted if held is None else wanted.index_select(1, held)).t()


class LivePoint(LiveRows):
    """``g * a`` for the channels whose coefficient is not 0."""

    def __init__(self, operand: LiveRows, point: PointRows, held: Tensor | None) -> None:
        super().__init__((operand,), operand.grids, operand.size, operand.cells, held)
        g = point.coefficient
        self.coefficient = 1.0 if g is None else g
        self.passes = g is None or (isinstance(g, Tensor) and bool(((g == 0) | (g == 1)).all()))
        self.same = held is operand.held or (held is not None and operand.held is not None and torch.equal(held, operand.held))

    def compute(self, first: int, last: int) -> Line:
        found = self.operands[0].above(self, first)
        return [[self._cell(cell, sample, first, column) for column, cell in line] for sample, line in enumerate(found)]

    def _cell(self, cell: Cell, sample: int, row: int, column: int) -> Cell:
        channels = cell.channels if self.same else self.channels(sample, row, column)
        windows = cell.windows if self.same else _picked(cell, channels)
        if self.passes:
            return Cell(channels, windows)
        g = self.coefficient
        if isinstance(g, Tensor):
            b, i, j = (at if n > 1 else 0 for at, n in zip((sample, row, column), (g.shape[0], *g.shape[2:]), strict=True))
            g = g[b, :, i, j]
            g = g if channels is None or g.numel() == 1 else g[channels]
        return Cell(channels, windows * g)

    def in_place(self) -> bool:
        return self.passes and self.same


def _picked(cell: Cell, channels: Tensor | None) -> Tensor:
    """The windows of some channels out of those that are held."""
    if channels is None:
        return cell.windows
    where = channels if cell.channels is None else torch.searchsorted(cell.channels, channels)
    return cell.windows.index_select(2, where)


class LiveSum(LiveRows):
    """The sum of several values over the rectangle that holds their windows."""

    def __init__(self, operands: Sequence[LiveRows], held: Tensor | None) -> None:
        cells = operands[0].cells
        rows, columns = (_hull([o.grids[axis] for o in operands], cells[axis]) for axis in (0, 1))
        super().__init__(operands, (rows, columns), operands[0].size, cells, held)

    def compute(self, first: int, last: int) -> Line:
        lines = [operand.line(first) for operand in self.operands]
        return [[self._cell(lines, b, first, j) for j in range(*self.span)] for b in range(self.batch)]

    def _cell(self, lines: Sequence[Line], sample: int, row: int, column: int) -> Cell:
        out = self.fresh(sample, row, column)
        for operand, line in zip(self.operands, lines, strict=True):
            cell = line[sample][column - operand.span[0]]
            part = self.inside(out.windows, (row, column), operand.rectangle(row, column))
            _add_held(part, out.channels, cell)
        return out


def _hull(grids: Sequence[Grid], size: int) -> Grid:
    """The smallest windows that contain several; the whole input if their steps differ."""
    if len({g.jump for g in grids}) > 1:
        return Grid(0, 0, size)
    united = grids[0]
    for grid in grids[1:]:
        united = united.unite(grid)
    return united


def _add_held(out: Tensor, channels: Tensor | None, cell: Cell) -> None:
    """Adds windows where both sides hold the channel; what only the operand holds nobody reads."""
    if channels is None:
        if cell.channels is None:
            out.add_(cell.windows)
        else:
            out.index_add_(2, cell.channels, cell.windows)
    elif cell.channels is None:
        out.add_(cell.windows.index_select(2, channels))
    else:
        common = torch.isin(channels, cell.channels)
        where = torch.searchsorted(cell.channels, channels[common])
        out.index_add_(2, common.nonzero().flatten(), cell.windows.index_select(2, where))


class LiveWinner(LiveRows):
    """Max pooling: of each held channel the winner's window."""

    def __init__(self, operand: LiveRows, winner: WinnerRows, held: Tensor) -> None:
        self.geometry, self.indices = winner.geometry, winner.indices
        grids = (operand.grids[0].taps(*winner.geometry[0]), operand.grids[1].taps(*winner.geometry[1]))
        super().__init__((operand,), grids, winner.size, operand.cells, held)

    def needs_rows(self, rows: Span) -> Span:
        return needs(self.geometry[0], rows)

    def needs_columns(self, span: Span) -> Span:
        return needs(self.geometry[1], span)

    def compute(self, first: int, last: int) -> Line:
        operand = self.operands[0]
        lines = {i: operand.line(i) for i in range(*clipped(self.needs_rows((first, last)), operand.size[1]))}
        return [[self._cell(lines, b, first, j) for j in range(*self.span)] for b in range(self.batch)]

    def _cell(self, lines: dict[int, Line], sample: int, row: int, column: int) -> Cell:
        operand, out = self.operands[0], self.fresh(sample, row, column)
        assert out.channels is not None
        winners = self.indices[sample, :, row, column][out.channels]
        for place in winners.unique().tolist():
            i, j = divmod(place, operand.size[2])
            mine = (winners == place).nonzero().flatten()
            windows = _picked(lines[i][sample][j - operand.span[0]], out.channels[mine])
            self.inside(out.windows, (row, column), operand.rectangle(i, j)).index_copy_(2, mine, windows)
        return out

    def calls(self) -> float:
        return 24.0 * self.batch * self.size[1] * self.size[2]
