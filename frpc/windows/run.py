"""A run through producers: who needs which rows and columns, how much is held at one time, and the stream of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from frpc.windows.producer import Producer, Span, clipped
from frpc.windows.rows import Rows

__all__ = ["begin", "producers", "spans_of", "stream", "working_elements"]


def producers(layer: Producer) -> list[Producer]:
    """Returns all producers that a layer depends on, operands before results."""
    order: list[Producer] = []
    seen: set[int] = set()
    stack: list[tuple[Producer, bool]] = [(layer, False)]
    while stack:
        rows, finished = stack.pop()
        if finished:
            order.append(rows)
        elif id(rows) not in seen:
            seen.add(id(rows))
            stack.append((rows, True))
            stack.extend((operand, False) for operand in rows.operands)
    return order


def spans_of(layer: Producer, order: Sequence[Producer], wanted: Span, span: Span) -> dict[int, tuple[Span, Span]]:
    """Returns which rows and columns of every producer a run needs, from the layer back, clipped at the border."""
    needs: dict[int, tuple[Span, Span]] = {id(layer): (wanted, span)}
    for rows in reversed(order):
        if id(rows) not in needs:
            continue
        mine = needs[id(rows)]
        mine = needs[id(rows)] = (clipped(mine[0], rows.size[1]), clipped(mine[1], rows.size[2]))
        for operand in rows.operands:
            theirs = (rows.needs_rows(mine[0]), rows.needs_columns(mine[1]))
            other = needs.get(id(operand), theirs)
            needs[id(operand)] = (_hull(theirs[0], other[0]), _hull(theirs[1], other[1]))
    return needs


def begin(layer: Producer, order: Sequence[Producer], wanted: Span, span: Span) -> None:
    """Tells every producer which rows and columns this run needs, and who will read them."""
    needs = spans_of(layer, order, wanted, span)
    readers: dict[int, list[Producer]] = {}
    for rows in order:
        for operand in rows.operands if id(rows) in needs else ():
            readers.setdefault(id(operand), []).append(rows)
    for rows in order:
        if id(rows) in needs:
            rows.begin(*needs[id(rows)], readers.get(id(rows), []))


def _hull(one: Span, other: Span) -> Span:
    return min(one[0], other[0]), max(one[1], other[1])


def working_elements(layer: Producer, order: Sequence[Producer], span: Span) -> float:
    """Returns how many elements of one sample a run for these columns holds at one time.

    An activation that is the only reader of a value scales it where it lies, so that the two count once.
    """
    spans = spans_of(layer, order, (0, layer.size[1]), span)
    in_place = {id(rows.operands[0]) for rows in order if rows.in_place()}
    return sum(rows.kept(spans[id(rows)][1]) for rows in order if id(rows) not in in_place)


def stream(layer: Rows, order: Sequence[Producer], span: Span, rows: Span) -> Iterator[tuple[int, Tensor]]:
    """Yields ``(first, [B, C, h, w, Rh, Rw])``: the rows ``[*rows)`` and columns ``[*span)`` in bands, each computed once."""
    begin(layer, order, rows, span)
    first = rows[0]
    while first < rows[1]:
        last = min(first + layer.height, rows[1])
        yield first, layer.band(first, last)
        first = last
        layer.release(first)
