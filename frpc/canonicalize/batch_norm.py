"""Batch norm folded into the layer before it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.editor import Editor
from frpc.core.graph import fetch, origin_of, replace
from frpc.rules.forms.linear import batch_norm_affine

__all__ = ["fold_batch_norm"]

aten = torch.ops.aten


def fold_batch_norm(graph_module: fx.GraphModule, keep: frozenset[str]) -> bool:
    """``s (W a + b) + t -> (s W) a + (s b + t)``: batch norm after a convolution or linear layer goes into its weights.

    Exact when: weights and statistics are constants, nothing else reads the layer's result or the norm's other results, and the
    norm's channels are the layer's: a linear layer's are the last dimension, so its result has to be ``[B, C]``. A norm that
    divides by 0 stays.

    Args:
        graph_module: the graph.
        keep: module paths whose own output is explained; those are not changed.
    """
    changed = False
    for item in list(graph_module.graph.nodes):
        norm: Any = item.args[0] if item.target is operator.getitem and item.args[1] == 0 else None
        if not isinstance(norm, fx.Node) or norm.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        layer: Any = norm.args[0]
        foldable = isinstance(layer, fx.Node) and len(layer.users) == 1 and len(norm.users) == 1
        if (
            not foldable
            or layer.target not in (aten.convolution.default, aten.linear.default)
            or keep & set(layer.meta.get("layers", ()))
        ):
            continue
        if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
            continue  # the norm's channels are the second dimension, the layer's features the last
        weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
        statistics = [n for n in (*norm.args[1:5], weight, bias) if n is not None]
        constant = all(isinstance(n, fx.Node) and n.op == "get_attr" for n in statistics)
        given: Any = norm.args
        if constant and bool((fetch(graph_module, given[4].target) + given[6] > 0).all()):
            _fold_one(graph_module, item, norm, layer)
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


def _fold_one(graph_module: fx.GraphModule, item: fx.Node, norm: fx.Node, layer: fx.Node) -> None:
    def read(node: Any) -> Tensor | None:
        return None if node is None else fetch(graph_module, node.target)

    gamma, beta, mean, variance = (read(n) for n in norm.args[1:5])
    weight, bias = read(layer.args[1]), read(layer.args[2] if len(layer.args) > 2 else None)
    assert mean is not None and variance is not None and weight is not None
    # Folded in float64: the product of two rounded factors would cost a digit of the model's own output.
    double = [None if t is None else t.double() for t in (gamma, beta, mean, variance)]
    scale, shift = batch_norm_affine(double[0], double[1], double[2], double[3], norm.args[6])  # type: ignore[arg-type]
    transposed = layer.target is aten.convolution.default and bool(layer.args[6])
    if transposed:
        groups = int(layer.args[8])  # type: ignore[arg-type]
        shaped = weight.double().reshape([groups, -1, *weight.shape[1:]]) * scale.reshape(
            [groups, 1, -1] + [1] * (weight.dim() - 2)
        )
        folded = shaped.reshape(weight.shape)
    else:
        folded = weight.double() * scale.reshape([-1] + [1] * (weight.dim() - 1))
    offset = shift if bias is None else shift + bias.double() * scale
    edit, name = Editor(graph_module, layer), str(layer.args[1].target)  # type: ignore[union-attr]
    like = layer.meta["val"]
    new_weight = edit.constant(f"{name}_folded", folded.to(weight.dtype), like)
    new_bias = edit.constant(f"{name}_bias_folded", offset.to(weight.dtype), like)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    layer.meta["folded"] = origin_of(norm).module
    replace(item, layer)
    graph_module.graph.erase_node(norm)
