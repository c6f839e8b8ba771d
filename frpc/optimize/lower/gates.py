"""Gates of ReLUs as bytes: the backward pass keeps one byte per element instead of the activation's four."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.refusal import Refusal

__all__ = ["byte_gates", "byte_gates_of_middle_size", "byte_masks"]

aten = torch.ops.aten
RELUS = (aten.relu.default, aten.relu_.default)
SMALL = 2**12  # elements a sample: below, a call costs more than the memory is worth
MIDDLE_SIZES = (2**16, 2**20)  # where bytes cost no time to speak of: beyond, products lay them out as fresh pages of floats


def byte_gates(graph_module: fx.GraphModule) -> list[Refusal]:
    """``threshold_backward(v, r, 0) -> v * bytes(r)`` for ``r = relu(a)``, or winners of it.

    The bytes are made right behind the ReLU, while r is in the cache, and r may go as soon as the next layer has read it: a
    third of the memory, for a twentieth of the time. The result of a ReLU is above 0 just where it is not 0, which is what a cast
    to bool asks; unsigned bytes multiply in one pass. Gates of a few thousand elements stay as they are, in one call.

    Exact when: the threshold is 0, v is floating-point, which keeps its type beside bytes, and finite: 0 times an infinite v is
    NaN.
    """
    return _keep_bytes(graph_module, SMALL, math.inf)


def byte_gates_of_middle_size(graph_module: fx.GraphModule) -> list[Refusal]:
    """The same for those gates alone whose memory costs no time; the others read their ReLU."""
    return _keep_bytes(graph_module, *MIDDLE_SIZES)


def _keep_bytes(graph_module: fx.GraphModule, least: float, beyond: float) -> list[Refusal]:
    graph = graph_module.graph
    masks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.threshold_backward.default or not _is_rectified(node.args[1]) or node.args[2] != 0:
            continue
        if not _is_floating(node.args[0]):
            continue
        if not least <= _elements(node.args[1]) < beyond:
            continue
        gated, rectified = node.args[0], node.args[1]
        with graph.inserting_before(node):
            product = graph.call_function(aten.mul.Tensor, (gated, _mask(graph, rectified, masks)))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return []


def byte_masks(graph_module: fx.GraphModule) -> list[Refusal]:
    """``v * (r > 0) -> v * bytes(r)`` for ``r = relu(a)``, or winners of it: gates that many columns v share.

    Bytes multiply five times as fast as bools.

    Exact when: v is floating-point and finite. A product of two gates stays one of bools; 0 times an infinite v is NaN.
    """
    graph = graph_module.graph
    masks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.gt.Scalar and _is_rectified(node.args[0]) and node.args[1] == 0:
            for user in list(node.users):
                if user.target is aten.mul.Tensor and user.args[0] is not node and _is_floating(user.args[0]):
                    user.args = (user.args[0], _mask(graph, node.args[0], masks))
    graph.eliminate_dead_code()
    return []


def _is_floating(value: Any) -> bool:
    """Says whether a value is known to be a floating-point tensor."""
    example = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(example, Tensor) and example.is_floating_point()


def _elements(rectified: Any) -> float:
    """How many a sample has; where that is not known, as many as count."""
    value = rectified.meta.get("val")
    sizes = [None] if value is None else list(value.shape[1:])
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else MIDDLE_SIZES[0]  # type: ignore[arg-type]


def _is_rectified(value: Any) -> bool:
    """Says whether a value is a ReLU's, or a winner among those."""
    if isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == 0:
        pool: Any = value.args[0]
        value = pool.args[0] if pool.target is aten.max_pool2d_with_indices.default else None
    return isinstance(value, fx.Node) and value.target in RELUS


def _mask(graph: fx.Graph, rectified: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The bytes of a ReLU's result, made once."""
    if rectified not in known:
        with graph.inserting_after(rectified):
            holds = graph.call_function(aten._to_copy.default, (rectified,), {"dtype": torch.bool})
        with graph.inserting_after(holds):
            known[rectified] = graph.call_function(aten.view.dtype, (holds, torch.uint8))
        value = rectified.meta.get("val")
        for made, dtype in ((holds, torch.bool), (known[rectified], torch.uint8)):
            made.meta = {**rectified.meta, "val": None if value is None else value.to(dtype), "phase": "rule"}
    return known[rectified]
