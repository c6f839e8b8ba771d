"""Attention in its parts: the scores, their softmax, and the values it weighs, so that each has its rule.

PyTorch computes ``scaled_dot_product_attention`` in one call, whose affine form needs the attention matrix it never writes out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import replace
from frpc.core.sizes import size_hint

__all__ = ["expand_attention"]

aten = torch.ops.aten


def expand_attention(graph_module: fx.GraphModule) -> bool:
    """``scaled_dot_product_attention(q, k, v) -> softmax(scale q k^T + mask) v``.

    Exact when: nothing is dropped out, and what a causal mask is for, tokens and features, has fixed sizes. A row that a mask
    leaves nothing of gives 0, as PyTorch's does.
    """
    changed = False
    for node, edit, given in calls(graph_module, aten.scaled_dot_product_attention.default):
        query, key, value = given["query"], given["key"], given["value"]
        tokens = [x.meta["val"].shape[-2] for x in (query, key)] if given["is_causal"] else []
        if given["dropout_p"] != 0 or not all(isinstance(n, int) for n in (*tokens, query.meta["val"].shape[-1])):
            continue
        if given["enable_gqa"]:
            key, value = (_for_each_head(edit, x, query) for x in (key, value))
        scale = given["scale"]
        if scale is None:
            scale = 1.0 / math.sqrt(int(query.meta["val"].shape[-1]))
        keys = edit.call(aten.transpose.int, key, -2, -1)
        scores = edit.call(aten.matmul.default, edit.call(aten.mul.Tensor, query, scale), keys)
        weights = _softmax(edit, scores, given["attn_mask"], given["is_causal"])
        replace(node, _laid_out_like(edit, edit.call(aten.matmul.default, weights, value), node.meta["val"]))
        changed = True
    return changed


def _laid_out_like(edit: Editor, x: fx.Node, example: Tensor) -> fx.Node:
    """Copies a result into the memory order of the call it replaces: later views rely on it."""
    strides = [size_hint(s) for s in example.stride()]
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    if order == sorted(order):
        return x
    copied = edit.call(aten.clone.default, edit.call(aten.permute.default, x, order), memory_format=torch.contiguous_format)
    return edit.call(aten.permute.default, copied, [order.index(d) for d in range(len(order))])


def _for_each_head(edit: Editor, x: fx.Node, query: fx.Node) -> fx.Node:
    """Repeats every key or value head for the query heads it serves (grouped-query attention)."""
    shape = x.meta["val"].shape
    times = int(query.meta["val"].shape[-3]) // int(shape[-3])
    if times == 1:
        return x
    copied = edit.call(aten.unsqueeze.default, x, -3)
    copied = edit.call(aten.expand.default, copied, [*[-1] * (len(shape) - 2), times, -1, -1])
    return edit.call(aten.flatten.using_ints, copied, len(shape) - 3, len(shape) - 2)


def _softmax(edit: Editor, scores: fx.Node, mask: Any, causal: bool) -> fx.Node:
    """Adds the call that turns scores into weights; a row that a mask leaves nothing of has weights 0."""
    if causal:
        return edit.call(aten._softmax.default, _masked(edit, scores, _causal_mask(edit, scores)), -1, False)
    if mask is None:
        return edit.call(aten._softmax.default, scores, -1, False)
    if mask.meta["val"].dtype is torch.bool:
        return edit.call(aten._safe_softmax.default, _masked(edit, scores, mask), -1)
    return edit.call(aten._safe_softmax.default, edit.call(aten.add.Tensor, scores, mask), -1)


def _masked(edit: Editor, scores: fx.Node, mask: fx.Node) -> fx.Node:
    return edit.call(aten.where.ScalarOther, mask, scores, -math.inf)


def _causal_mask(edit: Editor, scores: fx.Node) -> fx.Node:
    """Adds a constant: token t looks at tokens up to t."""
    example = scores.meta["val"]
    rows, columns = (int(n) for n in example.shape[-2:])
    mask = torch.ones(rows, columns, dtype=torch.bool, device=example.device).tril()
    return edit.constant("causal_mask", mask, example)
