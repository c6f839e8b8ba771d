"""Maps with weights: matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.core.sizes import Shape, numel, same_size, size_hint
from frpc.maps.base import Cost, LinearMap, each, folded

__all__ = ["BatchedMatMul", "Conv", "MatMul"]


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
        flops = 2.0 * numel(self.result) * int(self.weight.shape[1])
        size = numel(self.operand) + numel(self.result) + numel(self.weight.shape)
        return Cost(flops, float(size * itemsize))


class BatchedMatMul(LinearMap):
    """``z = a b``, or ``z = b a``, by the broadcasting of ``torch.matmul``; ``b`` is a coefficient.

    Args:
        coefficient: ``b``, a vector, a matrix or a batch of matrices.
        operand, result: shapes of ``a`` and ``z``.
        left: ``b`` stands on the left.
    """

    def __init__(self, coefficient: Tensor, operand: Shape, result: Shape, left: bool = False) -> None:
        self.operand, self.result, self.left = operand, result, left
        vectors = (coefficient.dim() == 1) + (len(operand) == 1)  # a vector is a matrix of one row on the left, one column else
        self.coefficient = coefficient.unsqueeze(0 if left else 1) if coefficient.dim() == 1 else coefficient
        matrix = list(operand) if len(operand) > 1 else [*operand, 1] if left else [1, *operand]
        sides = (self.coefficient.shape[-2], matrix[-1]) if left else (matrix[-2], self.coefficient.shape[-1])
        self._product = [*result[: len(result) - 2 + vectors], *sides]
        self._aligned = [*[1] * (len(self._product) - len(matrix)), *matrix]

    def push(self, u: Tensor) -> Tensor:
        lead = self.lead(u, self.operand)
        u = u.reshape([*lead, *self._aligned])
        z = torch.matmul(self.coefficient, u) if self.left else torch.matmul(u, self.coefficient)
        return z.reshape([*lead, *self.result])

    def pull(self, v: Tensor) -> Tensor:
        lead, turned = self.lead(v, self.result), self.coefficient.transpose(-1, -2)
        v = v.reshape([*lead, *self._product])
        w = torch.matmul(turned, v) if self.left else torch.matmul(v, turned)
        batch = zip(self._aligned[:-2], self._product[:-2], strict=True)
        copied = [i - len(self._product) for i, (a, z) in enumerate(batch) if not same_size(a, z)]
        if copied:
            w = w.sum(copied, keepdim=True)
        return w.reshape([*lead, *self.operand])

    def cost(self, itemsize: int = 4) -> Cost:
        inner = self.coefficient.shape[-1 if self.left else -2]
        size = numel(self.operand) + numel(self.result) + numel(self.coefficient.shape)
        return Cost(2.0 * numel(self.result) * size_hint(inner), float(size * itemsize))


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
        self.stride, self.padding = each(stride, spatial), each(padding, spatial)
        self.dilation, self.output_padding = each(dilation, spatial), each(output_padding, spatial)
        self.operand, self.result = operand, result

    def _apply(self, x: Tensor, transposed: bool, output_padding: Sequence[int]) -> Tensor:
        return torch.ops.aten.convolution(
            x, self.weight, None, self.stride, self.padding, self.dilation, transposed, output_padding, self.groups
        )

    def push(self, u: Tensor) -> Tensor:
        return folded(lambda x: self._apply(x, self.transposed, self.output_padding), u, len(self.operand))

    def pull(self, v: Tensor) -> Tensor:
        return folded(self._pull_transposed if self.transposed else self._pull_plain, v, len(self.result))

    def _pull_plain(self, v: Tensor) -> Tensor:
        kernel = self.weight.shape[2:]
        rest = [  # rows at the far edge that no window reached: they get no relevance
            (size_hint(n) + 2 * p - d * (int(k) - 1) - 1) % s
            for n, p, d, k, s in zip(self.operand[2:], self.padding, self.dilation, kernel, self.stride, strict=True)
        ]
        return self._apply(v, True, rest)

    def _pull_transposed(self, v: Tensor) -> Tensor:
        pulled = self._apply(v, False, [0] * len(self.stride))
        for dim, size in enumerate(self.operand[2:], start=2):
            if not same_size(pulled.shape[dim], size):  # output_padding >= stride adds windows that have no origin
                pulled = pulled.narrow(dim, 0, size)
        return pulled

    def cost(self, itemsize: int = 4) -> Cost:
        positions = numel(self.operand if self.transposed else self.result)
        taps = numel(self.weight.shape[1:])
        size = numel(self.operand) + numel(self.result) + numel(self.weight.shape)
        return Cost(2.0 * positions * taps, float(size * itemsize))
