"""Producers of windows: the interface of every kind, and how long it keeps its results.

The local part of a neuron's map lives in its receptive field. Position ``i`` of a layer keeps a window of ``side`` input cells
whose corner is ``i * jump + offset``; jump, offset and side are known before anything runs (method: windows).

Layers are produced in bands of rows. Every operator computes a band on demand, from bands of its operands, and keeps it only
until no later row needs it: a layer far larger than memory streams through, and nothing is computed twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

__all__ = ["Grid", "Grids", "Producer", "Span", "clipped"]


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


def clipped(span: Span, size: int) -> Span:
    """The span inside the border; where nothing of it is, the position next to it."""
    return min(max(0, span[0]), size - 1), max(1, min(size, span[1]))


class Producer:
    """Produces the windows of one value, a band of rows at a time.

    Attributes:
        operands: the producers it is computed from.
        grids: windows along rows and columns.
        size: channels, rows and columns of the value, ``(C, H, W)``.
        like: the input, for its batch, its type and its device.
        batch: samples.
        height: rows of a band.
        uses: how many others compute from it.
        lookback: rows that a reader needs at one time.
        wanted, span: the rows and columns requested in this run.
    """

    def __init__(self, operands: Sequence[Producer], grids: Grids, size: tuple[int, int, int], like: Tensor) -> None:
        self.grids, self.size, self.like = grids, size, like
        self.batch = int(like.shape[0])
        self.height = 1
        self.wanted: Span = (0, size[1])
        self.span: Span = (0, size[2])
        self._attach(operands)

    def _attach(self, operands: Sequence[Producer]) -> None:
        self.operands: tuple[Any, ...] = tuple(operands)  # each kind knows which kinds it reads
        self.uses, self.lookback = 0, 1.0
        self._readers: dict[int, int] = {}  # of a run: the lowest row that each still needs
        self._kept: dict[int, Any] = {}
        for operand in operands:
            operand.uses += 1
            needed = self.needs_rows((0, self.height))
            operand.lookback = max(operand.lookback, float(needed[1] - needed[0]))

    def over(self, operands: Sequence[Producer]) -> Self:
        """The same operator over other operands."""
        twin = copy.copy(self)
        twin._attach(operands)
        return twin

    def made(self, row: int) -> Any:
        """Returns the band that contains a row; computes it on first access."""
        start = self.band_start(row)
        stop = min(start + self.height, self.wanted[1])
        found = self._kept.get(start)
        if found is None:
            found = self._kept[start] = self.compute(start, stop)
            for operand in self.operands:  # the next band begins at ``stop``
                operand.passed(self, self.needs_rows((stop, stop + 1))[0])
        return found

    def band_start(self, row: int) -> int:
        """Returns the first row of the band that holds a row."""
        return row - (row - self.wanted[0]) % self.height

    def release(self, below: int) -> None:
        """Forgets the bands that end at row ``below`` or before."""
        for start in [start for start in self._kept if min(start + self.height, self.wanted[1]) <= below]:
            del self._kept[start]

    def begin(self, wanted: Span, span: Span, readers: Sequence[Producer]) -> None:
        """Starts a run for these rows and columns, which ``readers`` will read from the first row to the last."""
        self.wanted, self.span = wanted, span
        self._readers = {id(reader): wanted[0] for reader in readers}
        self._kept.clear()

    def passed(self, reader: Producer, low: int) -> None:
        """Frees what no reader needs any more, now that one of them needs nothing below row ``low``."""
        self._readers[id(reader)] = low
        self.release(min(self._readers.values()))

    def compute(self, first: int, last: int) -> Any:
        """Computes the rows ``[first, last)`` from rows of the operands."""
        raise TypeError(f"{type(self).__name__} computes no rows")

    def needs_rows(self, rows: Span) -> Span:
        """Which rows of the operands these rows need, possibly beyond the border."""
        return rows

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
        return 2.0 * self.bands()

    def bands(self) -> float:
        """How many bands the whole value is computed in."""
        return float(-(-self.size[1] // self.height))

    def row_elements(self) -> float:
        """Elements of one full row of one sample."""
        return float(self.size[0] * self.size[2] * self.grids[0].side * self.grids[1].side)

    def in_place(self) -> bool:
        """Says whether its bands lie where its operand's did."""
        return False

    def kept(self, span: Span) -> float:
        """Elements of one sample held at one time, in these columns: the rows its readers look back on."""
        share = (span[1] - span[0]) / self.size[2]
        return share * self.row_elements() * min(float(self.size[1]), self.lookback + self.height - 1)
