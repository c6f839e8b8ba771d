"""From rules to producers of windows, and the run that streams a layer through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment
from frpc.assign.reach import feeding
from frpc.core.graph import first_result
from frpc.emit.propagate import AffineMaps
from frpc.maps import (
    Compose,
    Conv,
    Identity,
    LinearMap,
    LinearOp,
    LinearPool,
    Pad,
    Place,
    ReLUGate,
    Scale,
    Select,
    Shuffle,
    Slice,
    Total,
)
from frpc.windows.rows import ChannelRows, ConcatRows, FramedRows, PointRows, Rows, SettledRows, SourceRows, SumRows
from frpc.windows.taps import ConvRows, CutRows, MeanRows, WinnerRows

aten = torch.ops.aten

__all__ = ["LocalityEndsError", "build_rows"]


class LocalityEndsError(Exception):
    """An operator after which windows make no sense.

    Attributes:
        node: the operator's node.
        why: the reason, for the plan.
    """

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node, self.why = node, why


def build_rows(assignment: Assignment, maps: AffineMaps, source: fx.Node, x: Tensor, layer: fx.Node) -> Rows:
    """Builds the producers of a layer's windows and returns the layer's own.

    Args:
        assignment: rules of the graph.
        maps: the affine form, at this input, of every node up to the layer.
        source: the input's node.
        x: its value, ``[B, C, H, W]``, or ``[B, C, L]`` taken as one row.
        layer: the node to explain.

    Raises:
        LocalityEndsError: at the first operator that windows do not survive.
    """
    start = SourceRows(x if x.dim() == 4 else x.unsqueeze(2))
    builder = _Builder(assignment, maps, {source: start}, (start.size[1], start.size[2]))
    below = feeding(assignment, layer)
    for node in assignment.graph_module.graph.nodes:
        if node in below and node not in builder.made:
            builder.add(node)
    return builder.made[layer]


class _Builder:
    """Makes one producer for each node, from the input on."""

    def __init__(self, assignment: Assignment, maps: AffineMaps, made: dict[fx.Node, Rows], cells: tuple[int, int]) -> None:
        self.assignment, self.maps, self.made, self.cells = assignment, maps, made, cells

    def add(self, node: fx.Node) -> None:
        if node not in self.assignment.rules:  # an operator's first result
            feed: Any = node.args[0]
            self.made[node] = self.made[feed]
            return
        assigned, affine = self.assignment.rules[node], self.maps[node]
        parts: list[Rows] = []
        starts: list[int] = []
        for name, operand in assigned.operands.items():
            linear_map = affine.terms[name]
            if isinstance(linear_map, Place) and linear_map.cut.dim == 1 - len(linear_map.operand):
                starts.append(linear_map.cut.start)
                parts.append(self.made[operand])
            else:
                parts.append(self.of_map(node, linear_map, self.made[operand]))
        self.made[node] = self.join(node, self.agreed(node, parts), starts)

    def join(self, node: fx.Node, parts: list[Rows], starts: list[int]) -> Rows:
        if starts and len(starts) != len(parts):
            raise LocalityEndsError(node, "it joins values along a dimension other than the channels")
        if starts:
            return ConcatRows(parts, starts, _size(node))
        return parts[0] if len(parts) == 1 else SumRows(parts)

    def agreed(self, node: fx.Node, parts: list[Rows]) -> list[Rows]:
        """Brings branches to one layout: if one uses absolute positions, all do."""
        for axis in (0, 1):
            jumps = {p.grids[axis].jump for p in parts}
            if len(jumps) > 1 and 0 not in jumps:
                raise LocalityEndsError(node, "its operands step over the input at different strides")
            if len(jumps) > 1:
                parts = [p if p.grids[axis].jump == 0 else SettledRows(p, axis, self.cells[axis]) for p in parts]
        return parts

    def of_map(self, node: fx.Node, linear_map: LinearMap, operand: Rows) -> Rows:
        if isinstance(linear_map, Compose):
            return self.of_map(node, linear_map.second, self.of_map(node, linear_map.first, operand))
        if isinstance(linear_map, Total):
            return SumRows(self.agreed(node, [self.of_map(node, part, operand) for part in linear_map.parts]))
        for kind, build in _BUILDERS:
            if isinstance(linear_map, kind):
                made = build(node, linear_map, operand)
                outgrown = [a for a in (0, 1) if operand.grids[a].jump and made.grids[a].side > self.cells[a]]
                if not outgrown:
                    return made
                operand.uses -= 1  # the producer just tried is dropped
                for axis in outgrown:
                    operand = SettledRows(operand, axis, self.cells[axis])
                return build(node, linear_map, operand)
        raise LocalityEndsError(node, f"{str(node.target).removeprefix('aten.')} mixes positions")


def _size(node: fx.Node) -> tuple[int, int, int]:
    value = first_result(node.meta["val"])
    c, *spatial = (int(n) for n in value.shape[1:])
    return (c, 1, spatial[0]) if len(spatial) == 1 else (c, spatial[0], spatial[1])


def _identity(node: fx.Node, linear_map: Identity, operand: Rows) -> Rows:
    return operand


def _same_cells(node: fx.Node, linear_map: LinearOp, operand: Rows) -> Rows:
    """One spatial axis counts as a row of columns, so an axis of size 1 put in or taken out there changes nothing."""
    squeezes = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
    if node.target in squeezes and first_result(node.meta["val"]).dim() in (3, 4) and _size(node) == operand.size:
        return operand
    raise LocalityEndsError(node, f"{str(node.target).removeprefix('aten.')} mixes positions")


def _gate(node: fx.Node, linear_map: ReLUGate, operand: Rows) -> Rows:
    mask = (linear_map.value > 0).to(linear_map.value.dtype)
    return PointRows(operand, mask if mask.dim() == 4 else mask.unsqueeze(-2))


def _scale(node: fx.Node, linear_map: Scale, operand: Rows) -> Rows:
    g = linear_map.coefficient
    if isinstance(g, Tensor):
        rank = len(linear_map.operand)
        g = g.reshape([1] * (rank - g.dim()) + list(g.shape))
        g = g if rank == 4 else g.unsqueeze(-2)
    return PointRows(operand, g)


def _conv(node: fx.Node, linear_map: Conv, operand: Rows) -> Rows:
    if linear_map.transposed:
        raise LocalityEndsError(node, "a transposed convolution steps by fractions of its operand's stride")
    if linear_map.weight.dim() > 4:
        raise LocalityEndsError(node, "windows cover one or two spatial axes")
    return ConvRows(operand, linear_map, _size(node))


def _select(node: fx.Node, linear_map: Select, operand: Rows) -> Rows:
    if linear_map.window is None or len(linear_map.window) > 2:
        raise LocalityEndsError(node, "its windows do not step evenly")
    geometry = linear_map.window if len(linear_map.window) == 2 else [(1, 1, 0, 1), *linear_map.window]
    return WinnerRows(operand, linear_map, geometry, _size(node))


def _mean(node: fx.Node, linear_map: LinearPool, operand: Rows) -> Rows:
    if len(linear_map.window) > 2:
        raise LocalityEndsError(node, "windows cover one or two spatial axes")
    if math.prod(_size(node)[1:]) == 1 and operand.size[1] * operand.size[2] > 1:
        raise LocalityEndsError(node, "global pooling sees the whole input")
    return MeanRows(operand, linear_map, _size(node))


def _slice(node: fx.Node, linear_map: Slice, operand: Rows) -> Rows:
    axis = len(linear_map.operand) + linear_map.dim
    if axis == 0:
        raise LocalityEndsError(node, "it cuts the batch")
    if axis == 1:
        order = torch.arange(operand.size[0])
        return ChannelRows(operand, order[linear_map.start : linear_map.stop : linear_map.step])
    cut = [(1, 1, 0, 1), (1, 1, 0, 1)]
    cut[axis - len(linear_map.operand) + 2] = (1, linear_map.step, -linear_map.start, 1)
    return CutRows(operand, cut, _size(node))


def _pad(node: fx.Node, linear_map: Pad, operand: Rows) -> Rows:
    rank = len(linear_map.operand)
    if any(linear_map.around(0)):
        raise LocalityEndsError(node, "it pads the batch")
    lines = [(1, 1, linear_map.around(axis)[0], 1) for axis in range(2, rank)]
    if any(any(linear_map.around(axis)) for axis in range(2, rank)):
        size = _size(node)
        operand = CutRows(operand, lines if rank == 4 else [(1, 1, 0, 1), *lines], (operand.size[0], *size[1:]))
    if any(linear_map.around(1)):
        operand = FramedRows(operand, linear_map.around(1)[0], _size(node)[0])
    return operand


def _shuffle(node: fx.Node, linear_map: Shuffle, operand: Rows) -> Rows:
    return ChannelRows(operand, linear_map.order(operand.size[0]))


_BUILDERS: tuple[tuple[type[LinearMap], Callable[[fx.Node, Any, Rows], Rows]], ...] = (
    (Identity, _identity),
    (ReLUGate, _gate),
    (Scale, _scale),
    (Conv, _conv),
    (Select, _select),
    (LinearPool, _mean),
    (Slice, _slice),
    (Pad, _pad),
    (Shuffle, _shuffle),
    (LinearOp, _same_cells),
)
