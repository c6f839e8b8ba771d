"""Arithmetic with complex values: sums, products, quotients, powers, exponentials, sines."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.canonicalize.complex.pairs import Lowering, Pair, Pairs, Part

__all__ = ["ARITHMETIC"]

aten = torch.ops.aten


def _sum(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    first, second = ("other", "self") if "rsub" in str(node.target) else ("self", "other")
    a, b, alpha = c.of(given[first]), c.of(given[second]), given.get("alpha", 1)
    combine = c.add if "add" in str(node.target) else c.sub
    return Pair(*(combine(x, y, alpha) for x, y in zip(a.parts, b.parts, strict=True)))


def _times(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.product(c.of(given["self"]), c.of(given["other"]))


def _over(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.quotient(c.of(given["self"]), c.of(given["other"]))


def _power(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
    """A small whole power as a product, another as ``|z|^p`` at p times the angle."""
    z, p = c.of(given["self"]), given.get("exponent", 2)
    if isinstance(p, complex):
        return None
    if p in (1, 2, 3, 4):
        found = z
        for _ in range(int(p) - 1):
            found = c.product(found, z)
        return found
    size = c.call(aten.pow.Tensor_Scalar, c.length(z), p)
    return c.polar(size, c.mul(c.angle(z), p))


def _root(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return c.polar(c.call(aten.sqrt.default, c.length(z)), c.mul(c.angle(z), 0.5))


def _exponential(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    size: Part = c.call(aten.exp.default, z.re) if isinstance(z.re, fx.Node) else float(torch.tensor(z.re).exp())
    return Pair(size, 0) if z.im == 0 else c.polar(size, z.im)


def _logarithm(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return Pair(c.call(aten.log.default, c.length(z)), c.angle(z))


def _direction(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    """``z / |z|``, and 0 at 0."""
    z = c.of(given["self"])
    size = c.length(z)
    divisor = c.call(aten.where.ScalarSelf, c.call(aten.eq.Scalar, size, 0), 1.0, size)
    return Pair(c.div(z.re, divisor), c.div(z.im, divisor))


def _crossed(first: tuple[Any, Any], second: tuple[Any, Any], sign: float) -> Lowering:
    """Functions of the sum of a real and an imaginary argument: ``(f(a) g(b), sign h(a) k(b))``."""

    def lower(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
        a, b = c.nodes(c.of(given["self"]))
        re, im = (c.mul(c.call(f, a), c.call(g, b)) for f, g in (first, second))
        return Pair(re, c.mul(im, sign))

    return lower


ARITHMETIC: dict[Any, Lowering] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _times),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _over),
    aten.reciprocal.default: lambda c, node, given: c.quotient(Pair(1.0, 0), c.of(given["self"])),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.square.default), _power),
    aten.sqrt.default: _root,
    aten.exp.default: _exponential,
    aten.log.default: _logarithm,
    aten.sgn.default: _direction,
    aten.sin.default: _crossed((aten.sin.default, aten.cosh.default), (aten.cos.default, aten.sinh.default), 1),
    aten.cos.default: _crossed((aten.cos.default, aten.cosh.default), (aten.sin.default, aten.sinh.default), -1),
    aten.sinh.default: _crossed((aten.sinh.default, aten.cos.default), (aten.cosh.default, aten.sin.default), 1),
    aten.cosh.default: _crossed((aten.cosh.default, aten.cos.default), (aten.sinh.default, aten.sin.default), 1),
}
"""Operators, and what each does to pairs."""
