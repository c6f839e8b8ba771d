"""Optimization of an emitted program: the same function with fewer operations. Each pass says whether it changed anything."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import fetch, free_name
from frpc.core.sizes import same_sizes
from frpc.core.torch_compat import OpOverload, enable_python_dispatcher, overload_name, schema_of
from frpc.rules.effects import is_pure, owners_of, written_into
from frpc.rules.table import traits_of

__all__ = [
    "PASSES",
    "drop_covered_gates",
    "drop_unread",
    "fold_added_bias",
    "fold_constants",
    "merge_common",
    "merge_scales",
    "overwrite_nothing",
    "remove_dead",
]

aten = torch.ops.aten
Pass = Callable[[fx.GraphModule], bool]


def overwrite_nothing(graph_module: fx.GraphModule) -> bool:
    """``f_(x) -> f(x)``, and what read x afterwards reads the result: what is one value may then be computed once.

    Exact when: x is fresh memory that nothing sees through a view, no view itself, and f gives x's own type and shape, as writing
    does: ``f_(x)`` rounds to x's type where ``f(x)`` takes the wider one.
    """
    graph, changed = graph_module.graph, False
    order, owners = {node: position for position, node in enumerate(graph.nodes)}, owners_of(graph)
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node, found in owners.items():
        for owner in found:
            sharing.setdefault(owner, []).append(node)
    writing = {node for node in graph.nodes if _without_writing(node.target) is not None}
    for node in list(graph.nodes):
        plain, x = _without_writing(node.target), node.args[0] if node.args else None
        if plain is None or not isinstance(x, fx.Node) or len(owners[x]) != 1:
            continue
        (owner,) = owners[x]
        if owner.op != "call_function" or any(other not in writing for other in sharing[owner] if other is not owner):
            continue
        if not _gives(plain, node):
            continue
        for user in list(x.users):
            if order[user] > order[node]:
                user.replace_input_with(x, node)
        node.target = plain
        changed = True
    return changed


def _without_writing(op: Any) -> OpOverload | None:
    """The operator that gives what another writes into its first operand, if there is one."""
    if not isinstance(op, OpOverload) or op.namespace != "aten" or not schema_of(op).name.endswith("_"):
        return None
    packet = getattr(aten, schema_of(op).name.removeprefix("aten::").removesuffix("_"), None)
    found: OpOverload | None = getattr(packet, overload_name(op), None)
    return found


def _gives(plain: OpOverload, node: fx.Node) -> bool:
    """Says whether the operator that does not write gives a value of the written one's type and shape."""
    if any("val" not in n.meta for n in (node, *node.all_input_nodes)):
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with enable_python_dispatcher():
        found, there = plain(*args, **kwargs), node.meta["val"]
    return isinstance(found, Tensor) and found.dtype == there.dtype and same_sizes(found.shape, there.shape)


def remove_dead(graph_module: fx.GraphModule) -> bool:
    """Drops what no result depends on, e.g. primal passes met while tracing transposes; calls that write stay."""
    return bool(graph_module.graph.eliminate_dead_code())


def _key(value: Any) -> Any:
    """Makes an argument hashable, telling 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, list | tuple):
        return (type(value).__name__, *(_key(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, float):
        return ("float", repr(value))
    return (type(value).__name__, value)


def merge_common(graph_module: fx.GraphModule) -> bool:
    """``f(x), f(x) -> one f(x)``: the same operator on the same arguments is computed once.

    Exact when: f draws no random numbers and writes nothing, and neither its result nor its operands are written into.
    """
    graph, changed = graph_module.graph, False
    seen: dict[Any, fx.Node] = {}
    owners = owners_of(graph)
    written = {owner for node in graph.nodes for x in written_into(node) for owner in owners[x]}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_pure(node.target):
            continue
        if written and any(owners[n] & written for n in (node, *node.all_input_nodes)):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changed = True
    return changed


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """``f(parameters) -> tensor``, unless the result is only another view of a parameter.

    Exact when: f writes into nothing and draws no random numbers.
    """
    changed = False
    several: dict[fx.Node, Any] = {}  # results of folded operators that have more than one
    for node in list(graph_module.graph.nodes):
        sources = node.all_input_nodes
        if node.target is operator.getitem and node.args[0] in several:
            _store(graph_module, node, several[node.args[0]][node.args[1]])
            changed = True
            continue
        if node.op != "call_function" or not sources or any(n.op != "get_attr" for n in sources) or not is_pure(node.target):
            continue
        if _is_view(node) and not any(_foldable(u) for u in node.users):
            continue
        real = fx.map_arg((node.args, node.kwargs), lambda n: fetch(graph_module, str(n.target)))
        value = node.target(*real[0], **real[1])
        if isinstance(value, Tensor):
            _store(graph_module, node, value)
            changed = True
        elif isinstance(value, tuple):
            several[node] = value
    return changed


def _foldable(node: fx.Node) -> bool:
    """Says whether a node would fold once its one non-constant operand has."""
    return node.op == "call_function" and all(n.op == "get_attr" or _is_view(n) for n in node.all_input_nodes)


def _is_view(node: fx.Node) -> bool:
    """Says whether a call shows all of what it is given, in the same memory; a part of it is worth a tensor of its own."""
    if not traits_of(node.target).view or len(node.all_input_nodes) != 1:
        return False
    given, seen = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return not isinstance(given, Tensor) or not isinstance(seen, Tensor) or seen.numel() >= given.numel()


def _store(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    name = free_name(graph_module, node.name)
    graph_module.register_buffer(name, value)
    with graph_module.graph.inserting_before(node):
        stored = graph_module.graph.get_attr(name)
    stored.meta = dict(node.meta)
    node.replace_all_uses_with(stored)
    graph_module.graph.erase_node(node)


def merge_scales(graph_module: fx.GraphModule) -> bool:
    """``(v * s) * t -> v * (s t)`` for constants s, t of one shape and type: two passes over v become one.

    Exact when: nothing else reads ``v * s``, and ``s t`` neither overflows nor underflows, up to rounding.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        inner = node.args[0] if node.target is aten.mul.Tensor else None
        if not isinstance(inner, fx.Node) or inner.target is not aten.mul.Tensor or len(inner.users) != 1:
            continue
        outer_factor, inner_factor = node.args[1], inner.args[1]
        both = [f for f in (outer_factor, inner_factor) if isinstance(f, fx.Node) and f.op == "get_attr"]
        if len(both) == 2 and _multiply(*(fetch(graph_module, str(n.target)) for n in both)):
            with graph_module.graph.inserting_before(node):
                product = graph_module.graph.call_function(aten.mul.Tensor, (inner_factor, outer_factor))
            product.meta = {**inner.meta, "val": both[0].meta["val"]}
            node.args = (inner.args[0], product)
            changed = True
    return changed


def _multiply(s: Tensor, t: Tensor) -> bool:
    """Says whether two factors can be one: the product is finite, and 0 or tiny only where a factor is."""
    if s.shape != t.shape or s.dtype != t.dtype or not s.is_floating_point():
        return False
    product, least = s * t, torch.finfo(s.dtype).smallest_normal
    normal = (product.abs() >= least) | (s == 0) | (t == 0)
    return bool((product.isfinite() & normal).all())


def drop_covered_gates(graph_module: fx.GraphModule) -> bool:
    """``threshold_backward(v, r, 0) * (r / d) -> v * (r / d)`` for ``r = relu(a)``: where the gate is shut, the quotient is 0.

    Exact when: v is finite; 0 times an infinite v is NaN. Where d is 0 too, both are NaN.
    """
    changed = False
    for node in graph_module.graph.nodes:
        if node.target is not aten.mul.Tensor or len(node.args) != 2:
            continue
        for at, other in ((0, 1), (1, 0)):
            gate, quotient = node.args[at], node.args[other]
            if _is_gate_of(gate, quotient):
                node.update_arg(at, gate.args[0])
                changed = True
                break
    return changed


def _is_gate_of(gate: Any, quotient: Any) -> bool:
    """Says whether ``gate`` is shut exactly where the numerator of ``quotient``, a ReLU's result, is 0."""
    if not isinstance(gate, fx.Node) or not isinstance(quotient, fx.Node):
        return False
    if gate.target is not aten.threshold_backward.default or quotient.target is not aten.div.Tensor or gate.args[2] != 0:
        return False
    rectified = gate.args[1]
    return isinstance(rectified, fx.Node) and rectified.target is aten.relu.default and quotient.args[0] is rectified


def fold_added_bias(graph_module: fx.GraphModule) -> bool:
    """``convolution(x, w) + c -> convolution(x, w, c)`` for one constant a channel: a pass over the result less.

    Exact when: c is of the result's type, the convolution has no bias yet, nothing else reads it, and ``alpha`` is 1.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        convolved, added = (*node.args, None, None)[:2] if node.target is aten.add.Tensor and not node.kwargs else (None, None)
        if not isinstance(convolved, fx.Node) or not isinstance(added, fx.Node) or added.op != "get_attr":
            continue
        plain = convolved.target is aten.convolution.default and convolved.args[2] is None and len(convolved.users) == 1
        shape, rank = list(added.meta["val"].shape), convolved.meta["val"].dim()
        same = added.meta["val"].dtype == convolved.meta["val"].dtype
        if plain and same and rank > 2 and same_sizes(shape, [convolved.meta["val"].shape[1], *[1] * (rank - 2)]):
            with graph_module.graph.inserting_before(convolved):
                flat = graph_module.graph.call_function(aten.reshape.default, (added, [-1]))
            flat.meta = {**added.meta, "val": added.meta["val"].reshape(-1)}
            _store(graph_module, flat, fetch(graph_module, str(added.target)).reshape(-1))
            bias = convolved.prev
            convolved.args = (*convolved.args[:2], bias, *convolved.args[3:])
            node.replace_all_uses_with(convolved)
            graph_module.graph.erase_node(node)
            changed = True
    return changed


def drop_unread(graph_module: fx.GraphModule) -> bool:
    """Forgets tensors that no node reads any more, e.g. what a folded reference pass went through."""
    read = {str(n.target) for n in graph_module.graph.find_nodes(op="get_attr")}
    unread = [name for name, _ in graph_module.named_buffers() if name not in read]
    for name in unread:
        owner, _, own = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), own)
    return bool(unread)


PASSES: tuple[Pass, ...] = (
    overwrite_nothing,
    remove_dead,
    merge_common,
    merge_scales,
    fold_constants,
    fold_added_bias,
    drop_covered_gates,
    remove_dead,
    drop_unread,
)
"""In this order. Writes go first, and dead code, so that nothing is merged with what is overwritten, or into what is dead."""
