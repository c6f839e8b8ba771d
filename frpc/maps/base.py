"""Linear maps: how relevance moves through one operand of one operator.

A map ``M`` is fixed by the parameters and by the values at this input. It knows how to be applied in each direction and
nothing of the rule that chose it:

* ``push(u)`` carries columns forward, ``u -> M u``;
* ``pull(v)`` is its transpose, ``v -> M^T v``; ``<push(u), v> == <u, pull(v)>`` for all u, v.

Shapes: with operand ``[*A]`` and result ``[*Z]`` (both batch first), ``push`` takes ``[*L, *A]`` and returns ``[*L, *Z]``,
``pull`` the other way round. The leading dimensions ``L`` hold independent columns (targets, or cells) and may be absent.
Everything here is plain tensor code, so it runs eagerly, and the emitter traces it into ATen operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import Shape, numel

__all__ = [
    "Compose",
    "Cost",
    "Identity",
    "LinearMap",
    "LinearOp",
    "Total",
    "Transpose",
    "each",
    "folded",
]


@dataclass(frozen=True)
class Cost:
    """The cost of one column through a map.

    Units: ``flops`` counts multiply and add separately; ``bytes`` is memory read and written.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class LinearMap:
    """One linear map; see the module's docstring for shapes.

    Attributes:
        pushes: whether it has a forward direction; what changes the transposed pass itself has none.
    """

    operand: Shape
    result: Shape
    pushes: bool = True

    def push(self, u: Tensor) -> Tensor:
        """Returns ``M u``."""
        raise TypeError(f"{type(self).__name__} cannot carry columns forward")

    def pull(self, v: Tensor) -> Tensor:
        """Returns ``M^T v``."""
        raise TypeError(f"{type(self).__name__} has no transposed pass")

    def cost(self, itemsize: int = 4) -> Cost:
        """Returns the cost of one column; by default one pass over operand and result."""
        size = numel(self.operand) + numel(self.result)
        return Cost(float(numel(self.result)), float(size * itemsize))

    def lead(self, tensor: Tensor, of: Shape) -> tuple[Any, ...]:
        """Returns the sizes of the column dimensions of ``tensor``, an ``[*L, *of]``."""
        return tuple(tensor.shape[: tensor.dim() - len(of)])


class Identity(LinearMap):
    """``z = a``: copies, casts that keep the dtype, additions of equal shapes."""

    def __init__(self, operand: Shape) -> None:
        self.operand = self.result = operand

    def push(self, u: Tensor) -> Tensor:
        return u

    def pull(self, v: Tensor) -> Tensor:
        return v

    def cost(self, itemsize: int = 4) -> Cost:
        return Cost(0.0, 0.0)


class Compose(LinearMap):
    """``z = M2 M1 a``."""

    def __init__(self, first: LinearMap, second: LinearMap) -> None:
        self.first, self.second = first, second
        self.operand, self.result = first.operand, second.result
        self.pushes = first.pushes and second.pushes

    def push(self, u: Tensor) -> Tensor:
        return self.second.push(self.first.push(u))

    def pull(self, v: Tensor) -> Tensor:
        return self.first.pull(self.second.pull(v))

    def cost(self, itemsize: int = 4) -> Cost:
        return self.first.cost(itemsize) + self.second.cost(itemsize)


class Total(LinearMap):
    """``z = (M1 + M2 + ...) a``: several maps of one operand, added."""

    def __init__(self, parts: Sequence[LinearMap]) -> None:
        self.parts = tuple(parts)
        self.operand, self.result = parts[0].operand, parts[0].result
        self.pushes = all(part.pushes for part in parts)

    def push(self, u: Tensor) -> Tensor:
        pushed = [part.push(u) for part in self.parts]
        return sum(pushed[1:], pushed[0])

    def pull(self, v: Tensor) -> Tensor:
        pulled = [part.pull(v) for part in self.parts]
        return sum(pulled[1:], pulled[0])

    def cost(self, itemsize: int = 4) -> Cost:
        return sum((part.cost(itemsize) for part in self.parts[1:]), self.parts[0].cost(itemsize))


class Transpose(LinearMap):
    """``z = M^T a`` of another map."""

    def __init__(self, of: LinearMap) -> None:
        self.of = of
        self.operand, self.result = of.result, of.operand

    def push(self, u: Tensor) -> Tensor:
        return self.of.pull(u)

    def pull(self, v: Tensor) -> Tensor:
        return self.of.push(v)

    def cost(self, itemsize: int = 4) -> Cost:
        return self.of.cost(itemsize)


class LinearOp(LinearMap):
    """Any operator that is linear in its operand: ``z = f(a)``.

    ``f`` takes ``[*L, *operand]`` and returns ``[*L, *result]``. Its transpose is found when the program is traced (the
    vector-Jacobian product of a linear function is that transpose), so that what is emitted is plain operators.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], operand: Shape, result: Shape) -> None:
        self.function = function
        self.operand, self.result = operand, result

    def push(self, u: Tensor) -> Tensor:
        return self.function(u)

    def pull(self, v: Tensor) -> Tensor:
        # Any point serves: a linear function has the same transpose everywhere, and the primal pass is dead code. The
        # point is one stretched cell, so that where a traced program asks for its sizes nothing is filled.
        point = v.new_zeros([]).expand([*self.lead(v, self.result), *self.operand])
        transpose: Any = torch.func.vjp(self.function, point)[1]
        pulled: Tensor = transpose(v)[0]
        return pulled


def folded(function: Callable[[Tensor], Tensor], tensor: Tensor, rank: int) -> Tensor:
    """Applies a batch-first ``function`` to ``[*L, B, ...]`` by counting the columns as samples."""
    if tensor.dim() == rank:
        return function(tensor)
    lead = tensor.shape[: tensor.dim() - rank + 1]
    z = function(tensor.flatten(0, len(lead) - 1))
    return z.reshape([*lead, *z.shape[1:]])


def each(value: Sequence[int], count: int) -> list[int]:
    values = list(value)
    return values * count if len(values) == 1 else values
