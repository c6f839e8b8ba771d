"""Transposed average pools, for runtimes that pool forward only.

A pool works along rows and columns apart, ``y = H x W^T`` with a matrix for either axis; so the transpose is ``H^T v W``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import bind
from frpc.export.decompositions import read

__all__ = ["transposed_as_products"]

aten = torch.ops.aten

AlongAxis = Callable[[Tensor, int, int, Sequence[Any]], Tensor]
"""The pool on images of one row, ``[B, 1, 1, n] -> [B, 1, 1, m]``, that stands for an axis (0 rows, 1 columns): given are the
images, the axis, m, and the arguments of the transposed operator."""


def _average(images: Tensor, axis: int, _: int, given: Sequence[Any]) -> Tensor:
    kernel, stride, padding, ceil_mode, count_padding, divisor = given[2:]
    size, step, border = ((list(pair) * 2)[axis] for pair in (kernel, stride or kernel, padding))
    window = [1, size], [1, step], [0, border], ceil_mode
    if divisor is None:
        return aten.avg_pool2d(images, *window, count_padding)
    sums = aten.avg_pool2d(images, *window, True, 1)
    return sums / divisor if axis == 0 else sums


def _adaptive(images: Tensor, _: int, size: int, __: Sequence[Any]) -> Tensor:
    return aten._adaptive_avg_pool2d(images, [1, size])


_ALONG: dict[Any, AlongAxis] = {
    aten.avg_pool2d_backward.default: _average,
    aten._adaptive_avg_pool2d_backward.default: _adaptive,
}


def transposed_as_products(program: fx.GraphModule) -> None:
    """``avg_pool_backward(v) -> H^T v W``; each number s x s times, times a factor, where that is all it is.

    Exact when: images are batches of fixed size; how many elements a window has is then a product of what its rows and its
    columns have, whether or not padding counts.
    """
    for node in list(program.graph.nodes):
        along = _ALONG.get(node.target)
        if along is None or node.meta["val"].dim() != 4:
            continue
        if not all(isinstance(n, int) for n in (*node.meta["val"].shape[2:], *node.args[0].meta["val"].shape[2:])):
            continue
        given = [*bind(node.target, node.args, node.kwargs).values()]
        sides = zip(node.meta["val"].shape[2:], node.args[0].meta["val"].shape[2:], strict=True)
        rows, columns = (_transposed(along, axis, int(n), int(m), given) for axis, (n, m) in enumerate(sides))
        repeats = _repeats(rows, columns)
        made = _product(program, node, rows, columns) if repeats is None else _repeated(program, node, repeats, rows, columns)
        if made is not node.args[0]:
            made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _product(program: fx.GraphModule, node: fx.Node, rows: Tensor, columns: Tensor) -> Any:
    example = node.meta["val"]
    matrices = (rows, columns.t().contiguous())
    height, width = (
        read(program, node, f"{node.name}_axis_{axis}", matrix.to(example.dtype).to(example.device))
        for axis, matrix in enumerate(matrices)
    )
    with program.graph.inserting_before(node):
        along_rows = program.graph.call_function(aten.matmul.default, (node.args[0], width))
        return program.graph.call_function(aten.matmul.default, (height, along_rows))


def _repeated(program: fx.GraphModule, node: fx.Node, repeats: list[int], rows: Tensor, columns: Tensor) -> Any:
    made: Any = node.args[0]
    factor = float(rows[0, 0] * columns[0, 0])
    with program.graph.inserting_before(node):
        if factor != 1:
            made = program.graph.call_function(aten.mul.Tensor, (made, factor))
            made.meta = dict(node.args[0].meta)  # type: ignore[union-attr]
        if repeats != [1, 1]:
            made = program.graph.call_function(aten.upsample_nearest2d.default, (made, list(node.meta["val"].shape[2:])))
    return made


def _transposed(along: AlongAxis, axis: int, size: int, results: int, given: Sequence[Any]) -> Tensor:
    """The matrix of one axis, transposed: ``[n, m]``."""
    basis = torch.eye(size, dtype=torch.float64)[:, None, None]
    return along(basis, axis, results, given).reshape(size, results)


def _repeats(*matrices: Tensor) -> list[int] | None:
    """How often each matrix repeats every number, up to one factor; None if one does anything else."""
    found = []
    for matrix in matrices:
        times, rest = divmod(matrix.shape[0], matrix.shape[1])
        repeated = torch.eye(matrix.shape[1], dtype=matrix.dtype).repeat_interleave(times, 0) * matrix[0, 0]
        if rest or not torch.equal(matrix, repeated):
            return None
        found.append(times)
    return found
