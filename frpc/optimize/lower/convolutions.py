"""Convolutions as they are: transposed ones as plain ones, and weights in channels-last order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import describe, fetch, hold
from frpc.core.refusal import Refusal

__all__ = ["channels_last", "flip_transposed", "transposed_to_pixel_shuffle"]

aten = torch.ops.aten
_NO_KERNELS = "oneDNN has no kernels for float64, and PyTorch's gain nothing from a second copy of the weights"
VECTOR = 16  # output channels that one vector register holds in float32: a kernel computes as many, wanted or not


@dataclass(frozen=True)
class _Blocks:
    """A transposed convolution along one axis, its results in blocks of ``size``.

    With ``y = size Y + r`` and ``i = step Y + j``: ``out[y] = sum_ij v[i] w[r + padding - j stride]``.

    Attributes:
        first, taps: the least j, and how many there are.
        step: inputs a block moves on.
        padding: symmetric, of the plain convolution; its first ``skipped`` blocks lie before the result.
        blocks: how many blocks make the result.
    """

    size: int
    stride: int
    origin: int
    kernel: int
    first: int
    taps: int
    step: int
    padding: int
    skipped: int
    blocks: int

    @classmethod
    def of(cls, stride: int, padding: int, kernel: int, inputs: int, outputs: int) -> _Blocks:
        size = stride if stride > 1 else 2
        step = size // stride
        first = -((kernel - 1 - padding) // stride)
        taps = (size - 1 + padding) // stride - first + 1
        blocks = -(-outputs // size)
        skipped = 0
        while True:  # the padding in front is fixed up to whole blocks; behind, there has to be enough
            front = skipped * step - first
            if front >= 0 and (inputs + 2 * front - taps) // step + 1 >= skipped + blocks:
                return cls(size, stride, padding, kernel, first, taps, step, front, skipped, blocks)
            skipped += 1

    def places(self) -> Tensor:
        """Which kernel element each tap uses for each r, ``[size, taps]``; ``kernel`` stands for none."""
        r, j = torch.arange(self.size)[:, None], torch.arange(self.taps)[None] + self.first
        k = r + self.origin - j * self.stride
        return torch.where((k >= 0) & (k < self.kernel), k, self.kernel)


def transposed_to_pixel_shuffle(graph_module: fx.GraphModule) -> list[Refusal]:
    """``conv_transpose(v, w), stride s, few channels -> pixel_shuffle(conv(v, w'))``: blocks of s x s pixels as channels.

    The way back ends at an image of three channels, and kernels compute a vector of them: the rest of it was wasted. Blocks are
    2 x 2 where the stride is 1.

    Exact when: the weights are constant, neither grouped nor dilated, the stride is one for both axes, and the image's size is
    known. The kernel of blocks depends on stride and padding, and is one for each.
    """
    refused: list[Refusal] = []
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.convolution.default or not node.args[6] or not _wastes_vectors(node):
            continue
        reason = _cannot_paint(node)
        if reason:
            refused.append(Refusal("blocks of pixels as channels", node.name, reason))
            continue
        _paint(graph_module, node)
    graph_module.graph.eliminate_dead_code()
    return refused


def _wastes_vectors(node: fx.Node) -> bool:
    """Says whether a transposed convolution makes so few channels that a vector of them is mostly empty."""
    given: Any = node.args
    weight, groups = given[1], given[8]
    if not isinstance(weight, fx.Node) or not isinstance(groups, int):  # as many groups as samples
        return False
    return int(weight.meta["val"].shape[1]) * groups <= VECTOR // 4


def _cannot_paint(node: fx.Node) -> str | None:
    given: Any = node.args
    v, weight, _, stride, _, dilation, _, _, groups = given
    value = weight.meta["val"]
    if weight.op != "get_attr":
        return "its weight is not constant"
    if value.device.type != "cpu" or value.dim() != 4:
        return f"{describe(value)} on {value.device.type}"
    if groups != 1 or any(d != 1 for d in dilation):
        return f"{groups} groups, dilation {list(dilation)}"
    if stride[0] != stride[1]:
        return f"stride {list(stride)}"
    if not all(isinstance(n, int) for n in v.meta["val"].shape[2:]):
        return "its image is of no fixed size"
    return None


def _paint(graph_module: fx.GraphModule, node: fx.Node) -> None:
    given: Any = node.args
    v, weight, bias, stride, padding, _, _, _, _ = given
    graph, value, out = graph_module.graph, fetch(graph_module, str(weight.target)), node.meta["val"]
    axes = [
        _Blocks.of(stride[a], padding[a], int(value.shape[2 + a]), int(v.meta["val"].shape[2 + a]), int(out.shape[2 + a]))
        for a in (0, 1)
    ]
    name = hold(graph_module, f"{weight.target}_blocks", _blocked(value, axes))
    size = axes[0].size
    with graph.inserting_before(node):
        read = graph.get_attr(name)
        read.meta = {**weight.meta, "val": value.new_empty(getattr(graph_module, name).shape)}
        geometry = ([a.step for a in axes], [a.padding for a in axes], [1, 1], False, [0, 0], 1)
        result = graph.call_function(aten.convolution.default, (v, read, None, *geometry))
        result.meta = _with(node, [out.shape[1] * size**2, *(_count(a, v, 2 + i) for i, a in enumerate(axes))])
        result = _cut(graph, node, result, [a.skipped for a in axes], [a.blocks for a in axes])
        result = graph.call_function(aten.pixel_shuffle.default, (result, size))
        result.meta = _with(node, [out.shape[1], *(a.blocks * size for a in axes)])
        result = _cut(graph, node, result, [0, 0], [int(n) for n in out.shape[2:]])
        if bias is not None:
            shift = graph.call_function(aten.view.default, (bias, [-1, 1, 1]))
            shift.meta = {**bias.meta, "val": bias.meta["val"].view(-1, 1, 1)}
            result = graph.call_function(aten.add.Tensor, (result, shift))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _blocked(weight: Tensor, axes: Sequence[_Blocks]) -> Tensor:
    """``w'[(o, r1, r2), c, j1, j2] = w[c, o, k(r1, j1), k(r2, j2)]``, 0 where the kernel has no such element."""
    framed = torch.nn.functional.pad(weight, (0, 1, 0, 1))
    rows, columns = (a.places() for a in axes)
    picked = framed[:, :, rows[:, None, :, None], columns[None, :, None, :]]  # [C, O, r1, r2, j1, j2]
    return picked.permute(1, 2, 3, 0, 4, 5).reshape(-1, weight.shape[0], *picked.shape[4:]).contiguous()


def _count(axis: _Blocks, v: fx.Node, dim: int) -> int:
    return (int(v.meta["val"].shape[dim]) + 2 * axis.padding - axis.taps) // axis.step + 1


def _with(node: fx.Node, sizes: Sequence[Any]) -> dict[str, Any]:
    value = node.meta["val"]
    return {**node.meta, "val": value.new_empty([value.shape[0], *sizes])}


def _cut(graph: fx.Graph, node: fx.Node, x: fx.Node, starts: Sequence[int], sizes: Sequence[int]) -> fx.Node:
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True), start=2):
        shape = list(x.meta["val"].shape)
        if start or size != shape[dim]:
            x = graph.call_function(aten.slice.Tensor, (x, dim, start, start + size))
            x.meta = _with(node, [*shape[1:dim], size, *shape[dim + 1 :]])
    return x


def flip_transposed(graph_module: fx.GraphModule) -> list[Refusal]:
    """``conv_transpose(v, w), stride 1 -> conv(v, flip(w)^T)``: as fast as the forward convolution, and sums go into it.

    Only where oneDNN computes: other kernels for the way back are as fast and need no second copy of the weights.

    Exact when: the weights are constant and not grouped, the stride is 1, nothing is added to the result's size, and no more is
    cut off than the kernel is wide.
    """
    refused: list[Refusal] = []
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.convolution.default or not node.args[6]:
            continue
        given: Any = node.args
        v, weight, bias, stride, padding, dilation, _, output_padding, groups = given
        value = weight.meta["val"] if isinstance(weight, fx.Node) else None
        reason = _cannot_flip(weight, value, stride, padding, dilation, output_padding, groups)
        if reason:
            refused.append(Refusal("stride-1 transposed convolution as a convolution", node.name, reason))
            continue
        assert isinstance(weight, fx.Node) and isinstance(value, Tensor)
        name = hold(graph_module, f"{weight.target}_flipped", _flipped(fetch(graph_module, str(weight.target))))
        with graph_module.graph.inserting_before(node):
            read = graph_module.graph.get_attr(name)
        read.meta = {**weight.meta, "val": value.new_empty(getattr(graph_module, name).shape)}
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
    if value.dtype is torch.float64:
        return _NO_KERNELS
    if any(s != 1 for s in stride) or any(output_padding):
        return f"stride {list(stride)}"
    if groups != 1:
        return f"{groups} groups"
    if any(d * (int(k) - 1) < p for d, k, p in zip(dilation, value.shape[2:], padding, strict=True)):
        return "padding wider than the kernel"
    return None


def _flipped(weight: Tensor) -> Tensor:
    return weight.flip(list(range(2, weight.dim()))).transpose(0, 1).contiguous()


def channels_last(graph_module: fx.GraphModule) -> list[Refusal]:
    """Puts the weights of 2-d convolutions into channels-last order; oneDNN then keeps activations in it throughout.

    The same values in another order of memory, also for whatever else reads them.
    """
    changed: set[str] = set()
    refused: list[Refusal] = []
    for node in graph_module.graph.nodes:
        weight = node.args[1] if node.target is aten.convolution.default else None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        value = fetch(graph_module, str(weight.target))
        if value.dim() != 4 or value.device.type != "cpu":
            refused.append(Refusal("channels-last", node.name, f"{describe(value)} on {value.device.type}"))
        elif value.dtype is torch.float64:
            refused.append(Refusal("channels-last", node.name, _NO_KERNELS))
        elif str(weight.target) not in changed:
            changed.add(str(weight.target))
            graph_module.register_buffer(str(weight.target), value.contiguous(memory_format=torch.channels_last))
    return refused
