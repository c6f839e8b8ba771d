"""Maps that move elements about: slices, places, pads, shuffles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.core.sizes import Shape
from frpc.maps.base import LinearMap, folded

__all__ = ["Pad", "Place", "Shuffle", "Slice"]


class Slice(LinearMap):
    """``z = a[start:stop:step]`` along one dimension."""

    def __init__(self, dim: int, start: int, stop: int, step: int, operand: Shape, result: Shape) -> None:
        self.dim = dim - len(operand) if dim >= 0 else dim  # counted from the end: columns come in front
        self.start, self.stop, self.step = start, stop, step
        self.operand, self.result = operand, result

    def push(self, u: Tensor) -> Tensor:
        return torch.ops.aten.slice(u, self.dim, self.start, self.stop, self.step)

    def pull(self, v: Tensor) -> Tensor:
        sizes = [*self.lead(v, self.result), *self.operand]
        return torch.ops.aten.slice_backward(v, sizes, len(sizes) + self.dim, self.start, self.stop, self.step)


class Place(LinearMap):
    """The operand put at ``start`` along one dimension of a larger zero tensor: one member of a concatenation."""

    def __init__(self, dim: int, start: int, operand: Shape, result: Shape) -> None:
        self.cut = Slice(dim, start, start + operand[dim], 1, result, operand)
        self.operand, self.result = operand, result

    def push(self, u: Tensor) -> Tensor:
        return self.cut.pull(u)

    def pull(self, v: Tensor) -> Tensor:
        return self.cut.push(v)


class Pad(LinearMap):
    """The operand inside a frame of zeros; ``padding`` is ``F.pad``'s: two numbers an axis, the last axis first."""

    def __init__(self, padding: Sequence[int], operand: Shape, result: Shape) -> None:
        self.padding = list(padding)
        self.operand, self.result = operand, result

    def push(self, u: Tensor) -> Tensor:
        return torch.ops.aten.constant_pad_nd(u, self.padding, 0)

    def pull(self, v: Tensor) -> Tensor:
        return torch.ops.aten.constant_pad_nd(v, [-p for p in self.padding], 0)

    def around(self, axis: int) -> tuple[int, int]:
        """Returns the cells added before and after along an axis, counted from the front."""
        at = 2 * (len(self.operand) - 1 - axis)
        return (self.padding[at], self.padding[at + 1]) if at < len(self.padding) else (0, 0)


class Shuffle(LinearMap):
    """Channels of ``[B, C, *spatial]`` dealt out: ``[g, C/g]`` transposed to ``[C/g, g]``."""

    def __init__(self, groups: int, operand: Shape) -> None:
        self.groups = groups
        self.operand = self.result = operand

    def push(self, u: Tensor) -> Tensor:
        return folded(lambda x: torch.channel_shuffle(x, self.groups), u, len(self.operand))

    def pull(self, v: Tensor) -> Tensor:
        back = int(self.operand[1]) // self.groups
        return folded(lambda x: torch.channel_shuffle(x, back), v, len(self.operand))

    def order(self, channels: int) -> Tensor:
        """Returns which operand channel each result channel is."""
        return torch.arange(channels).view(self.groups, -1).t().reshape(-1)
