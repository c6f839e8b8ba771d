"""Rewrites that leave values in the order of memory in which ONNX Runtime convolves.

On CPUs it keeps channels in blocks of 8 or 16 from one convolution to the next, through ReLUs, pools, and sums and products of
two tensors of one shape; everything else is computed row by row, and putting the values in order before and after takes as long
as the computing. So what stands between two convolutions on the way back is written in operators that know blocks. All of it is
standard ONNX, and the same function everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from frpc.export.decompositions import BLOCK, gates_as_products, read, strided_as_convolutions, transposed_as_convolutions
from frpc.export.separable import transposed_as_products

__all__ = ["ONNX_REWRITES", "gates_as_convolutions", "means_as_convolutions", "sums_as_averages", "transposed_into_blocks"]

aten = torch.ops.aten

_STEEP = 2.0**126  # times the smallest normal number of float32 is 1; times 4 is infinite, which is as open as 1


def _fills_blocks(node: Any) -> bool:
    """Says whether values are pictures of whole blocks of channels."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        return False
    channels, height, width = value.shape[1:]
    return all(isinstance(n, int) for n in (channels, height, width)) and channels % BLOCK == 0 and height * width > 1


def _times(program: fx.GraphModule, before: fx.Node, v: fx.Node, factor: float) -> fx.Node:
    """``v * factor``, as a convolution of each channel."""
    channels = int(v.meta["val"].shape[1])
    name = f"times_{factor}_{channels}".replace("-", "_").replace("+", "_")
    weight = read(program, before, name, torch.full((channels, 1, 1, 1), factor, device=v.meta["val"].device))
    with program.graph.inserting_before(before):
        made = program.graph.call_function(
            aten.convolution.default, (v, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], channels)
        )
    made.meta = dict(v.meta)
    return made


def gates_as_convolutions(program: fx.GraphModule) -> None:
    """``threshold_backward(v, relu, 0) -> v * min(max(relu * 2^126, 0), 1)``: 1 where the ReLU is open, 0 where it is shut.

    Exact when: the threshold is 0, what gates is a ReLU's own result, and numbers are normal; a ReLU that lets a subnormal one
    through, below 1.2e-38, opens in part.
    """
    for node in list(program.graph.nodes):
        if node.target is not aten.threshold_backward.default:
            continue
        v, rectified, threshold = node.args
        if threshold != 0 or not _fills_blocks(rectified) or rectified.target is not aten.relu.default:
            continue
        steep = _times(program, node, rectified, _STEEP)
        with program.graph.inserting_before(node):
            gate = program.graph.call_function(aten.hardtanh.default, (steep, 0.0, 1.0))
            gated = program.graph.call_function(aten.mul.Tensor, (v, gate))
        gated.meta = dict(node.meta)
        node.replace_all_uses_with(gated)
        program.graph.erase_node(node)


def means_as_convolutions(program: fx.GraphModule) -> None:
    """``expand(v) / n -> conv(expand(v), 1 / n)``: what a mean over space gives back enters in blocks.

    Exact when: n is a number and not 0, and v is of the result's type.
    """
    for node in list(program.graph.nodes):
        if node.target not in (aten.div.Scalar, aten.div.Tensor) or node.kwargs or not _fills_blocks(node):
            continue
        v, count = node.args
        if not isinstance(count, int | float) or count == 0 or not isinstance(v, fx.Node) or v.target is not aten.expand.default:
            continue
        if not _fills_blocks(v):
            continue
        node.replace_all_uses_with(_times(program, node, v, 1.0 / count))
        program.graph.erase_node(node)


def transposed_into_blocks(program: fx.GraphModule) -> None:
    """``conv_transpose(v) -> conv(conv_transpose(v), 1)``, ``pixel_shuffle`` alike: what reads them gets blocks.

    A factor of 1 changes no value; what does not fill blocks gains nothing and stays.
    """
    for node in list(program.graph.nodes):
        transposed = node.target is aten.convolution.default and node.args[6]
        if (transposed or node.target is aten.pixel_shuffle.default) and _fills_blocks(node):
            made = _times(program, node.next, node, 1.0)
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)


def sums_as_averages(program: fx.GraphModule) -> None:
    """``sum(v) over space -> avg_pool(v) * (H W)``, where space is both of its dimensions and nothing else."""
    for node in list(program.graph.nodes):
        if node.target is not aten.sum.dim_IntList or node.kwargs or not _fills_blocks(node.args[0]):
            continue
        v, dims, *kept = node.args
        if sorted(d % 4 for d in dims) != [2, 3]:
            continue
        height, width = v.meta["val"].shape[2:]
        with program.graph.inserting_before(node):
            made: Any = program.graph.call_function(aten.avg_pool2d.default, (v, [height, width]))
            if kept != [True]:
                made = program.graph.call_function(aten.squeeze.dims, (made, [2, 3]))
            made = program.graph.call_function(aten.mul.Tensor, (made, float(height * width)))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)


ONNX_REWRITES = (
    transposed_as_products,
    transposed_as_convolutions,
    strided_as_convolutions,
    transposed_into_blocks,
    means_as_convolutions,
    gates_as_convolutions,
    sums_as_averages,
    gates_as_products,
)
"""In this order: what the blocks do not take becomes products."""
