"""Rewrites for runtimes that are not PyTorch: the same function, in operators that they have and run fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import fetch, hold

__all__ = ["BLOCK", "gates_as_products", "read", "strided_as_convolutions", "transposed_as_convolutions"]

aten = torch.ops.aten

BLOCK = 16
"""Channels that ONNX Runtime computes together, at most; convolutions of fewer cost as much."""


def transposed_as_convolutions(program: fx.GraphModule) -> None:
    """``conv_transpose(v, w), stride 1 -> conv(v, flip(w)^T)``: runtimes that block channels do so in convolutions alone.

    Exact when: the weights are constant, nothing is added to the result's size, and no more is cut off than the kernel is wide.
    """
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
        flipped = read(program, node, f"{weight.target}_flipped_{groups}", _flipped(value, groups))
        node.args = (v, flipped, bias, stride, border, dilation, False, output_padding, groups)
    program.graph.eliminate_dead_code()


def strided_as_convolutions(program: fx.GraphModule) -> None:
    """``conv_transpose(v, w), stride s -> pixel_shuffle(conv(v, w'), s)``: each of s x s neighbours reads its own taps of w.

    ``y[s t + r] = sum_m v[t + d - m] w[s m + c]`` with ``r + p = s d + c``. Only where the result has s times the input's sides;
    1x1 kernels, of which most neighbours read nothing, stay. Where neighbours read different numbers of taps, and channels fill
    blocks, each has a convolution of its own, which multiplies by no zeros.

    Exact when: the weights are constant, neither grouped nor dilated, images of fixed size, and there is no bias.
    """
    for node in list(program.graph.nodes):
        if node.target is not aten.convolution.default or not node.args[6] or node.args[2] is not None:
            continue
        v, weight, _, stride, padding, dilation, _, _, groups = node.args
        constant = isinstance(weight, fx.Node) and weight.op == "get_attr"
        if not constant or groups != 1 or stride[0] < 2 or len(set(stride)) > 1 or len(stride) != 2 or set(dilation) != {1}:
            continue
        value, step = fetch(program, str(weight.target)), stride[0]
        if not all(isinstance(n, int) for n in (*v.meta["val"].shape[2:], *node.meta["val"].shape[2:])):
            continue
        sides = [(int(a), int(b)) for a, b in zip(v.meta["val"].shape[2:], node.meta["val"].shape[2:], strict=True)]
        if any(step * a != b for a, b in sides) or max(value.shape[2:]) == 1:
            continue
        apart = value.shape[1] % BLOCK == 0 and _taps_differ(value, step, padding)
        shuffled = (_each_neighbour if apart else _all_neighbours)(program, node, v, value, step, padding)
        shuffled.meta = dict(node.meta)
        node.replace_all_uses_with(shuffled)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _all_neighbours(
    program: fx.GraphModule, node: fx.Node, v: fx.Node, weight: Tensor, step: int, padding: Sequence[int]
) -> fx.Node:
    """One convolution for all neighbours, whose kernels are filled up with zeros."""
    kernel, frame = _neighbours(weight, step, padding)
    found = _plain_convolution(program, node, v, frame, f"{node.args[1]}_neighbours", kernel)
    with program.graph.inserting_before(node):
        return program.graph.call_function(aten.pixel_shuffle.default, (found, step))


def _each_neighbour(
    program: fx.GraphModule, node: fx.Node, v: fx.Node, weight: Tensor, step: int, padding: Sequence[int]
) -> fx.Node:
    """A convolution for each neighbour, side by side in the channels."""
    rows, columns = (_taps(int(size), step, p) for size, p in zip(weight.shape[2:], padding, strict=True))
    parts = []
    for i, j in product(range(step), repeat=2):
        kernel, frame = _neighbour(weight, [t for t in rows if t[1] == i], [t for t in columns if t[1] == j])
        parts.append(_plain_convolution(program, node, v, frame, f"{node.args[1]}_neighbour_{i}_{j}", kernel))
    with program.graph.inserting_before(node):
        joined = program.graph.call_function(aten.cat.default, (parts, 1))  # [B, s s O, H, W]
        by_channel = program.graph.call_function(aten.channel_shuffle.default, (joined, step * step))  # [B, O s s, H, W]
        return program.graph.call_function(aten.pixel_shuffle.default, (by_channel, step))


def _plain_convolution(
    program: fx.GraphModule, node: fx.Node, v: fx.Node, frame: Sequence[int], name: str, kernel: Tensor
) -> fx.Node:
    weight = read(program, node, name, kernel)
    with program.graph.inserting_before(node):
        framed = program.graph.call_function(aten.constant_pad_nd.default, (v, frame, 0.0)) if any(frame) else v
        plain = (framed, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return program.graph.call_function(aten.convolution.default, plain)


def _taps_differ(weight: Tensor, step: int, padding: Sequence[int]) -> bool:
    """Says whether some neighbours read fewer taps than others, and all read some."""
    axes = [_taps(int(size), step, p) for size, p in zip(weight.shape[2:], padding, strict=True)]
    counts = [Counter(neighbour for _, neighbour, _ in axis) for axis in axes]
    return all(len(c) == step for c in counts) and any(len(set(c.values())) > 1 for c in counts)


Taps = list[tuple[int, int, int]]


def _neighbour(weight: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, list[int]]:
    """The kernel ``[O, I, *l]`` of one neighbour's own taps, and the frame of zeros that it wants around v (negative: cut)."""
    chosen = [sorted((offset, tap) for offset, _, tap in axis) for axis in (rows, columns)]
    kernel = weight[:, :, [tap for _, tap in chosen[0]]][..., [tap for _, tap in chosen[1]]].transpose(0, 1)
    return kernel.contiguous(), [side for axis in reversed(chosen) for side in (-axis[0][0], axis[-1][0])]


def _neighbours(weight: Tensor, step: int, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The kernel ``[O s s, I, *L]`` in which every neighbour has its taps, and the frame of zeros that it wants around v."""
    taps = [_taps(int(size), step, p) for size, p in zip(weight.shape[2:], padding, strict=True)]
    spans = [(min(t[0] for t in axis), max(t[0] for t in axis)) for axis in taps]  # of offsets from v's own place
    lengths = [last - first + 1 for first, last in spans]
    kernel = weight.new_zeros([weight.shape[1], step, step, weight.shape[0], *lengths])
    for rows, i, k in taps[0]:
        for columns, j, m in taps[1]:
            kernel[:, i, j, :, rows - spans[0][0], columns - spans[1][0]] = weight[:, :, k, m].t()
    frame = [side for first, last in reversed(spans) for side in (-first, last)]  # PyTorch pads the last axis first
    return kernel.flatten(0, 2), frame


def _taps(size: int, step: int, padding: int) -> Taps:
    """``(offset, neighbour, tap)`` of every tap along one axis: neighbour r reads ``v[t + offset]`` by tap ``s m + c``."""
    found = []
    for neighbour in range(step):
        shift, first = divmod(neighbour + padding, step)
        found += [(shift - m, neighbour, step * m + first) for m in range((size - first + step - 1) // step)]
    return found


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """``[g I, O, *k] -> [g O, I, *k]``, turned round in space."""
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return grouped.flip(list(range(2, weight.dim()))).contiguous()


def read(program: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Reads a constant of the program, which is added unless it is there, under a name or one like it."""
    held = hold(program, name, value)
    with program.graph.inserting_before(before):
        return program.graph.get_attr(held)


def gates_as_products(program: fx.GraphModule) -> None:
    """``threshold_backward(v, r, t) -> v * (r > t)``: a product of numbers runs on all cores, a choice between them does not.

    Exact when: v is finite and r is a number. Where one is not, the account is lost already.
    """
    for node in list(program.graph.nodes):
        if node.target is not aten.threshold_backward.default:
            continue
        v, rectified, threshold = node.args
        with program.graph.inserting_before(node):
            gate: Any = program.graph.call_function(aten.gt.Scalar, (rectified, threshold))
            gate = program.graph.call_function(aten._to_copy.default, (gate,), {"dtype": node.meta["val"].dtype})
            gated = program.graph.call_function(aten.mul.Tensor, (v, gate))
        gated.meta = dict(node.meta)
        node.replace_all_uses_with(gated)
        program.graph.erase_node(node)
