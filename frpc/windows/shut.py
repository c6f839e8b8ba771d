"""Which windows count, and producers that leave out the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.windows.live import LiveConv, LivePoint, LiveRows, LiveSum, LiveWinner, Packed, Unpacked
from frpc.windows.producer import Grids, Producer
from frpc.windows.rows import PointRows, Rows, SettledRows, SumRows
from frpc.windows.run import producers
from frpc.windows.taps import ConvRows, WinnerRows

__all__ = ["needed", "skip_shut_windows"]

_LARGE = 256  # cells of a window from which a product for each position and tap costs little beside its multiplications


def skip_shut_windows(layer: Rows) -> Rows:
    """Returns producers of the same windows that compute and keep, where windows are large, only those that count."""
    order = producers(layer)
    source = order[0]
    cells = source.size[1], source.size[2]
    masks = needed(layer, order)
    made: dict[int, Producer] = {}
    for rows in order:
        made[id(rows)] = _live(rows, [made[id(o)] for o in rows.operands], masks[id(rows)], cells) or rows.over(
            [_dense(made[id(o)], o.grids) for o in rows.operands]
        )
    return _dense(made[id(layer)], layer.grids)


def _dense(rows: Producer, grids: Grids) -> Rows:
    if isinstance(rows, LiveRows):
        return Unpacked(rows, grids)
    assert isinstance(rows, Rows)
    return rows


def _live(rows: Producer, operands: Sequence[Producer], mask: Tensor | None, cells: tuple[int, int]) -> LiveRows | None:
    """The producer that holds only what counts, or None where windows are better held side by side."""
    live = [o for o in operands if isinstance(o, LiveRows)]
    if isinstance(rows, ConvRows) and rows.groups == 1:
        operand = operands[0]
        if isinstance(operand, LiveRows):
            return LiveConv(operand, rows, mask)
        taps = rows.geometry[0][0] * rows.geometry[1][0]
        area = min(cells[0], operand.grids[0].side) * min(cells[1], operand.grids[1].side)
        assert isinstance(operand, Rows)
        return LiveConv(Packed(operand, cells), rows, mask) if taps > 1 and area >= _LARGE else None
    if not live or len(live) < len(operands):
        return None
    if isinstance(rows, SettledRows):
        return live[0]
    if isinstance(rows, PointRows):
        return LivePoint(live[0], rows, _both(_both(mask, _nonzero(rows)), live[0].held))
    if isinstance(rows, SumRows):
        return LiveSum(live, mask)
    if isinstance(rows, WinnerRows):
        return LiveWinner(live[0], rows, _won(rows, live[0].held, mask))
    return None


def needed(layer: Rows, order: Sequence[Producer]) -> dict[int, Tensor | None]:
    """Which windows of each producer anybody reads, ``[B, C, H, W]``; None for all.

    Of the layer all are asked for. An activation reads no window that its coefficient makes 0, a pooling layer none that did not
    win; everything else reads all.
    """
    found: dict[int, Tensor | None] = {id(layer): None}
    for rows in reversed(order):
        mask = found[id(rows)]
        for operand in rows.operands:
            theirs = _read_by(rows, mask)
            if id(operand) in found:
                other = found[id(operand)]
                theirs = None if theirs is None or other is None else theirs | other
            found[id(operand)] = theirs
    return found


def _read_by(rows: Producer, mask: Tensor | None) -> Tensor | None:
    if isinstance(rows, SettledRows | SumRows):
        return mask
    if isinstance(rows, PointRows):
        return _both(mask, _nonzero(rows))
    if isinstance(rows, WinnerRows):
        operand = rows.operands[0]
        asked = torch.ones_like(rows.indices, dtype=torch.bool) if mask is None else mask
        counted = torch.zeros(
            [rows.batch, rows.size[0], operand.size[1] * operand.size[2]], dtype=torch.int32, device=asked.device
        )
        counted.scatter_add_(2, rows.indices.flatten(2), asked.flatten(2).int())
        return (counted > 0).unflatten(2, operand.size[1:])
    return None


def _nonzero(rows: PointRows) -> Tensor | None:
    """Where an activation's coefficient is not 0, or None if it is 0 everywhere."""
    g = rows.coefficient
    if not isinstance(g, Tensor) or bool((g != 0).all()):
        return None
    return (g != 0).expand([rows.batch, *rows.size])


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _won(rows: WinnerRows, held: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which pooled windows are read and have a winner that is held."""
    asked = torch.ones_like(rows.indices, dtype=torch.bool) if mask is None else mask
    return asked if held is None else asked & held.flatten(2).gather(2, rows.indices.flatten(2)).view_as(asked)
