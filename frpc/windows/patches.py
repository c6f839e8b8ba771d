"""Transposed windows: relevance of a few neurons pulled back through their receptive fields alone.

A neuron's relevance lives, at every layer below, in a patch of positions. Patches are pulled through the same producers that
carry windows forward, each by its transpose, and clipped at the border; nothing outside the cone is computed.

Shapes: a patch is ``[n, B, C, h, w]`` for n neurons at one position, with the row and column of its corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frpc.windows.producer import Producer
from frpc.windows.rows import ChannelRows, ConcatRows, FramedRows, PointRows, Rows, SettledRows, SourceRows, SumRows
from frpc.windows.run import producers
from frpc.windows.taps import ConvRows, CutRows, MeanRows, TapRows, WinnerRows

__all__ = ["Patch", "cone_flops", "pull_patch"]


@dataclass(frozen=True, eq=False)
class Patch:
    """Relevance ``[n, B, C, h, w]`` at the positions from ``(row, column)`` on."""

    relevance: Tensor
    row: int
    column: int


def pull_patch(layer: Rows, seeds: Tensor, row: int, column: int) -> Patch:
    """Returns ``x * G_x`` over the receptive field of neurons at one position.

    Args:
        layer: the layer's producer.
        seeds: ``[n, C]``: the channels of each.
        row, column: the position.

    Shapes: the patch is ``[n, B, C0, h, w]`` over input cells.
    """
    order = producers(layer)
    source = order[0]
    assert isinstance(source, SourceRows)
    x = source.x
    start = seeds[:, None, :, None, None].expand([seeds.shape[0], x.shape[0], seeds.shape[1], 1, 1])
    waiting: dict[int, Patch] = {id(layer): Patch(start, row, column)}
    for rows in reversed(order):
        patch = waiting.pop(id(rows), None)
        if patch is None:
            continue
        if rows is source:
            h, w = patch.relevance.shape[-2:]
            here = x[:, :, patch.row : patch.row + h, patch.column : patch.column + w]
            return Patch(patch.relevance * here, patch.row, patch.column)
        for operand, pulled in zip(rows.operands, _pull(rows, patch), strict=True):
            waiting[id(operand)] = _joined(waiting[id(operand)], pulled) if id(operand) in waiting else pulled
    raise AssertionError("every producer goes back to the source")


def _pull(rows: Producer, patch: Patch) -> list[Patch]:
    """Returns the patch of each operand."""
    v = patch.relevance
    if isinstance(rows, SettledRows):
        return [patch]
    if isinstance(rows, SumRows):
        return [patch] * len(rows.operands)
    if isinstance(rows, ConcatRows):
        cuts = zip(rows.starts, rows.operands, strict=True)
        return [Patch(v[:, :, s : s + o.size[0]], patch.row, patch.column) for s, o in cuts]
    if isinstance(rows, ChannelRows):
        zeros = v.new_zeros([*v.shape[:2], rows.operands[0].size[0], *v.shape[3:]])
        return [Patch(zeros.index_add(2, rows.channels, v), patch.row, patch.column)]
    if isinstance(rows, FramedRows):
        return [Patch(v[:, :, rows.start : rows.start + rows.operands[0].size[0]], patch.row, patch.column)]
    if isinstance(rows, PointRows):
        return [Patch(_scaled(rows, patch), patch.row, patch.column)]
    assert isinstance(rows, TapRows)
    return [_clipped(rows, _spread(rows, patch), patch)]


def _scaled(rows: PointRows, patch: Patch) -> Tensor:
    g, (h, w) = rows.coefficient, patch.relevance.shape[-2:]
    if g is None:
        return patch.relevance
    if isinstance(g, Tensor):
        g = g if g.shape[-2] == 1 else g[..., patch.row : patch.row + h, :]
        g = g if g.shape[-1] == 1 else g[..., patch.column : patch.column + w]
    return patch.relevance * g


def _spread(rows: TapRows, patch: Patch) -> Tensor:
    """The transpose of a sliding kernel without padding: ``[n, B, C, (h - 1) t + (k - 1) d + 1, ...]``."""
    v = patch.relevance
    (_, t, _, d), (_, tw, _, dw) = rows.geometry
    if isinstance(rows, ConvRows):
        flat = v.flatten(0, 1)
        spread = torch.conv_transpose2d(flat, rows.kernel, None, (t, tw), 0, 0, rows.groups, (d, dw))
        return spread.unflatten(0, v.shape[:2])
    h, w = v.shape[-2:]
    if isinstance(rows, MeanRows):
        v = v * rows.inverse[patch.row : patch.row + h, patch.column : patch.column + w].to(v)
    kh, kw = rows.geometry[0][0], rows.geometry[1][0]
    out = v.new_zeros([*v.shape[:3], (h - 1) * t + (kh - 1) * d + 1, (w - 1) * tw + (kw - 1) * dw + 1])
    for a in range(kh):
        for b in range(kw):
            share = v * rows.won(patch.row, patch.column, h, w, a, b).to(v.dtype) if isinstance(rows, WinnerRows) else v
            out[..., a * d : a * d + (h - 1) * t + 1 : t, b * dw : b * dw + (w - 1) * tw + 1 : tw] += share
    assert isinstance(rows, MeanRows | WinnerRows | CutRows)
    return out


def _clipped(rows: TapRows, spread: Tensor, patch: Patch) -> Patch:
    """Cuts off what fell on padding."""
    (_, t, p, _), (_, tw, pw, _) = rows.geometry
    top, left = patch.row * t - p, patch.column * tw - pw
    _, height, width = rows.operands[0].size
    rows_kept = slice(max(0, -top), max(0, min(spread.shape[-2], height - top)))
    columns_kept = slice(max(0, -left), max(0, min(spread.shape[-1], width - left)))
    return Patch(spread[..., rows_kept, columns_kept], max(0, top), max(0, left))


def _joined(one: Patch, other: Patch) -> Patch:
    """Adds two patches over the rectangle that holds both."""
    row, column = min(one.row, other.row), min(one.column, other.column)
    bottom = max(p.row + p.relevance.shape[-2] for p in (one, other))
    right = max(p.column + p.relevance.shape[-1] for p in (one, other))
    out = one.relevance.new_zeros([*one.relevance.shape[:3], bottom - row, right - column])
    for patch in (one, other):
        h, w = patch.relevance.shape[-2:]
        out[..., patch.row - row : patch.row - row + h, patch.column - column : patch.column - column + w] += patch.relevance
    return Patch(out, row, column)


def cone_flops(layer: Rows, row: int, column: int) -> float:
    """Returns the floating-point operations of one pull for one neuron and sample."""
    spans: dict[int, tuple[int, int, int, int]] = {id(layer): (row, row + 1, column, column + 1)}
    total = 0.0
    for rows in reversed(producers(layer)):
        if id(rows) not in spans:
            continue
        top, bottom, left, right = spans[id(rows)]
        area = (bottom - top) * (right - left)
        total += area * rows.size[0] * (2.0 * rows.taps_each() if isinstance(rows, ConvRows) else 1.0)
        for operand in rows.operands:
            wanted = _needed(rows, operand, (top, bottom, left, right))
            spans[id(operand)] = _hull([wanted, spans[id(operand)]]) if id(operand) in spans else wanted
    return total


def _needed(rows: Producer, operand: Producer, span: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    top, bottom, left, right = span
    low, high = rows.needs_rows((top, bottom))
    first, last = rows.needs_columns((left, right))
    return max(0, low), min(operand.size[1], high), max(0, first), min(operand.size[2], last)


def _hull(spans: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    return min(s[0] for s in spans), max(s[1] for s in spans), min(s[2] for s in spans), max(s[3] for s in spans)
