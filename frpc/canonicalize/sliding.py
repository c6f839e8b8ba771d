"""Convolutions and max pooling, one operator for all kinds."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import replace
from frpc.core.torch_compat import OpOverload

__all__ = ["expose_winners", "unify_convolutions"]

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_WITH_WINNERS: dict[Any, OpOverload] = {
    aten.max_pool1d.default: aten.max_pool2d_with_indices.default,
    aten.max_pool2d.default: aten.max_pool2d_with_indices.default,
    aten.max_pool3d.default: aten.max_pool3d_with_indices.default,
}


def unify_convolutions(graph_module: fx.GraphModule) -> bool:
    """``conv{1,2,3}d``, ``conv_transpose{1,2,3}d`` and string padding ``-> aten.convolution``, one operator for all.

    An input without a batch is one sample: ``conv(x) -> squeeze(convolution(unsqueeze(x)))``.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_CONVOLUTIONS, *_TRANSPOSED):
        x, spatial = given["input"], given["weight"].meta["val"].dim() - 2
        alone = x.meta["val"].dim() == spatial + 1
        x = edit.call(aten.unsqueeze.default, x, 0) if alone else x
        padding, dilation = given["padding"], _each(given["dilation"], spatial)
        if isinstance(padding, str):
            x, padding = _string_padding(edit, x, padding, given["weight"].meta["val"].shape[2:], dilation)
        new = edit.call(
            aten.convolution.default,
            x,
            given["weight"],
            given["bias"],
            _each(given["stride"], spatial),
            _each(padding, spatial),
            dilation,
            node.target in _TRANSPOSED,
            _each(given.get("output_padding", [0]), spatial),
            given["groups"],
        )
        replace(node, edit.call(aten.squeeze.dim, new, 0) if alone else new)
        changed = True
    return changed


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _string_padding(
    edit: Editor, x: fx.Node, padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[fx.Node, list[int]]:
    """``"same"`` pads ``d (k - 1)`` in all; where that is odd, the extra cell goes to the far side, by an explicit pad."""
    if padding == "valid":
        return x, [0] * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        x = edit.call(aten.constant_pad_nd.default, x, extra, 0.0)
    return x, [t // 2 for t in total]


def expose_winners(graph_module: fx.GraphModule) -> bool:
    """``max_pool(x) -> max_pool_with_indices(x)[0]``: the rule reads the winners from the second result.

    One dimension is pooled as two, the first of size 1. A stride that is not given is the kernel's size.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_WITH_WINNERS):
        flat = node.target is aten.max_pool1d.default
        x = edit.call(aten.unsqueeze.default, given["self"], -2) if flat else given["self"]
        names, neutral = ("kernel_size", "stride", "padding", "dilation"), (1, 1, 0, 1)
        sizes = [_each(given[name], 1) for name in names]
        window = [[n, *a] if flat and a else a for a, n in zip(sizes, neutral, strict=True)]
        pooled = edit.call(_WITH_WINNERS[node.target], x, *window, given["ceil_mode"])
        new = edit.call(operator.getitem, pooled, 0)
        replace(node, edit.call(aten.squeeze.dim, new, -2) if flat else new)
        changed = True
    return changed
