"""Lowering: the optimized program is put into the form that runs fastest on the device its parameters live on.

Every pass keeps the function; a pass that leaves a place as it was says so in a :class:`Refusal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.graph import describe, fetch

__all__ = ["PASSES", "Refusal", "channels_last", "flip_transposed", "free_views"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Refusal:
    """Something faster that was not done.

    Attributes:
        what: the improvement.
        where: node or module.
        why: the reason.
    """

    what: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} not used at {self.where}: {self.why}"


Pass = Callable[[fx.GraphModule], list[Refusal]]


def flip_transposed(graph_module: fx.GraphModule) -> list[Refusal]:
    """``conv_transpose(v, w), stride 1 -> conv(v, flip(w)^T)``: as fast as the forward convolution.

    Only on CPU: cuDNN's own backward-data kernels are as fast and need no second copy of the weights.
    """
    refused: list[Refusal] = []
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.convolution.default or not node.args[6]:
            continue
        v, weight, bias, stride, padding, dilation, _, output_padding, groups = node.args
        value = weight.meta["val"] if isinstance(weight, fx.Node) else None
        reason = _cannot_flip(weight, value, stride, padding, dilation, output_padding, groups)
        if reason:
            refused.append(Refusal("stride-1 transposed convolution as a convolution", node.name, reason))
            continue
        assert isinstance(weight, fx.Node) and isinstance(value, Tensor)
        flipped = _flipped(fetch(graph_module, str(weight.target)))
        name = f"{weight.target}_flipped"
        if not hasattr(graph_module, name):
            graph_module.register_buffer(name, flipped)
        with graph_module.graph.inserting_before(node):
            read = graph_module.graph.get_attr(name)
        read.meta = {**weight.meta, "val": value.new_empty(flipped.shape)}
        border = [d * (int(k) - 1) - p for d, k, p in zip(dilation, value.shape[2:], padding, strict=True)]
        node.args = (v, read, bias, stride, border, dilation, False, [0] * len(border), groups)
    graph_module.graph.eliminate_dead_code()
    return refused


def _cannot_flip(
    weight: Any, value: Any, stride: Any, padding: Any, dilation: Any, output_padding: Any, groups: Any
) -> str | None:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is not constant"
    if value.device.type != "cpu":
        return "the device has its own kernel for it"
    if any(s != 1 for s in stride) or any(output_padding):
        return f"stride {list(stride)}"
    if groups != 1:
        return f"{groups} groups"
    if any(d * (int(k) - 1) < p for d, k, p in zip(dilation, value.shape[2:], padding, strict=True)):
        return "padding wider than the kernel"
    if all(int(k) == 1 for k in value.shape[2:]):
        return "a 1x1 kernel: both are the same matrix product"
    return None


def _flipped(weight: Tensor) -> Tensor:
    return weight.flip(list(range(2, weight.dim()))).transpose(0, 1).contiguous()


def channels_last(graph_module: fx.GraphModule) -> list[Refusal]:
    """Puts the weights of 2-d convolutions into channels-last order; oneDNN then keeps activations in it throughout."""
    changed: set[str] = set()
    refused: list[Refusal] = []
    for node in graph_module.graph.nodes:
        weight = node.args[1] if node.target is aten.convolution.default else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        value = fetch(graph_module, str(weight.target))
        if value.dim() != 4 or value.device.type != "cpu":
            refused.append(Refusal("channels-last", node.name, f"{describe(value)} on {value.device.type}"))
        elif str(weight.target) not in changed:
            changed.add(str(weight.target))
            _replace_buffer(graph_module, str(weight.target), value.contiguous(memory_format=torch.channels_last))
    return refused


def _replace_buffer(graph_module: fx.GraphModule, name: str, value: Tensor) -> None:
    graph_module.register_buffer(name, value)


def free_views(graph_module: fx.GraphModule) -> list[Refusal]:
    """``view(x) -> reshape(x)``: in channels-last order a view may need a copy, and reshape makes it where it does."""
    for node in graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return []


PASSES: tuple[Pass, ...] = (flip_transposed, channels_last, free_views)
