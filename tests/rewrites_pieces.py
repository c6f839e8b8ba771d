"""Pieces of programs that rewrites are tried on: convolutions, gates, pools, columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.optimize.lower import memory

__all__ = [
    "BACK",
    "I",
    "L",
    "V",
    "aten",
    "batch",
    "columns",
    "conv",
    "early",
    "first_column",
    "gate",
    "mkldnn",
    "over",
    "packed",
    "pooled",
    "scattered",
    "share",
    "up",
    "written",
]

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
V, I, L = (4,), (4, 6, 5), (16, 6, 5)  # noqa: E741 - a vector, an image, an image of a whole block of channels
BACK = aten.max_pool2d_with_indices_backward.default


def batch(x: Any) -> Any:
    return aten.sym_size.int(x, 0)


def conv(c: Any, x: Any, *weight: int, **given: Any) -> Any:
    """A convolution with stride 1 and no padding where nothing else is said; ``w`` is the weight where it is given."""
    options = {
        "w": None,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "transposed": False,
        "output_padding": 0,
        "groups": 1,
    }
    options |= given
    weights = c(*weight) if options["w"] is None else options["w"]
    pair = {k: [v] * 2 for k, v in options.items() if k in ("stride", "padding", "dilation", "output_padding") and type(v) is int}
    o = {**options, **pair}
    return aten.convolution.default(
        x, weights, o["bias"], o["stride"], o["padding"], o["dilation"], o["transposed"], o["output_padding"], o["groups"]
    )


def up(c: Any, x: Any, *weight: int, **given: Any) -> Any:
    return conv(c, x, *weight, **({"transposed": True} | given))


def gate(v: Any, x: Any, threshold: float = 0, op: Any = aten.relu.default) -> Any:
    return aten.threshold_backward.default(v, op(x), threshold)


def written(x: Any) -> Any:
    return aten.exp.default(x)


def over(r: Any) -> Any:
    return aten.div.Tensor(r, aten.add.Tensor(r, 0.5))


def pooled(r: Any) -> Any:
    return aten.max_pool2d_with_indices.default(r, [2, 2], [2, 2])


def scattered(v: Any, pool: Any, x: Any, sizes: Any = None) -> Any:
    """Two columns of the pool's results carried back to their winners, as programs have it: ``[2, B, 4, 4, 6]``."""
    flat = aten.reshape.default(v, [2, -1, 4, 6])
    index = aten.expand.default(aten.reshape.default(pool[1], [-1, 4, 6]), [2, batch(x), 4, 6])
    zeros = aten.new_zeros.default(v, [2, batch(x), 4, 24])
    return aten.reshape.default(aten.scatter_add.default(zeros, -1, index, flat), sizes or [2, batch(x), 4, 4, 6])


def columns(x: Any, scale: float = 2.0) -> Any:
    """Two columns ``[2, B, 4, 2, 3]`` made of ``[B, 4, 4, 6]``."""
    small = aten.slice.Tensor(aten.slice.Tensor(x, 2, 0, 2), 3, 0, 3)
    return aten.cat.default([aten.unsqueeze.default(small, 0), aten.unsqueeze.default(aten.mul.Tensor(small, scale), 0)])


def packed(c: Any, x: Any, *weight: int) -> Any:
    return mkldnn._convolution_pointwise.default(x, c(*weight), None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def share(total: Any, v: Any, c: Any, size: int) -> Any:
    return aten.addmv.default(total, v, c(size))


def first_column(x: Any) -> Any:
    return aten.select.int(x, 1, 0)


def early(graph_module: fx.GraphModule) -> Any:
    """The pass on a program in which all is computed by rules."""
    for node in graph_module.graph.nodes:
        node.meta["phase"] = "rule"
    return memory.early_coefficients(graph_module)
