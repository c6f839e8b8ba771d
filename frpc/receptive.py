"""Receptive fields: which input rows and columns a neuron can see, as exact intervals computed before the program runs.

For every node a :class:`Field` holds, for each spatial axis of the input, the interval ``[low, high)`` of every position along
the node's own axis. Convolutions and pools widen intervals tap by tap and clip at the border, elementwise operators keep
them, branches unite. Where locality ends (flatten, global pooling, anything not listed) the field is the whole input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.affine import bind
from frpc.assign import Assignment
from frpc.graph import first_result

__all__ = ["Field", "receptive_fields"]

aten = torch.ops.aten
Interval = tuple[Tensor, Tensor]  # two int64 vectors: low and high per position


@dataclass(frozen=True)
class Field:
    """The receptive field of a node ``[B, C, *spatial']`` in an input ``[B, C0, *spatial]``.

    Attributes:
        axes: for each spatial axis the intervals, or None where every neuron may see the whole input.
    """

    axes: tuple[Interval, ...] | None

    @property
    def local(self) -> bool:
        return self.axes is not None

    def spread(self, axis: int, size: int, dtype: torch.dtype) -> Tensor:
        """Returns the ``[positions, size]`` matrix whose row i is ``1/(high - low)`` inside ``[low, high)`` and 0 outside."""
        assert self.axes is not None
        low, high = self.axes[axis]
        cells = torch.arange(size, device=low.device)
        inside = (cells >= low[:, None]) & (cells < high[:, None])
        return inside.to(dtype) / (high - low)[:, None].to(dtype)


WHOLE = Field(None)


def receptive_fields(assignment: Assignment) -> dict[fx.Node, Field]:
    """Returns the field of every node that carries relevance.

    With several inputs, or inputs without spatial axes, every field is the whole input.
    """
    sources = assignment.sources
    shape = sources[0].meta["val"].shape
    if len(sources) != 1 or len(shape) < 3:
        return dict.fromkeys(assignment.carried, WHOLE)
    points = tuple((torch.arange(int(n)), torch.arange(1, int(n) + 1)) for n in shape[2:])
    fields: dict[fx.Node, Field] = {sources[0]: Field(points)}
    for node in assignment.graph_module.graph.nodes:
        if node in assignment.carried and node not in fields:
            fields[node] = _field(node, assignment, fields)
    return fields


def _field(node: fx.Node, assignment: Assignment, fields: dict[fx.Node, Field]) -> Field:
    if node not in assignment.rules:  # getitem: the operator's first result
        return fields[node.args[0]]  # type: ignore[index]
    operands = [fields[n] for n in assignment.rules[node].operands.values()]
    joined = operands[0]
    for other in operands[1:]:
        joined = _unite(joined, other)
    if joined.axes is None:
        return WHOLE
    widen = _WIDEN.get(node.target, _keep)
    return Field(widen(node, joined.axes)) if _fits(node, joined, widen) else WHOLE


def _fits(node: fx.Node, field: Field, widen: Callable[..., Any]) -> bool:
    """Elementwise operators must keep the spatial shape; other operators must be known."""
    assert field.axes is not None
    value = first_result(node.meta["val"])
    if value.dim() != len(field.axes) + 2:
        return False
    if widen is not _keep:
        return True
    same = all(isinstance(n, int) and n == len(low) for n, (low, _) in zip(value.shape[2:], field.axes, strict=True))
    return same and node.target not in _MOVES


def _unite(one: Field, other: Field) -> Field:
    if one.axes is None or other.axes is None or len(one.axes) != len(other.axes):
        return WHOLE
    axes = []
    for (low, high), (low2, high2) in zip(one.axes, other.axes, strict=True):
        if len(low) != len(low2) and 1 not in (len(low), len(low2)):
            return WHOLE
        axes.append((torch.minimum(low, low2), torch.maximum(high, high2)))
    return Field(tuple(axes))


def _keep(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    return axes


def _windows(interval: Interval, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Unites the intervals of the taps ``i * stride - padding + k * dilation`` that lie inside the operand."""
    low, high = interval
    taps = torch.arange(count)[:, None] * stride - padding + torch.arange(kernel)[None] * dilation
    inside = (taps >= 0) & (taps < len(low))
    at = taps.clamp(0, len(low) - 1)
    new_low = torch.where(inside, low[at], torch.iinfo(torch.int64).max).amin(1)
    new_high = torch.where(inside, high[at], 0).amax(1)
    empty = ~inside.any(1)  # a window of padding alone: give it the border it lies at
    edge = at[:, 0]
    return torch.where(empty, low[edge], new_low), torch.where(empty, high[edge], new_high)


def _convolution(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    given = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    kernel, sizes = given["weight"].meta["val"].shape[2:], node.meta["val"].shape[2:]
    out = []
    for i, interval in enumerate(axes):
        stride, padding, dilation = given["stride"][i], given["padding"][i], given["dilation"][i]
        if given["transposed"]:
            out.append(_transposed_windows(interval, int(sizes[i]), int(kernel[i]), stride, padding, dilation))
        else:
            out.append(_windows(interval, int(sizes[i]), int(kernel[i]), stride, padding, dilation))
    return tuple(out)


def _transposed_windows(interval: Interval, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Interval:
    """Position i of a transposed convolution gathers operand positions j with ``j * stride - padding + k * dilation == i``."""
    low, high = interval
    reach = torch.arange(count)[:, None] + padding - torch.arange(kernel)[None] * dilation
    at = torch.div(reach, stride, rounding_mode="floor")
    inside = (reach % stride == 0) & (at >= 0) & (at < len(low))
    at = at.clamp(0, len(low) - 1)
    new_low = torch.where(inside, low[at], torch.iinfo(torch.int64).max).amin(1)
    new_high = torch.where(inside, high[at], 0).amax(1)
    empty = ~inside.any(1)
    return torch.where(empty, low[at[:, 0]], new_low), torch.where(empty, high[at[:, 0]], new_high)


def _pool(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    given = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    value = first_result(node.meta["val"])
    sizes, count = value.shape[2:], len(axes)
    kernel = _each(given["kernel_size"], count)
    stride = _each(given["stride"], count) or kernel
    padding, dilation = _each(given["padding"], count), _each(given.get("dilation", 1), count)
    return tuple(_windows(axes[i], int(sizes[i]), kernel[i], stride[i], padding[i], dilation[i]) for i in range(count))


def _adaptive(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Window i of an adaptive pool covers ``floor(i n/m) .. ceil((i + 1) n/m)``."""
    value = first_result(node.meta["val"])
    out = []
    for (low, high), m in zip(axes, value.shape[2:], strict=True):
        n, i = len(low), torch.arange(int(m))
        first, last = (i * n) // int(m), ((i + 1) * n + int(m) - 1) // int(m) - 1
        out.append((low[first], high[last]))
    return tuple(out)


def _slice(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    given = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    axis = given["dim"] % (len(axes) + 2) - 2
    if axis < 0:
        return axes
    cut = slice(given["start"], given["end"], given["step"])
    return tuple((low[cut], high[cut]) if i == axis else (low, high) for i, (low, high) in enumerate(axes))


def _pad(node: fx.Node, axes: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Padded cells see what the border cell sees; they are constants anyway."""
    padding = list(node.args[1])  # type: ignore[arg-type]
    out = list(axes)
    for i in range(len(axes)):
        at = 2 * (len(axes) - 1 - i)
        before, after = (padding[at], padding[at + 1]) if at < len(padding) else (0, 0)
        low, high = axes[i]
        positions = (torch.arange(len(low) + before + after) - before).clamp(0, len(low) - 1)
        out[i] = (low[positions], high[positions])
    return tuple(out)


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


_WIDEN: dict[Any, Callable[[fx.Node, tuple[Interval, ...]], tuple[Interval, ...]]] = {
    aten.convolution.default: _convolution,
    aten.max_pool2d_with_indices.default: _pool,
    aten.max_pool3d_with_indices.default: _pool,
    aten.avg_pool1d.default: _pool,
    aten.avg_pool2d.default: _pool,
    aten.avg_pool3d.default: _pool,
    aten.adaptive_avg_pool1d.default: _adaptive,
    aten.adaptive_avg_pool2d.default: _adaptive,
    aten.adaptive_avg_pool3d.default: _adaptive,
    aten.adaptive_max_pool2d.default: _adaptive,
    aten.adaptive_max_pool3d.default: _adaptive,
    aten.slice.Tensor: _slice,
    aten.constant_pad_nd.default: _pad,
}

_MOVES: set[Sequence[Any] | Any] = {  # operators that keep the shape and still move cells about: locality is lost in them
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.flip.default,
    aten.roll.default,
    aten.linear.default,
}
