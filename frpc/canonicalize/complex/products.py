"""Products of complex matrices, and convolutions.

They stay one product each for the real and the imaginary part, ``re = [ar ai] [br; -bi]`` and ``im = [ar ai] [bi; br]``, so that
rules which look at all that a neuron adds up still do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from frpc.canonicalize.complex.pairs import Lowering, Pair, Pairs, Part

__all__ = ["PRODUCTS"]

aten = torch.ops.aten


def _combined(c: Pairs, a: Pair, b: Pair, along: tuple[int, int], multiply: Callable[[fx.Node, fx.Node, int], fx.Node]) -> Pair:
    """A bilinear operator of pairs; where both are complex, ``[ar ai]`` by ``[br; -bi]`` and by ``[bi; br]``.

    Args:
        along: the dimension of each operand that the operator sums over.
        multiply: calls it, for part 0 (real) or 1 (imaginary) of the result.
    """
    if a.im == 0 and b.im == 0:
        return Pair(multiply(*_both(a.re, b.re), 0), 0)
    if a.im == 0:
        return Pair(*(multiply(*_both(a.re, p), i) for i, p in enumerate(c.nodes(b))))
    if b.im == 0:
        return Pair(*(multiply(*_both(p, b.re), i) for i, p in enumerate(c.nodes(a))))
    left = c.call(aten.cat.default, list(c.nodes(a)), along[0])
    re, im = c.nodes(b)
    columns = ([re, c.call(aten.neg.default, im)], [im, re])
    return Pair(*(multiply(left, c.call(aten.cat.default, part, along[1]), i) for i, part in enumerate(columns)))


def _both(a: Part, b: Part) -> tuple[fx.Node, fx.Node]:
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return a, b


def _matrix_product(first: str, second: str, added: str = "") -> Lowering:
    def lower(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
        op: Any = node.target
        if any(isinstance(given.get(k), complex) for k in ("alpha", "beta")):
            return None
        a, b, extra = c.of(given[first]), c.of(given[second]), {k: given[k] for k in ("beta", "alpha") if k in given}
        rank = given[second].meta["val"].dim()
        more = c.nodes(c.of(given[added])) if added else ()
        along = (-1, -1 if rank == 1 else -2)
        return _combined(c, a, b, along, lambda x, y, i: c.call(op, *([more[i]] if added else []), x, y, **extra))

    return lower


def _linear(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    bias = (None, None) if given["bias"] is None else c.nodes(c.of(given["bias"]))
    a, weight = c.of(given["input"]), c.of(given["weight"])
    return _combined(c, a, weight, (-1, -1), lambda x, y, i: c.call(aten.linear.default, x, y, bias[i]))


def _convolution(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | None:
    if given["groups"] != 1:
        return None
    bias = (None, None) if given["bias"] is None else c.nodes(c.of(given["bias"]))
    rest = [given[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    a, weight, along = c.of(given["input"]), c.of(given["weight"]), (1, 0 if given["transposed"] else 1)
    return _combined(c, a, weight, along, lambda x, y, i: c.call(aten.convolution.default, x, y, bias[i], *rest))


PRODUCTS: dict[Any, Lowering] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default), _matrix_product("self", "mat2")),
    aten.matmul.default: _matrix_product("self", "other"),
    aten.mv.default: _matrix_product("self", "vec"),
    aten.addmm.default: _matrix_product("mat1", "mat2", "self"),
    aten.baddbmm.default: _matrix_product("batch1", "batch2", "self"),
    aten.linear.default: _linear,
    aten.convolution.default: _convolution,
}
"""Operators, and what each does to pairs."""
