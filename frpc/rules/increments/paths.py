"""The way from a reference to the input, along which Jacobians are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from frpc.maps import Compose, LinearMap, Scale, Total
from frpc.rules.table import Affine, Call

__all__ = ["Increment", "Path", "Pooling", "averaged", "derivative", "part_above", "secant"]

Pooling = Literal["ends", "path"]


@dataclass(frozen=True)
class Path:
    """Which average of the Jacobian a rule takes.

    Attributes:
        steps: number of points, or None for the exact average.
        pooling: of max pools, ``ends``: between the winner at the input and the winner at the reference; ``path``: over all
            winners on the way. They differ where a third element wins in between; both add up.
    """

    steps: int | None = None
    pooling: Pooling = "ends"

    def points(self, call: Call, name: str) -> list[Tensor]:
        """The operand at every point the average is taken over; the input alone where there is no reference."""
        here = call.args[name]
        if call.reference is None or self.steps is None:
            return [here]
        there = call.reference.args[name]
        change = torch.where(here == there, 0.0, here - there)  # minus infinity, which marks what a softmax leaves out, stays
        return [there + change * (k / self.steps) for k in range(1, self.steps + 1)]

    def middle(self, call: Call, name: str) -> Any:
        """The average of an operand over the path: ``(a + r) / 2`` exactly, ``r + (n + 1)/(2n) (a - r)`` over n points."""
        here = call.args[name]
        if call.reference is None or not isinstance(here, Tensor):
            return here
        there = call.reference.args[name]
        weight = 0.5 if self.steps is None else (self.steps + 1) / (2 * self.steps)
        return (here + there) * 0.5 if self.steps is None else there + (here - there) * weight


Increment = Callable[[Call, Path], Affine]


def derivative(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """``f'(a)`` of an elementwise function, by PyTorch's own formula."""
    made: Any = torch.func.vjp(function, a)
    value, transpose = made
    slope: Tensor = transpose(torch.ones_like(value))[0]
    return slope


def secant(function: Callable[[Tensor], Tensor], a: Tensor, r: Tensor, change: Tensor) -> Tensor:
    """``(f(a) - f(r)) / (a - r)``; the derivative in the middle where a and r are so close that the difference has no digits.

    Where that is infinite (the root of 0, at both ends), nothing changed and nothing is passed on: ``0 = 0 (a - r)``.
    """
    d, largest = a - r, torch.finfo(a.dtype).max  # a printed program has no name for infinity
    near = d.abs() <= math.sqrt(torch.finfo(a.dtype).eps) * torch.maximum(a.abs(), r.abs())
    slope = derivative(function, 0.5 * (a + r))
    slope = torch.where(slope.abs() <= largest, slope, 0.0)
    exact = torch.where(near, slope, change / torch.where(near, 1.0, d))
    return torch.where(d.abs() <= largest, exact, 0.0)  # what a mask set to minus infinity stays there


def part_above(positive: Tensor, a: Tensor, r_positive: Tensor, r: Tensor) -> Tensor:
    """The part of the way from r to a that lies above 0; no digits are lost where both are near."""
    tiny = torch.finfo(a.dtype).tiny
    return (positive + r_positive) / (a.abs() + (r.abs() + tiny))


def averaged(maps: Sequence[LinearMap]) -> LinearMap:
    return maps[0] if len(maps) == 1 else Total([Compose(m, Scale(1.0 / len(maps), m.result)) for m in maps])
