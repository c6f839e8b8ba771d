"""Decomposition: an operator without a rule that PyTorch itself composes of others is replaced by those others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.affine import TABLE, traits_of
from frpc.graph import first_result, origin_of, replace, replace_items
from frpc.torch_compat import OpOverload, fake_mode_of, get_decompositions, has_composite_kernel, make_fx, schema_of

__all__ = ["expand_composites", "spell_out"]

aten = torch.ops.aten
_SPELLED_OUT: dict[Any, Any] = get_decompositions([aten.aminmax, aten.floor_divide, aten.special_ndtr])
"""Operators PyTorch computes in one piece and also defines through others."""


_SPELLED_OUT_NORMS: dict[Any, Any] = get_decompositions(
    [
        aten.native_layer_norm,
        aten.native_group_norm,
        aten.std,
        aten.linalg_vector_norm,
    ]
)
"""Norms, which rules of values take as one operator and rules of increments as what they compute."""


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
"""Norms that PyTorch does not take apart, or not sample by sample."""


def spell_out(graph_module: fx.GraphModule) -> bool:
    """``layer_norm(x) -> (x - mean) rsqrt(var + eps) w + b``, and the like."""
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and traits_of(node.target).spelled_out:
            changed = _inline(graph_module.graph, node, _SPELLED_OUT_NORMS) or changed
    return changed


def expand_composites(graph_module: fx.GraphModule) -> bool:
    """``f(x) -> g(h(x))`` for operators PyTorch defines as compositions (``pad``, ``softsign``, ``einsum``, ...)."""
    changed = False
    for node in list(graph_module.graph.nodes):
        makes_tensors = isinstance(first_result(node.meta.get("val")), Tensor)  # sizes are read as they are
        if node.op == "call_function" and makes_tensors and _is_composite(node.target) and TABLE.get(node.target) is None:
            changed = _inline(graph_module.graph, node) or changed
    return changed


def _is_composite(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    return target in _SPELLED_OUT or has_composite_kernel(target)


def _inline(graph: fx.Graph, node: fx.Node, table: dict[Any, Any] = _SPELLED_OUT) -> bool:
    """Puts the traced composition of a call in its place; returns whether that changed anything."""
    sources = node.all_input_nodes
    tensors = [n for n in sources if isinstance(n.meta.get("val"), Tensor)]
    if not tensors:
        return False

    def call(values: list[Any]) -> Any:
        given = dict(zip(sources, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return _BY_HAND.get(node.target, node.target)(*args, **kwargs)

    example: Any = tensors[0].meta["val"]
    with fake_mode_of(example), torch.no_grad():
        traced = make_fx(call, decomposition_table=table)([n.meta["val"] for n in sources])
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    writes = any(isinstance(n.target, OpOverload) and schema_of(n.target).is_mutable for n in calls)
    if writes or (len(calls) == 1 and calls[0].target is node.target):
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
