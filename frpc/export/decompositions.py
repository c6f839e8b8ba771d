"""Rewrites for runtimes that are not PyTorch: the same function, in operators that they have and run fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from frpc.graph import fetch

__all__ = ["ONNX_REWRITES", "gates_as_products", "transposed_as_convolutions"]

aten = torch.ops.aten


def transposed_as_convolutions(program: fx.GraphModule) -> None:
    """``conv_transpose(v, w), stride 1 -> conv(v, flip(w)^T)``: runtimes that block channels do so in convolutions alone."""
    for node in list(program.graph.nodes):
        if node.target is not aten.convolution.default or not node.args[6]:
            continue
        v, weight, bias, stride, padding, dilation, _, output_padding, groups = node.args
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or any(s != 1 for s in stride) or any(output_padding):
            continue
        value = fetch(program, str(weight.target))
        border = [d * (int(k) - 1) - p for d, k, p in zip(dilation, value.shape[2:], padding, strict=True)]
        if min(border) < 0:
            continue
        read = _read(program, node, f"{weight.target}_flipped_{groups}", _flipped(value, groups))
        node.args = (v, read, bias, stride, border, dilation, False, output_padding, groups)
    program.graph.eliminate_dead_code()


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """``[g I, O, *k] -> [g O, I, *k]``, turned round in space."""
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return grouped.flip(list(range(2, weight.dim()))).contiguous()


def _read(program: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    free = name.replace(".", "_")
    if not hasattr(program, free):
        program.register_buffer(free, value)
    with program.graph.inserting_before(before):
        return program.graph.get_attr(free)


def gates_as_products(program: fx.GraphModule) -> None:
    """``threshold_backward(v, r, t) -> v * (r > t)``: a product of numbers runs on all cores, a choice between them does not.

    The two differ where a shut gate meets an infinite ``v`` alone, and then the account is lost already.
    """
    for node in list(program.graph.nodes):
        if node.target is not aten.threshold_backward.default:
            continue
        v, rectified, threshold = node.args
        with program.graph.inserting_before(node):
            gate: Any = program.graph.call_function(aten.gt.Scalar, (rectified, threshold))
            gate = program.graph.call_function(aten._to_copy.default, (gate,), {"dtype": node.meta["val"].dtype})
            product = program.graph.call_function(aten.mul.Tensor, (v, gate))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        program.graph.erase_node(node)


ONNX_REWRITES = (transposed_as_convolutions, gates_as_products)
"""In this order."""
