"""The share of constants: what is summed over a layer's features, as matrix-vector products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.core.graph import fetch, hold
from frpc.core.refusal import Refusal
from frpc.core.sizes import same_size, same_sizes

__all__ = ["add_shares", "dot_shares", "join_shares"]

aten = torch.ops.aten
_SUM = aten.sum.dim_IntList


def dot_shares(graph_module: fx.GraphModule) -> list[Refusal]:
    """``sum(v * b) over features -> v @ b`` for a constant b: one call and no product in memory.

    ``v`` is ``[B, C]``, or ``[B, C, H, W]`` summed over space first, with b ``[C, 1, 1]``.

    Exact when: all are of one type, nothing else reads the product, and all but the samples is summed, and dropped.
    """
    graph, sums = graph_module.graph, dict[fx.Node, fx.Node]()
    for node in list(graph.nodes):
        product = node.args[0] if node.target is _SUM else None
        if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
            continue
        for at in (0, 1):
            v: Any = product.args[at]
            b: Any = product.args[1 - at]
            if _is_constant(b) and isinstance(v, fx.Node) and _fits(node, v, b):
                _dot(graph, node, v, b, sums)
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
    if {**node.kwargs, "dtype": None} != {"dtype": None} or value.dim() < 2 or not value.is_floating_point():
        return False
    summed = sorted(d % value.dim() for d in given[1]) == list(range(1, value.dim())) and len(given) == 2
    ones = all(isinstance(n, int) and n == 1 for n in value.shape[2:])
    return summed and ones and same_sizes(constant.shape, value.shape[1:])


def _dot(graph: fx.Graph, node: fx.Node, v: fx.Node, b: fx.Node, sums: dict[fx.Node, fx.Node]) -> None:
    """Args beyond the operands: ``sums`` notes what became of those that two layers share."""
    with graph.inserting_before(node):
        if v.meta["val"].dim() > 2:
            if v not in sums:
                sums[v] = _flat(graph, v, [0, 1])
            v, b = sums[v], _flat(graph, b, [0])
        made = graph.call_function(aten.mv.default, (v, b))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _flat(graph: fx.Graph, x: fx.Node, kept: list[int]) -> fx.Node:
    """Drops the dimensions of size 1 behind those that are kept: a view, or a sum that does not keep them."""
    value, behind = x.meta["val"], list(range(len(kept), x.meta["val"].dim()))
    arguments: Any = x.args
    kept_by_sum = x.target is _SUM and arguments[2:] == (True,) and not x.kwargs
    if kept_by_sum and sorted(d % value.dim() for d in arguments[1]) == behind:
        made = graph.call_function(_SUM, (arguments[0], behind))
    else:
        made = graph.call_function(aten.squeeze.dims, (x, behind))
    made.meta = {**x.meta, "val": value.flatten(len(kept) - 1)}
    return made


_WITH_SUM: dict[Any, Any] = {aten.mv.default: aten.addmv.default, aten.mul.Tensor: aten.addcmul.default}


def add_shares(graph_module: fx.GraphModule) -> list[Refusal]:
    """``a + v @ b -> addmv(a, v, b)``, ``x * v + share -> addcmul(share, x, v)``: sums go with what is summed.

    Exact when: all are floating-point tensors of one type, the sum has the product's shape, its ``alpha`` is 1, and nothing else
    reads the product.
    """
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
    if term.kwargs or not rest.meta["val"].is_floating_point():
        return False
    if term.target is aten.mv.default:
        return same_sizes(shape, own)
    return len(shape) == len(own) and all(same_size(a, b) or same_size(b, 1) for a, b in zip(shape, own, strict=True))


_FEW = 3  # terms: two calls make one of fewer
_FEATURES = 4096  # a layer: more are no cheaper to copy than to multiply


def join_shares(graph_module: fx.GraphModule) -> list[Refusal]:
    """``addmv(addmv(a, v, b), w, c), ... -> addmv(a, cat(v, w, ...), cat(b, c, ...))`` for a few hundred features v, w each.

    A net of fifty layers has as many shares; a call for each takes longer than the sums.

    Exact when: every b is a constant, every sum ends in the next alone, and none is scaled.
    """
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        if not _is_share(node) or any(_is_share(user) and user.args[0] is node for user in node.users):
            continue
        terms, rest = [node], node.args[0]
        while isinstance(rest, fx.Node) and _is_share(rest) and len(rest.users) == 1:
            terms.append(rest)
            rest = rest.args[0]
        if len(terms) < _FEW:
            continue
        joined = torch.cat([fetch(graph_module, str(_constant(t).target)) for t in terms])
        name = hold(graph_module, f"{node.name}_joined", joined)
        with graph.inserting_before(node):
            sums = graph.call_function(aten.cat.default, ([_sum(t) for t in terms], 1))
            sums.meta = {**node.meta, "val": torch.cat([_sum(t).meta["val"] for t in terms], 1)}
            read = graph.get_attr(name)
            read.meta = {"val": torch.cat([_constant(t).meta["val"] for t in terms])}
            made = graph.call_function(aten.addmv.default, (rest, sums, read))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    return []


def _is_share(node: fx.Node) -> bool:
    """Says whether a call adds few features, or sums over space, weighted by constants."""
    if node.target is not aten.addmv.default or node.kwargs or len(node.args) != 3:
        return False
    sums, constant = node.args[1:]
    if not isinstance(sums, fx.Node) or not isinstance(constant, fx.Node) or constant.op != "get_attr":
        return False
    value = sums.meta["val"]
    return value.dim() == 2 and isinstance(value.shape[1], int) and value.shape[1] <= _FEATURES


def _sum(share: fx.Node) -> fx.Node:
    found = share.args[1]
    assert isinstance(found, fx.Node)
    return found


def _constant(share: fx.Node) -> fx.Node:
    found = share.args[2]
    assert isinstance(found, fx.Node)
    return found
