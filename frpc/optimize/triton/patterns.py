"""What the kernels replace: patterns of ATen operators in an optimized program, found from one node of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx

from frpc.core.sizes import same_sizes
from frpc.rules.table import traits_of

__all__ = [
    "alike",
    "belongs",
    "follow",
    "gate_readers",
    "is_convolution",
    "is_sample_of",
    "made_by",
    "normal_cdfs",
    "operands",
    "pool_arguments",
    "readers_of",
    "reshape_sizes",
    "scatters",
    "sigmoids",
    "split_sum",
]

aten = torch.ops.aten


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of an operator, by position."""
    return node.args


def alike(a: Any, b: Any) -> bool:
    """Whether two values are tensors of the same sizes."""
    one, other = (x.meta.get("val") if isinstance(x, fx.Node) else None for x in (a, b))
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and same_sizes(one.shape, other.shape)


def reshape_sizes(view: fx.Node) -> Any:
    """What ``reshape`` takes to do what a view does."""
    if view.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return operands(view)[1]
    return [int(n) for n in view.meta["val"].shape]


def made_by(v: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """The operator behind v, or None where others read it too, and the views between them, the first one first."""
    views: list[fx.Node] = []
    if not isinstance(v, fx.Node):
        return None, views
    while traits_of(v.target).reshapes and len(v.users) == 1:
        views.insert(0, v)
        v = operands(v)[0]
    return (v, views) if len(v.users) == 1 else (None, [])


def split_sum(v: fx.Node | None) -> list[tuple[fx.Node, fx.Node]]:
    """Both ways to see a sum of two values of the same size: ``(one, the other)``; none for other nodes."""
    if v is None or v.target not in (aten.add.Tensor, aten.add_.Tensor) or v.kwargs or len(operands(v)) != 2:
        return []
    a, b = operands(v)
    return [(a, b), (b, a)] if a is not b and alike(a, b) else []


def is_convolution(node: fx.Node | None, *, transposed: bool) -> TypeGuard[fx.Node]:
    """Says whether a node is a convolution of this kind."""
    return node is not None and node.target is aten.convolution.default and bool(operands(node)[6]) is transposed


def is_sample_of(base: fx.Node | None, factor: Any) -> bool:
    """Says whether ``factor`` is ``[B, C, H, W]`` where ``base`` is ``[K B, C, H, W]``."""
    if base is None or not isinstance(factor, fx.Node):
        return False
    mine, other = base.meta["val"], factor.meta.get("val")
    return isinstance(other, torch.Tensor) and other.dim() == mine.dim() == 4 and other.shape[1:] == mine.shape[1:]


def pool_arguments(pool: fx.Node) -> tuple[Any, ...]:
    """``(x, kernel, stride, padding, dilation, ceil_mode)`` of max pooling, with what was left out."""
    x, kernel, stride, padding, dilation, ceil = (*operands(pool), None, None, None, None)[:6]
    kernel = _pair(kernel)
    return x, kernel, _pair(stride) or kernel, _pair(padding) or [0, 0], _pair(dilation) or [1, 1], bool(ceil)


def _pair(value: Any) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value or [])
    return numbers * 2 if len(numbers) == 1 else numbers


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views and repetition."""
    for user in node.users:
        if traits_of(user.target).reshapes or user.target is aten.expand.default:
            yield from readers_of(user)
        else:
            yield user


def scatters(node: fx.Node, pool: fx.Node) -> bool:
    """``zeros.scatter_add(-1, winners, v.flatten(-2))`` with v like the pooled value, or columns of it.

    Every plane of v has its own winners, and goes into a plane of the pooled value's size.
    """
    if node.target is not aten.scatter_add.default or operands(node)[1] not in (-1, node.meta["val"].dim() - 1):
        return False
    zeros, _, index, flattened = operands(node)
    v = operands(flattened)[0] if isinstance(flattened, fx.Node) and traits_of(flattened.target).keeps_order else None
    if not isinstance(v, fx.Node) or getattr(zeros, "target", None) not in _ZEROS:
        return False
    value, pooled, image = (tuple(n.shape) for n in (v.meta["val"], pool.meta["val"][0], operands(pool)[0].meta["val"]))
    cells, into = math.prod(value[-2:]), math.prod(image[-2:])
    planes = [tuple(n.meta["val"].shape) for n in (flattened, index, node)]
    if len(value) not in (4, 5) or not all(isinstance(n, int) for n in (cells, into)):
        return False
    laid = index
    while laid.target is aten.expand.default:
        laid = operands(laid)[0]
    one = (*pooled[:-2], cells)
    return (
        same_sizes(value[-3:], pooled[-3:])
        and all(same_sizes(p, (*value[:-2], n)) for p, n in zip(planes, (cells, cells, into), strict=True))
        and (same_sizes(laid.meta["val"].shape, one) or same_sizes(laid.meta["val"].shape, (1, *one)))
    )


_ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def gate_readers(relu: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The values gated by a ReLU, ``(multiply, operand)``."""
    for user in relu.users:
        if user.target is aten.threshold_backward.default and operands(user)[1] is relu and operands(user)[2] == 0:
            yield user, operands(user)[0]
        elif user.target is aten.gt.Scalar and operands(user)[1] == 0:
            for product in user.users:
                if product.target is aten.mul.Tensor:
                    v = operands(product)[0] if operands(product)[1] is user else operands(product)[1]
                    if alike(v, product) and belongs(v.meta["val"], relu.meta["val"]):
                        yield product, v


def belongs(v: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether v is like a gate's value, or columns of it, side by side or one behind the other."""
    inner = len(gate.shape) - 1
    return v.dtype != torch.bool and v.dim() - gate.dim() in (0, 1) and same_sizes(v.shape[-inner:], gate.shape[1:])


def sigmoids(z: fx.Node) -> Iterator[fx.Node]:
    yield from (user for user in z.users if user.target is aten.sigmoid.default)


def normal_cdfs(z: fx.Node) -> Iterator[fx.Node]:
    """``0.5 * (1 + erf(z * sqrt 1/2))``."""
    for scaled in z.users:
        if scaled.target is aten.mul.Scalar and abs(float(operands(scaled)[1]) - 0.5**0.5) < 1e-12:
            yield from follow(scaled, (aten.erf.default, None), (aten.add.Scalar, 1), (aten.mul.Scalar, 0.5))


def follow(node: fx.Node, *steps: tuple[Any, Any]) -> Iterator[fx.Node]:
    """Ends of chains of operators from a node, each with the number it takes and nothing else: no ``alpha``, no rounding mode."""
    if not steps:
        yield node
        return
    (target, number), *rest = steps
    for user in node.users:
        taken = [node] if number is None else [node, number]
        if user.target is target and list(operands(user)) == taken and not user.kwargs:
            yield from follow(user, *rest)
