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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Broadcast",
    "Compose",
    "Conv",
    "Cost",
    "Gate",
    "Identity",
    "LinearMap",
    "LinearOp",
    "MatMul",
    "Place",
    "Pool",
    "Scale",
    "Select",
    "Slice",
    "scaled",
]

Shape = Sequence[Any]  # ints, or SymInts while a program is traced


@dataclass(frozen=True)
class Cost:
    """What one column through a map costs.

    Units: ``flops`` counts multiply and add apart; ``bytes`` is memory read and written.
    """

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def _numel(shape: Shape) -> int:
    """Counts elements; a symbolic size (the batch) counts by its example value, without a guard."""
    return math.prod(int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in shape)


class LinearMap:
    """One linear map; see the module's docstring for shapes."""

    operand: Shape
    result: Shape

    def push(self, u: Tensor) -> Tensor:
        """Returns ``M u``."""
        raise TypeError(f"{type(self).__name__} cannot carry columns forward")

    def pull(self, v: Tensor) -> Tensor:
        """Returns ``M^T v``."""
        raise TypeError(f"{type(self).__name__} has no transposed pass")

    def cost(self, itemsize: int = 4) -> Cost:
        """Returns what one column costs; by default one pass over operand and result."""
        size = _numel(self.operand) + _numel(self.result)
        return Cost(float(_numel(self.result)), float(size * itemsize))

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


class Scale(LinearMap):
    """``z = g * a`` elementwise; ``g`` is a tensor that broadcasts to the operand's shape, or a number."""

    def __init__(self, coefficient: Tensor | float, operand: Shape) -> None:
        self.coefficient = coefficient
        self.operand = self.result = operand

    def push(self, u: Tensor) -> Tensor:
        return u * self.coefficient

    def pull(self, v: Tensor) -> Tensor:
        return v * self.coefficient


class Gate(LinearMap):
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
        copied = [i - len(self.result) for i, n in enumerate(self.result) if not _same(aligned[i], n)]
        if copied:
            v = v.sum(copied, keepdim=True)
        return v.reshape([*lead, *self.operand])


def _same(a: Any, b: Any) -> bool:
    """Compares two sizes; a symbolic size equals only itself, so no guard is put on the batch."""
    return a is b or str(a) == str(b)


class Compose(LinearMap):
    """``z = M2 M1 a``."""

    def __init__(self, first: LinearMap, second: LinearMap) -> None:
        self.first, self.second = first, second
        self.operand, self.result = first.operand, second.result

    def push(self, u: Tensor) -> Tensor:
        return self.second.push(self.first.push(u))

    def pull(self, v: Tensor) -> Tensor:
        return self.first.pull(self.second.pull(v))

    def cost(self, itemsize: int = 4) -> Cost:
        return self.first.cost(itemsize) + self.second.cost(itemsize)


def scaled(coefficient: Tensor | float, operand: Shape, result: Shape) -> LinearMap:
    """Returns ``a -> g * a`` where ``a`` may first have to be broadcast to ``result``."""
    same = len(operand) == len(result) and all(_same(a, b) for a, b in zip(operand, result, strict=True))
    unit = isinstance(coefficient, int | float) and coefficient == 1
    if same:
        return Identity(operand) if unit else Scale(coefficient, operand)
    stretch = Broadcast(operand, result)
    return stretch if unit else Compose(stretch, Scale(coefficient, result))


class MatMul(LinearMap):
    """``z = a W^T`` over the last dimension; ``weight`` is ``[O, I]``."""

    def __init__(self, weight: Tensor, operand: Shape) -> None:
        self.weight = weight
        self.operand = operand
        self.result = [*operand[:-1], weight.shape[0]]

    def push(self, u: Tensor) -> Tensor:
        return torch.nn.functional.linear(u, self.weight)

    def pull(self, v: Tensor) -> Tensor:
        return torch.matmul(v, self.weight)

    def cost(self, itemsize: int = 4) -> Cost:
        flops = 2.0 * _numel(self.result) * int(self.weight.shape[1])
        size = _numel(self.operand) + _numel(self.result) + _numel(self.weight.shape)
        return Cost(flops, float(size * itemsize))


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
        _, transpose = torch.func.vjp(self.function, point)
        (pulled,) = transpose(v)
        return pulled


def _folded(function: Callable[[Tensor], Tensor], tensor: Tensor, rank: int) -> Tensor:
    """Applies a batch-first ``function`` to ``[*L, B, ...]`` by counting the columns as samples."""
    if tensor.dim() == rank:
        return function(tensor)
    lead = tensor.shape[: tensor.dim() - rank + 1]
    z = function(tensor.flatten(0, len(lead) - 1))
    return z.reshape([*lead, *z.shape[1:]])


class Pool(LinearOp):
    """A pooling or resizing operator that is linear and treats samples apart, e.g. average pooling.

    ``function`` maps ``[B, C, *spatial]`` to ``[B, C, *spatial']``; columns are folded into the batch.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], operand: Shape, result: Shape) -> None:
        super().__init__(lambda u: _folded(function, u, len(operand)), operand, result)


class Conv(LinearMap):
    """Convolution, or transposed convolution, of ``[B, C, *spatial]`` without its bias.

    Arguments are those of ``aten.convolution``.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        operand: Shape,
        result: Shape,
    ) -> None:
        spatial = weight.dim() - 2
        self.weight, self.groups, self.transposed = weight, groups, transposed
        self.stride, self.padding = _each(stride, spatial), _each(padding, spatial)
        self.dilation, self.output_padding = _each(dilation, spatial), _each(output_padding, spatial)
        self.operand, self.result = operand, result

    def _apply(self, x: Tensor, transposed: bool, output_padding: Sequence[int]) -> Tensor:
        return torch.ops.aten.convolution(
            x, self.weight, None, self.stride, self.padding, self.dilation, transposed, output_padding, self.groups
        )

    def push(self, u: Tensor) -> Tensor:
        return _folded(lambda x: self._apply(x, self.transposed, self.output_padding), u, len(self.operand))

    def pull(self, v: Tensor) -> Tensor:
        return _folded(self._pull_transposed if self.transposed else self._pull_plain, v, len(self.result))

    def _pull_plain(self, v: Tensor) -> Tensor:
        kernel = self.weight.shape[2:]
        rest = [  # rows at the far edge that no window reached: they get no relevance
            (int(n) + 2 * p - d * (int(k) - 1) - 1) % s
            for n, p, d, k, s in zip(self.operand[2:], self.padding, self.dilation, kernel, self.stride, strict=True)
        ]
        return self._apply(v, True, rest)

    def _pull_transposed(self, v: Tensor) -> Tensor:
        pulled = self._apply(v, False, [0] * len(self.stride))
        for dim, size in enumerate(self.operand[2:], start=2):
            if not _same(pulled.shape[dim], size):  # output_padding >= stride adds windows that have no origin
                pulled = pulled.narrow(dim, 0, size)
        return pulled

    def cost(self, itemsize: int = 4) -> Cost:
        positions = _numel(self.operand if self.transposed else self.result)
        taps = _numel(self.weight.shape[1:])
        size = _numel(self.operand) + _numel(self.result) + _numel(self.weight.shape)
        return Cost(2.0 * positions * taps, float(size * itemsize))


def _each(value: Sequence[int], count: int) -> list[int]:
    values = list(value)
    return values * count if len(values) == 1 else values


class Select(LinearMap):
    """``z[p] = a[indices[p]]``: each result takes one element of the flattened trailing dimensions (max-pool winners).

    Shapes: operand ``[B, C, *spatial]``, indices ``[B, C, *spatial']`` into the flattened ``spatial``. ``native``, when
    given, is the operator's own transpose for input without columns.
    """

    def __init__(self, indices: Tensor, operand: Shape, native: Callable[[Tensor], Tensor] | None = None) -> None:
        self.indices = indices
        self.operand, self.result = operand, indices.shape
        self.native = native

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
