"""Decomposition: an operator without a rule that is composed of others, by PyTorch or by hand, is replaced by those others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.capture.composed import COMPOSED
from frpc.core.graph import first_result, origin_of, replace, replace_items
from frpc.core.torch_compat import (
    OpOverload,
    fake_mode_of,
    get_decompositions,
    has_composite_kernel,
    make_fx,
    overload_name,
    schema_of,
)
from frpc.rules.table import TABLE, traits_of

__all__ = ["expand_composites", "inline_composite", "spell_out", "spell_out_at_one_point"]

aten = torch.ops.aten

_SPELLED_OUT_NORMS: dict[Any, Any] = get_decompositions(
    [
        aten.native_layer_norm,
        aten.native_group_norm,
        aten.std,
        aten.linalg_vector_norm,
    ]
)
"""Norms: one operator for rules of values, decomposed for rules of increments."""


def _rms_norm(a: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = list(range(-len(shape), 0))
    size = (a * a).mean(dims, keepdim=True) + (torch.finfo(a.dtype).eps if eps is None else eps)
    unit = a * size.rsqrt()
    return unit if weight is None else unit * weight


def _fused_rms_norm(a: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> tuple[Tensor]:
    return (_rms_norm(a, shape, weight, eps),)


def _instance_norm(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Tensor:
    dims, shape = list(range(2, a.dim())), [1, -1, *[1] * (a.dim() - 2)]
    if use_input_stats or mean is None or var is None:
        middle, spread = a.mean(dims, keepdim=True), a.var(dims, correction=0, keepdim=True)
    else:
        middle, spread = mean.reshape(shape), var.reshape(shape)
    z = (a - middle) * (spread + eps).rsqrt()
    z = z if weight is None else z * weight.reshape(shape)
    return z if bias is None else z + bias.reshape(shape)


_BY_HAND: dict[Any, Any] = {
    aten.rms_norm.default: _rms_norm,
    aten._fused_rms_norm.default: _fused_rms_norm,
    aten.instance_norm.default: _instance_norm,
}
"""Norms that PyTorch does not decompose, or not per sample."""


def spell_out(graph_module: fx.GraphModule) -> bool:
    """``layer_norm(x) -> (x - mean) rsqrt(var + eps) w + b``, and the like, as PyTorch defines them; the same up to rounding."""
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and traits_of(node.target).spelled_out:
            changed = _inline(graph_module.graph, node, _SPELLED_OUT_NORMS) or changed
    return changed


def spell_out_at_one_point(graph_module: fx.GraphModule) -> bool:
    """The same for derivatives at the input alone: the derivative of a norm of zeros is 0, that of the root in it infinite."""
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and traits_of(node.target).spelled_out and not _smooth_norm(node):
            changed = _inline(graph_module.graph, node, _SPELLED_OUT_NORMS) or changed
    return changed


def _smooth_norm(node: fx.Node) -> bool:
    """Says whether a norm's own rule is its derivative: of vectors, of an order from 1 up, and standard deviations."""
    if node.target is aten.linalg_vector_norm.default:
        order: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("ord", 2)
        return bool(1 <= order < math.inf)
    return node.target is aten.std.correction


def expand_composites(graph_module: fx.GraphModule) -> bool:
    """``f(x) -> g(h(x))`` for operators defined as compositions (``pad``, ``softsign``, ``einsum``, losses, ...)."""
    changed = False
    for node in list(graph_module.graph.nodes):
        makes_tensors = isinstance(first_result(node.meta.get("val")), Tensor)  # sizes are read as they are
        whole = TABLE.get(node.target) is not None and node.target not in COMPOSED  # its rule speaks for the call as it is
        if node.op == "call_function" and makes_tensors and _is_composite(node.target) and not whole:
            changed = _inline(graph_module.graph, node, COMPOSED) or changed
    return changed


def inline_composite(graph: fx.Graph, node: fx.Node) -> bool:
    """Puts what PyTorch composes an operator of in the place of one call; returns whether that changed anything.

    Only what PyTorch itself does in C++ counts, which holds for complex numbers too.
    """
    target = node.target
    composite = isinstance(target, OpOverload) and target.namespace == "aten" and has_composite_kernel(target)
    return composite and _inline(graph, node, {})


def _is_composite(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    return target in COMPOSED or has_composite_kernel(target)


def _inline(graph: fx.Graph, node: fx.Node, table: dict[Any, Any]) -> bool:
    """Puts the traced composition of a call in its place; returns whether that changed anything.

    Not where it writes into something, holds tensors of its own, or is the call itself.
    """
    sources = node.all_input_nodes
    tensors = [n for n in sources if isinstance(n.meta.get("val"), Tensor)]
    if not tensors:
        return False
    whole: Any = node.target
    function: Any = _BY_HAND.get(node.target, table.get(node.target, node.target))

    def call(*values: Any) -> Any:
        given = dict(zip(sources, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        result = function(*args, **kwargs)
        result = whole(*args, **kwargs) if result is NotImplemented else result
        return tuple(result) if isinstance(result, tuple) else result  # without names, which would become a call in the graph

    example: Any = tensors[0].meta["val"]
    with fake_mode_of(example), torch.no_grad():
        traced = make_fx(call, decomposition_table=table)(*(n.meta["val"] for n in sources))
    traced.graph.eliminate_dead_code()
    _write_nothing(traced.graph)
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    if any(_writes(n) for n in calls) or (len(calls) == 1 and calls[0].target is node.target):
        return False
    copies: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    with graph.inserting_before(node):
        for inner in calls:
            copies[inner] = graph.node_copy(inner, copies.__getitem__)
            copies[inner].meta["origin"] = origin_of(node)
    result: Any = fx.map_arg(traced.graph.output_node().args[0], copies.__getitem__)
    results = (result,) if isinstance(result, fx.Node) else result
    if isinstance(node.meta["val"], Tensor):
        replace(node, results[0])
    else:
        replace_items(node, results)
    return True


def _write_nothing(graph: fx.Graph) -> None:
    """``f_(x) -> f(x)``, read in place of x from there on, where x has no other name: PyTorch's own compositions write so."""
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        written, packet = node.args[0], getattr(aten, node.target.overloadpacket.__name__.removesuffix("_"), None)
        functional = getattr(packet, overload_name(node.target), None)
        if functional is None or any(_aliases(n) for n in (written, *written.users) if n is not node):
            continue
        node.target = functional
        later, seen = set(), False
        for other in graph.nodes:
            seen = seen or other is node
            later.update([other] if seen and other is not node else [])
        written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def _aliases(node: fx.Node) -> bool:
    """Says whether a value may lie in memory that has another name: an input, or the result of a view."""
    if not isinstance(node.target, OpOverload):
        return True
    return any(value.alias_info is not None for value in schema_of(node.target).returns)
