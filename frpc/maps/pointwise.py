"""Maps that keep the shape: scales, gates, casts and broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import Shape, same_size
from frpc.maps.base import Compose, Identity, LinearMap

__all__ = ["Broadcast", "Cast", "ReLUGate", "Scale", "scaled"]


class Scale(LinearMap):
    """``z = g * a`` elementwise; ``g`` is a tensor that broadcasts to the operand's shape, or a number."""

    def __init__(self, coefficient: Tensor | float, operand: Shape) -> None:
        self.coefficient = coefficient
        self.operand = self.result = operand

    def push(self, u: Tensor) -> Tensor:
        return u * self.coefficient

    def pull(self, v: Tensor) -> Tensor:
        return v * self.coefficient


class ReLUGate(LinearMap):
    """``z = [r > 0] * a``, the 0/1 coefficient of ReLU read off its own result ``r``."""

    def __init__(self, result_value: Tensor) -> None:
        self.value = result_value
        self.operand = self.result = result_value.shape

    def push(self, u: Tensor) -> Tensor:
        if u.dim() == self.value.dim():
            return torch.ops.aten.threshold_backward(u, self.value, 0)  # one pass: no mask is written out
        return u * (self.value > 0)

    def pull(self, v: Tensor) -> Tensor:
        return self.push(v)


class Cast(LinearMap):
    """``z = a`` in another floating type: the same number up to rounding. Columns come back in the operand's type."""

    def __init__(self, operand: Tensor, result: Tensor) -> None:
        self.operand, self.result = operand.shape, result.shape
        self.before, self.after = operand.dtype, result.dtype

    def push(self, u: Tensor) -> Tensor:
        return u.to(self.after)

    def pull(self, v: Tensor) -> Tensor:
        return v.to(self.before)


class Broadcast(LinearMap):
    """``z = a`` stretched to a larger shape by PyTorch's broadcasting; its transpose sums the copies."""

    def __init__(self, operand: Shape, result: Shape) -> None:
        self.operand, self.result = operand, result

    def _aligned(self, lead: tuple[Any, ...]) -> list[Any]:
        return [*lead, *([1] * (len(self.result) - len(self.operand))), *self.operand]

    def push(self, u: Tensor) -> Tensor:
        lead = self.lead(u, self.operand)
        return u.reshape(self._aligned(lead)).expand([*lead, *self.result])

    def pull(self, v: Tensor) -> Tensor:
        lead = self.lead(v, self.result)
        aligned = self._aligned(())
        copied = [i - len(self.result) for i, n in enumerate(self.result) if not same_size(aligned[i], n)]
        if copied:
            v = v.sum(copied, keepdim=True)
        return v.reshape([*lead, *self.operand])


def scaled(coefficient: Tensor | float, operand: Shape, result: Shape) -> LinearMap:
    """Returns ``a -> g * a`` where ``a`` may first have to be broadcast to ``result``."""
    same = len(operand) == len(result) and all(same_size(a, b) for a, b in zip(operand, result, strict=True))
    unit = isinstance(coefficient, int | float) and coefficient == 1
    if same:
        return Identity(operand) if unit else Scale(coefficient, operand)
    stretch = Broadcast(operand, result)
    return stretch if unit else Compose(stretch, Scale(coefficient, result))
