"""Memory: when values are made, which are overwritten, and what may be a view."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import fetch, hold
from frpc.core.refusal import Refusal
from frpc.core.sizes import same_sizes
from frpc.rules.effects import is_fresh, is_number, owners_of, writes, written_into
from frpc.rules.table import traits_of

__all__ = ["Memory", "early_coefficients", "free_views", "hold_views", "reuse_memory"]

aten = torch.ops.aten


def free_views(graph_module: fx.GraphModule) -> list[Refusal]:
    """``view(x) -> reshape(x)``: in channels-last order a view may need a copy, and reshape makes it where it does.

    Other views, of bits as another type or of strides, stay.
    """
    for node in graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return []


def hold_views(graph_module: fx.GraphModule) -> list[Refusal]:
    """``view(parameter) -> tensor``: a view of a constant is made now, not at every call; it takes no memory.

    Exact when: it is a view; a copy would take memory, and is left. Programs never write into what they hold.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        source = node.args[0] if traits_of(node.target).whole_view and len(node.all_input_nodes) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            continue
        value = fetch(graph_module, str(source.target))
        view = node.target(value, *node.args[1:])
        if view.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
            continue
        name = hold(graph_module, f"{node.name}_of_{source.target}", view, persistent=False)
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return []


def early_coefficients(graph_module: fx.GraphModule) -> list[Refusal]:
    """Moves what rules compute from values alone to where the last of those values is made.

    Values are then in the cache, and one coefficient for each layer is kept for the way back in place of all it is made of.

    Exact when: what moves neither writes into memory nor reads what is written: it gives the same wherever it stands.
    """
    graph = graph_module.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    late = set(graph.find_nodes(op="placeholder")[-1:])  # the seed: the way back starts there
    owners = owners_of(graph)
    written = {owner for node in graph.nodes for x in written_into(node) for owner in owners[x]}
    for node in list(graph.nodes):
        sources = node.all_input_nodes
        fixed = writes(node.target) or any(owners[s] & written for s in sources)
        if node in late or fixed or any(s in late for s in sources):
            late.add(node)
        elif node.op == "call_function" and node.meta.get("phase") == "rule" and sources:
            last = max(sources, key=lambda n: order[n])
            if last.op == "call_function" and last.next is not node:
                last.append(node)
                order = {n: position for position, n in enumerate(graph.nodes)}
    return []


_IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.abs.default: aten.abs_.default,
    aten.neg.default: aten.neg_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
_WRITTEN = (  # operators that return what they have written in full
    *_IN_PLACE.values(),
    aten.threshold_backward.grad_input,
    aten.avg_pool2d_backward.grad_input,
    aten.max_pool2d_with_indices_backward.grad_input,
    torch.ops.mkldnn._convolution_pointwise_.binary,
)
_COMMUTE = (aten.add.Tensor, aten.mul.Tensor)


def reuse_memory(graph_module: fx.GraphModule) -> list[Refusal]:
    """``f(x) -> f_(x)`` where x is memory that nobody reads later: no new memory is touched, which costs more than the work.

    Exact when: x is fresh memory of the program's own, seen whole, of the result's size and type, that nothing reads later, also
    not through a view, and that f reads once.
    """
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    memory = Memory(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.target is aten.threshold_backward.default and not node.kwargs:
            if memory.ends_at(node.args[0], node, order):
                node.target, node.kwargs = aten.threshold_backward.grad_input, {"grad_input": node.args[0]}
                memory.merge(node, node.args[0])
            continue
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        if not memory.ends_at(node.args[0], node, order):
            if node.target not in _COMMUTE or not memory.ends_at(node.args[1], node, order):
                continue
            node.args = (node.args[1], node.args[0])
        node.target = _IN_PLACE[node.target]
        memory.merge(node, node.args[0])
    return []


class Memory:
    """Which values share memory, and which of them own it.

    Args:
        graph: the program.
        apart: values known to have separate memory, whatever their operators' signatures say.
    """

    def __init__(self, graph: fx.Graph, apart: Collection[fx.Node] = ()) -> None:
        self._owner = owners_of(graph, apart)
        self._sharing: dict[fx.Node, set[fx.Node]] = {}
        for node, owners in self._owner.items():
            for owner in owners:
                self._sharing.setdefault(owner, set()).add(node)

    def owners(self, node: fx.Node) -> frozenset[fx.Node]:
        """The values whose memory this one may share; itself if it has separate memory."""
        return self._owner[node]

    def merge(self, node: fx.Node, into: fx.Node) -> None:
        """Notes that a result is written where another value was."""
        (own,) = self._owner[node]
        (owner,) = self._owner[into]
        if own is not owner:
            moved = self._sharing.pop(own)
            self._sharing[owner] |= moved
            for member in moved:
                self._owner[member] = self._owner[member] - {own} | {owner}

    def ends_at(self, x: Any, reader: fx.Node, order: dict[fx.Node, int]) -> bool:
        """Says whether x is memory of the program's own, whole, that ``reader`` reads once and last, and its result fits in."""
        if not isinstance(x, fx.Node) or list(reader.args).count(x) != 1 or not _fits(x, reader):
            return False
        if not _writable(x) or len(self._owner[x]) != 1:
            return False
        (owner,) = self._owner[x]
        if owner.op != "call_function" or any(y in self._sharing[owner] for y in reader.all_input_nodes if y is not x):
            return False
        users = {user for member in self._sharing[owner] for user in member.users if not is_number(user)}  # sizes stay
        return all(order[user] <= order[reader] for user in users)


def _writable(x: fx.Node) -> bool:
    """Says whether no two elements of x are one: fresh memory, seen through whole views."""
    while traits_of(x.target).whole_view and isinstance(x.args[0], fx.Node):
        x = x.args[0]
    return x.op == "call_function" and (is_fresh(x) or x.target in _WRITTEN)


def _fits(x: fx.Node, reader: fx.Node) -> bool:
    here, there = x.meta.get("val"), reader.meta.get("val")
    if not isinstance(here, Tensor) or not isinstance(there, Tensor) or here.dtype != there.dtype:
        return False
    return same_sizes(here.shape, there.shape)
