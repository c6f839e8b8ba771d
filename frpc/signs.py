"""Which values are known to be nowhere negative, whatever the input: rules that treat the two signs apart then need one half."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from frpc.affine import bind
from frpc.graph import RESHAPES

__all__ = ["never_negative"]

aten = torch.ops.aten

_MAKES = {  # never negative, whatever they are given
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softplus.default,
    aten.exp.default,
    aten.abs.default,
    aten.square.default,
    aten.sqrt.default,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.linalg_vector_norm.default,
}
_KEEPS = {  # never negative if all that they are given is
    *RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten.channel_shuffle.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.cat.default,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.maximum.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
}


def never_negative(graph: fx.Graph) -> set[fx.Node]:
    """Returns the calls whose result is known to have no negative element."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        item = node.target is operator.getitem and node.args[0] in found and node.args[1] == 0
        if item or node.target in _MAKES or _clamps(node) or (node.target in _KEEPS and _fed_by(node, found)):
            found.add(node)
    return found


def _fed_by(node: fx.Node, known: set[fx.Node]) -> bool:
    numbers = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, int | float)]
    arithmetic = node.target in (aten.mul.Tensor, aten.add.Tensor)
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return bool(tensors) and all(n in known for n in tensors) and not (arithmetic and any(v < 0 for v in numbers))


def _clamps(node: fx.Node) -> bool:
    """Says whether a call cuts off everything below some number that is not negative."""
    if node.target not in (aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default):
        return False
    given: dict[str, Any] = bind(node.target, node.args, node.kwargs)
    low = given.get("min", given.get("min_val"))
    return isinstance(low, int | float) and low >= 0
