"""Maps of pooling: averages, distances from averages, and winners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frpc.core.sizes import Shape, size_hint
from frpc.maps.base import LinearMap, LinearOp, folded

__all__ = ["Center", "LinearPool", "Pool", "Select", "Window"]

Window = Sequence[tuple[int, int, int, int]]
"""``(kernel, stride, padding, dilation)`` along each spatial axis."""


class Pool(LinearOp):
    """A pooling or resizing operator that is linear and treats samples independently, e.g. average pooling.

    ``function`` maps ``[B, C, *spatial]`` to ``[B, C, *spatial']``; columns are folded into the batch.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], operand: Shape, result: Shape) -> None:
        super().__init__(lambda u: folded(function, u, len(operand)), operand, result)


class LinearPool(Pool):
    """Average pooling with windows that step evenly.

    Args:
        window: ``(kernel, stride, padding, dilation)`` along each spatial axis.
        count_padding: padding counts in the divisor.
        divisor: a fixed divisor instead of the count.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        operand: Shape,
        result: Shape,
        window: Window,
        count_padding: bool = True,
        divisor: int | None = None,
    ) -> None:
        super().__init__(function, operand, result)
        self.window, self.count_padding, self.divisor = window, count_padding, divisor

    def geometry_2d(self) -> Window:
        """The window along rows and columns; one spatial axis counts as columns."""
        return self.window if len(self.window) == 2 else [(1, 1, 0, 1), *self.window]

    def inverse_divisor(self) -> Tensor:
        """Returns one over the divisor of every position, ``[H, W]``."""
        sizes = [size_hint(n) for n in self.operand[2:]]
        counts = [self._counts(n, size_hint(m), line) for n, m, line in zip(sizes, self.result[2:], self.window, strict=True)]
        counts = counts if len(counts) == 2 else [torch.ones(1), *counts]
        product = counts[0][:, None] * counts[1][None]
        return 1.0 / (product if self.divisor is None else torch.full_like(product, float(self.divisor)))

    def _counts(self, size: int, positions: int, line: tuple[int, int, int, int]) -> Tensor:
        kernel, stride, padding, _ = line
        first = torch.arange(positions) * stride - padding
        last = (first + kernel).clamp(max=size + padding)  # ceil_mode may run past the padding
        if not self.count_padding:
            first, last = first.clamp(min=0), last.clamp(max=size)
        return (last - first).double()


class Center(LinearMap):
    """``z = a - mean(a)``, the mean taken over the last dimension of ``a`` seen as ``blocks``; it is its own transpose."""

    def __init__(self, operand: Shape, blocks: Shape) -> None:
        self.operand = self.result = operand
        self.blocks = blocks

    def push(self, u: Tensor) -> Tensor:
        lead = self.lead(u, self.operand)
        parts = u.reshape([*lead, *self.blocks])
        return (parts - parts.mean(-1, keepdim=True)).reshape([*lead, *self.operand])

    def pull(self, v: Tensor) -> Tensor:
        return self.push(v)


class Select(LinearMap):
    """``z[p] = a[indices[p]]``: each result takes one element of the flattened trailing dimensions (max-pool winners).

    Shapes: operand ``[B, C, *spatial]``, indices ``[B, C, *spatial']`` into the flattened ``spatial``. ``native``, when
    given, is the operator's own transpose for input without columns; ``window`` says how the winners' windows step, where
    they step evenly.
    """

    def __init__(
        self, indices: Tensor, operand: Shape, native: Callable[[Tensor], Tensor] | None = None, window: Window | None = None
    ) -> None:
        self.indices = indices
        self.operand, self.result = operand, indices.shape
        self.native, self.window = native, window

    def push(self, u: Tensor) -> Tensor:
        lead = self.lead(u, self.operand)
        flat = self.indices.flatten(2)
        gathered = u.flatten(-(len(self.operand) - 2)).gather(-1, flat.expand([*lead, *flat.shape]))
        return gathered.reshape([*lead, *self.result])

    def pull(self, v: Tensor) -> Tensor:
        lead = self.lead(v, self.result)
        if not lead and self.native is not None:
            return self.native(v)
        flat = self.indices.flatten(2)
        zeros = v.new_zeros([*lead, *self.operand[:2], math.prod(self.operand[2:])])
        index = flat.expand([*lead, *flat.shape])
        return zeros.scatter_add(-1, index, v.flatten(-(len(self.result) - 2))).reshape([*lead, *self.operand])
