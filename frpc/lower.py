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

__all__ = ["PASSES", "Refusal", "channels_last", "flip_transposed", "free_views", "reuse_memory"]

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


_IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.abs.default: aten.abs_.default,
    aten.neg.default: aten.neg_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
_FRESH = {  # operators whose result is memory of its own, written in full
    *_IN_PLACE,
    *_IN_PLACE.values(),
    aten.convolution.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.threshold_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.gather.default,
    aten.where.self,
    aten.gelu.default,
    aten.silu.default,
}


def reuse_memory(graph_module: fx.GraphModule) -> list[Refusal]:
    """``f(x) -> f_(x)`` where x is a result that nobody reads later: no new memory is touched, which costs more than the work."""
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if node.target not in _IN_PLACE or node.kwargs:
            continue
        overwritten = node.args[0]
        if not isinstance(overwritten, fx.Node) or not _read_last(overwritten, node, order):
            swapped = node.args[1] if node.target in (aten.add.Tensor, aten.mul.Tensor) else None
            if not isinstance(swapped, fx.Node) or not _read_last(swapped, node, order):
                continue
            node.args = (swapped, node.args[0])
        node.target = _IN_PLACE[node.target]
    return []


def _read_last(x: fx.Node, reader: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Says whether x is fresh memory that ``reader`` reads once and last, and that its result fits into."""
    if x.target not in _FRESH or list(reader.args).count(x) != 1:
        return False
    if any(order[user] > order[reader] or user.target not in _FRESH for user in x.users if user is not reader):
        return False  # read later, or seen through a view that may be
    here, there = x.meta.get("val"), reader.meta.get("val")
    if not isinstance(here, Tensor) or not isinstance(there, Tensor) or here.dtype != there.dtype:
        return False
    return here.dim() == there.dim() and all(str(a) == str(b) for a, b in zip(here.shape, there.shape, strict=True))


PASSES: tuple[Pass, ...] = (flip_transposed, channels_last, free_views, reuse_memory)
