"""The share of constants: what is summed over a layer's features, as matrix-vector products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.lower.refusal import Refusal

__all__ = ["add_shares", "dot_shares"]

aten = torch.ops.aten
_SUM = aten.sum.dim_IntList


def dot_shares(graph_module: fx.GraphModule) -> list[Refusal]:
    """``sum(v * b) over features -> v @ b`` for a constant b: one call and no product in memory.

    ``v`` is ``[B, C]``, or ``[B, C, H, W]`` summed over space first, with b ``[C, 1, 1]``.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        product = node.args[0] if node.target is _SUM else None
        if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
            continue
        for at in (0, 1):
            v: Any = product.args[at]
            b: Any = product.args[1 - at]
            if _is_constant(b) and isinstance(v, fx.Node) and _fits(node, v, b):
                _dot(graph, node, v, b)
                break
    graph.eliminate_dead_code()
    return []


def _is_constant(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.target in (aten.view.default, aten.reshape.default):
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _fits(node: fx.Node, v: fx.Node, b: fx.Node) -> bool:
    """Says whether v is ``[B, C, 1, ...]``, b ``[C, 1, ...]``, and all but the samples are summed."""
    given: Any = node.args
    value, constant, result = (n.meta.get("val") for n in (v, b, node))
    if value is None or constant is None or result is None or value.dtype != constant.dtype or value.dtype != result.dtype:
        return False
    summed = sorted(d % value.dim() for d in given[1]) == list(range(1, value.dim())) and len(given) == 2
    ones = all(isinstance(n, int) and n == 1 for n in value.shape[2:])
    return summed and ones and list(constant.shape) == list(value.shape[1:])


def _dot(graph: fx.Graph, node: fx.Node, v: fx.Node, b: fx.Node) -> None:
    with graph.inserting_before(node):
        if v.meta["val"].dim() > 2:
            v = _flat(graph, v, [0, 1])
            b = _flat(graph, b, [0])
        made = graph.call_function(aten.mv.default, (v, b))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _flat(graph: fx.Graph, x: fx.Node, kept: list[int]) -> fx.Node:
    """Drops the dimensions of size 1 behind those that are kept: a view."""
    value = x.meta["val"]
    made = graph.call_function(aten.squeeze.dims, (x, list(range(len(kept), value.dim()))))
    made.meta = {**x.meta, "val": value.flatten(len(kept) - 1)}
    return made


_WITH_SUM: dict[Any, Any] = {aten.mv.default: aten.addmv.default, aten.mul.Tensor: aten.addcmul.default}


def add_shares(graph_module: fx.GraphModule) -> list[Refusal]:
    """``a + v @ b -> addmv(a, v, b)``, ``x * v + share -> addcmul(share, x, v)``: sums go with what is summed."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for at in (1, 0):
            given: Any = node.args
            term, rest = given[at], given[1 - at]
            if not isinstance(term, fx.Node) or not isinstance(rest, fx.Node) or len(term.users) != 1:
                continue
            if term is rest:  # ``y + y`` reads the product twice
                continue
            target = _WITH_SUM.get(term.target)
            if target is None or not _sums(term, rest):
                continue
            with graph.inserting_before(node):
                made = graph.call_function(target, (rest, *term.args))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            graph.erase_node(term)
            break
    return []


def _sums(term: fx.Node, rest: fx.Node) -> bool:
    """Says whether a product may be added within one call: tensors of one type, and the sum of the product's shape."""
    values = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (rest, *term.args)]
    if any(not isinstance(v, torch.Tensor) or v.dtype != values[0].dtype for v in values):  # type: ignore[union-attr]
        return False
    shape, own = term.meta["val"].shape, rest.meta["val"].shape
    if term.target is aten.mv.default:
        return str(list(shape)) == str(list(own))
    return len(shape) == len(own) and all(str(a) == str(b) or b == 1 for a, b in zip(shape, own, strict=True))
