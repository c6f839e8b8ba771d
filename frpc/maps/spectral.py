"""Fourier transforms, and complex numbers as pairs of real ones: linear maps on pairs.

Complex columns stand for pairs ``(re, im)``; their inner product is that of the pairs, ``Re(sum conj(v) z)``. Transposed by it, a
complex matrix is its conjugate transpose, and a Fourier transform is the transform in the other direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import Shape, numel, size_hint
from frpc.maps.base import Cost, LinearMap

__all__ = ["AsReal", "Fourier", "FromPart", "HalfFourier", "RealFourier"]

aten = torch.ops.aten


class AsReal(LinearMap):
    """``z = view_as_real(a)``: the pairs of a complex operand, along a new last dimension."""

    def __init__(self, operand: Shape) -> None:
        self.operand, self.result = operand, [*operand, 2]

    def push(self, u: Tensor) -> Tensor:
        return aten.view_as_real(u)

    def pull(self, v: Tensor) -> Tensor:
        return aten.complex(v.select(-1, 0), v.select(-1, 1))


class FromPart(LinearMap):
    """``z = a`` as the real part of complex numbers, or ``z = i a``, as the imaginary part.

    Args:
        part: 0 for the real part, 1 for the imaginary one.
    """

    def __init__(self, part: int, operand: Shape) -> None:
        self.part, self.operand, self.result = part, operand, operand

    def push(self, u: Tensor) -> Tensor:
        nothing = torch.zeros_like(u)
        return aten.complex(nothing, u) if self.part else aten.complex(u, nothing)

    def pull(self, v: Tensor) -> Tensor:
        return aten.view_as_real(v).select(-1, self.part)


class _Transform(LinearMap):
    """A transform over some dimensions, counted from the end.

    Args:
        dims: over which; the last of them is the one that is halved where the other side is real.
        norm: 0 as it is, 1 over the root of the number of elements, 2 over that number.
    """

    def __init__(self, dims: Sequence[int], norm: int, operand: Shape, result: Shape) -> None:
        self.dims, self.norm, self.operand, self.result = list(dims), norm, operand, result

    def over(self, tensor: Tensor) -> list[int]:
        """The dimensions of a tensor with columns in front; PyTorch's own transforms take none counted from the end."""
        return [d + tensor.dim() for d in self.dims]

    def cost(self, itemsize: int = 4) -> Cost:
        longer = max(self.operand, self.result, key=numel)
        points = math.prod(size_hint(longer[d]) for d in self.dims)
        size = (numel(self.operand) + numel(self.result)) * 2
        return Cost(5.0 * numel(longer) * max(1.0, math.log2(points)), float(size * itemsize))


class Fourier(_Transform):
    """``z = F a`` of complex numbers, forward or back."""

    def __init__(self, dims: Sequence[int], norm: int, forward: bool, operand: Shape, result: Shape) -> None:
        super().__init__(dims, norm, operand, result)
        self.forward = forward

    def push(self, u: Tensor) -> Tensor:
        return aten._fft_c2c(u, self.over(u), self.norm, self.forward)

    def pull(self, v: Tensor) -> Tensor:
        return aten._fft_c2c(v, self.over(v), self.norm, not self.forward)


class RealFourier(_Transform):
    """``z = F a`` of real numbers: all frequencies, or those of one half, which say the same."""

    def __init__(self, dims: Sequence[int], norm: int, onesided: bool, operand: Shape, result: Shape) -> None:
        super().__init__(dims, norm, operand, result)
        self.onesided = onesided

    def push(self, u: Tensor) -> Tensor:
        return aten._fft_r2c(u, self.over(u), self.norm, self.onesided)

    def pull(self, v: Tensor) -> Tensor:
        if not self.onesided:
            back = aten._fft_c2c(v, self.over(v), self.norm, False)
            return aten.view_as_real(back).select(-1, 0)
        # The way back counts every frequency between the ends twice, once for its mirror image, which is not there here.
        size = self.operand[self.dims[-1]]
        return aten._fft_c2r(v * _counts(v, self.dims[-1], size, 0.5), self.over(v), self.norm, size)


class HalfFourier(_Transform):
    """``z = F^-1 a``, real, of one half of the frequencies; the other half mirrors it."""

    def push(self, u: Tensor) -> Tensor:
        return aten._fft_c2r(u, self.over(u), self.norm, self.result[self.dims[-1]])

    def pull(self, v: Tensor) -> Tensor:
        found = aten._fft_r2c(v, self.over(v), self.norm, True)
        return found * _counts(found, self.dims[-1], self.result[self.dims[-1]], 2.0)


def _counts(frequencies: Tensor, dim: int, size: Any, between: float) -> Tensor:
    """``between`` for every frequency of a half, 1 for those that are their own mirror image: 0, and size/2 where it is even."""
    count = size // 2 + 1
    alone = 1 + (size % 2 == 0 and size > 1)
    real: dict[str, Any] = {"dtype": frequencies.real.dtype, "device": frequencies.device}
    ends = torch.ones([1], **real)
    weights = torch.cat([ends, torch.full([count - alone], between, **real), *[ends] * (alone - 1)])
    return weights.reshape([count, *[1] * (-dim - 1)])
