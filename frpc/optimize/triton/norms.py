"""Layer and RMS norms in an optimized program: their values, their coefficients, and the relevance pulled back through them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from frpc.core.sizes import same_size, same_sizes
from frpc.optimize.triton.patterns import alike, follow, operands, readers_of
from frpc.rules.table import traits_of

__all__ = ["RootMeanSquare", "centred_pulls", "layer_scales", "pulls", "rms_norms", "written_out"]

aten = torch.ops.aten
_NORMS = (aten.native_layer_norm.default, aten.native_group_norm.default)


@dataclass(frozen=True)
class RootMeanSquare:
    """``y = x s gamma`` with ``s = 1 / sqrt(mean(x^2) + eps)``, where the value and the coefficient may compute s twice.

    Attributes:
        values: nodes that are y.
        scales: nodes that are s.
    """

    x: fx.Node
    gamma: fx.Node | None
    eps: float
    values: tuple[fx.Node, ...]
    scales: tuple[fx.Node, ...]


def rms_norms(graph: fx.Graph) -> Iterator[RootMeanSquare]:
    """RMS norms over the last dimension, as one operator or as single ones."""
    found: dict[fx.Node, list[tuple[fx.Node, float]]] = {}
    for node in graph.nodes:
        x, eps = _square_scale(node)
        if x is not None:
            found.setdefault(x, []).append((node, eps))
    for x, scales in found.items():
        eps = scales[0][1]
        alike = tuple(s for s, other in scales if abs(other - eps) <= 1e-7 * eps)  # PyTorch rounds one of them to float32
        values = [_with_gamma(unit) for s in alike for unit in s.users if _is_product(unit, x, s)]
        values += _fused(x, eps)
        gamma = values[0][1] if values else None
        yield RootMeanSquare(x, gamma, eps, tuple(y for y, g in values if g is gamma), alike)


def _square_scale(node: fx.Node) -> tuple[fx.Node | None, float]:
    """``(x, eps)`` of ``rsqrt(mean(x x) + eps)`` over the last dimension."""
    mean, eps = _mean_and_eps(node) if node.target is aten.rsqrt.default else (None, 0.0)
    x = None if mean is None or mean.target is not aten.mean.dim else _squared(operands(mean)[0])
    return (x, eps) if x is not None and _last_kept(mean) else (None, 0.0)


def _mean_and_eps(root: fx.Node) -> tuple[fx.Node | None, float]:
    """``(m, eps)`` of a root of ``m + eps``."""
    total = operands(root)[0]
    if total.target not in (aten.add.Tensor, aten.add.Scalar) or total.kwargs or len(operands(total)) != 2:
        return None, 0.0
    mean, eps = operands(total)
    return (mean, float(eps)) if isinstance(eps, int | float) else (None, 0.0)


def _squared(node: fx.Node) -> fx.Node | None:
    """The x of ``x x`` or ``x^2``."""
    a, b = (*operands(node), None, None)[:2] if node.target in (aten.mul.Tensor, aten.pow.Tensor_Scalar) else (None, None)
    same = a is b if node.target is aten.mul.Tensor else b == 2
    return a if isinstance(a, fx.Node) and same else None


def _last_kept(mean: Any) -> bool:
    """Whether a mean is over the last dimension, which stays with size 1."""
    value, axes, keep = (*operands(mean), None, None)[:3]
    return list(axes or []) in ([-1], [value.meta["val"].dim() - 1]) and keep is True and not mean.kwargs


def _is_product(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    return node.target is aten.mul.Tensor and set(operands(node)) == {a, b}


def _with_gamma(unit: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """``(unit gamma, gamma)`` where all that reads ``unit`` is a product with a constant of the last dimension."""
    user = next(iter(unit.users)) if len(unit.users) == 1 else None
    if user is None or user.target is not aten.mul.Tensor:
        return unit, None
    gamma = operands(user)[1] if operands(user)[0] is unit else operands(user)[0]
    constant = isinstance(gamma, fx.Node) and gamma.op == "get_attr" and gamma.meta["val"].dim() == 1
    same = constant and same_size(gamma.meta["val"].shape[0], unit.meta["val"].shape[-1])
    return (user, gamma) if same else (unit, None)


def _fused(x: fx.Node, eps: float) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """``(y, gamma)`` of norms of x in one call, which is what programs for CUDA hold."""
    for norm in x.users:
        if norm.target is aten._fused_rms_norm.default:
            _, shape, gamma, own = (*operands(norm), None, None)[:4]
            own = torch.finfo(x.meta["val"].dtype).eps if own is None else own
            if len(shape) == 1 and abs(own - eps) <= 1e-7 * eps:
                yield from ((item, gamma) for item in norm.users if item.target is operator.getitem and operands(item)[1] == 0)


def layer_scales(x: fx.Node, eps: float) -> Iterator[fx.Node]:
    """``1 / sqrt(var(x) + eps)`` over the last dimension."""
    for reader in readers_of(x):
        if reader.target is not aten.var.correction or reader.kwargs.get("correction") != 0 or not reader.kwargs.get("keepdim"):
            continue
        value, axes = operands(reader)[:2]
        rows = (*x.meta["val"].shape[:-1], 1)
        if axes in ([-1], [value.meta["val"].dim() - 1]) and same_sizes(reader.meta["val"].shape, rows):
            yield from follow(reader, (aten.add.Tensor, eps), (aten.rsqrt.default, None))


def pulls(scale: fx.Node, gamma: fx.Node | None) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``v (scale gamma)`` and ``(v gamma) scale``: ``(product, v)``."""
    for product, v in _products(scale):
        found = [(product, v)] if gamma is None else []
        if gamma is not None and v is gamma:
            found = [*_products(product)]
        elif gamma in operands(v) and v.target is aten.mul.Tensor and len(v.users) == 1:
            found = [(product, operands(v)[1] if operands(v)[0] is gamma else operands(v)[0])]
        yield from ((pulled, operand) for pulled, operand in found if alike(pulled, operand))


def centred_pulls(scale: fx.Node, gamma: fx.Node | None) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``u - mean(u)`` with ``u = v (scale gamma)``: ``(difference, v)``."""
    for product, v in pulls(scale, gamma):
        for centred in readers_of(product):
            if centred.target is aten.sub.Tensor and alike(centred, v) and _is_mean(operands(centred)[1], operands(centred)[0]):
                yield centred, v


def _products(coefficient: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """``(product, v)`` of ``v coefficient``, where the coefficient has a row for each row of v, whose columns come first."""
    for seen in _views_of(coefficient):
        for product in seen.users:
            if product.target is aten.mul.Tensor and set(operands(product)) != {seen}:
                v = operands(product)[1] if operands(product)[0] is seen else operands(product)[0]
                if isinstance(v, fx.Node) and (v.op == "get_attr" or _rows_match(v, seen)):
                    yield product, v


def _views_of(node: fx.Node) -> Iterator[fx.Node]:
    """A value, and views of it with the same rows."""
    yield node
    for user in node.users:
        if traits_of(user.target).reshapes and same_size(user.meta["val"].shape[-1], node.meta["val"].shape[-1]):
            yield from _views_of(user)


def _rows_match(v: fx.Node, coefficient: fx.Node) -> bool:
    value, rows = v.meta["val"].shape, coefficient.meta["val"].shape
    ends = zip(reversed(value[:-1]), reversed(rows[:-1]), strict=False)
    return len(value) >= len(rows) and all(same_size(a, b) for a, b in ends)


def _is_mean(node: Any, of: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mean.dim and operands(node) == (of, [-1], True)


def written_out(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """Roots of a variance or of a mean of squares that no kernel has taken, and why: ``(root, reason)``."""
    for root in graph.nodes:
        if root.target not in (aten.rsqrt.default, aten.sqrt.default):
            continue
        spread, _ = _mean_and_eps(root)
        if spread is None or spread.target not in (aten.mean.dim, aten.var.correction):
            continue
        x = _squared(operands(spread)[0]) if spread.target is aten.mean.dim else operands(spread)[0]
        whole = x
        while whole is not None and traits_of(whole.target).reshapes:
            whole = operands(whole)[0]
        norms = [] if whole is None else [user.target for user in whole.users if user.target in _NORMS]
        if x is None or _NORMS[0] in norms:  # what is said of a layer norm is said there
            continue
        if norms:
            yield root, "a group norm, or one of channels: the kernel normalizes the last dimension"
        elif spread.target is aten.var.correction or x.target is aten.sub.Tensor:
            yield root, "a layer norm written as single operators; nn.LayerNorm has a kernel"
        else:
            yield root, "an RMS norm in another form than x * rsqrt(mean(x^2) + eps) over the last dimension"
