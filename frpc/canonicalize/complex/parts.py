"""Parts of complex values: made of real values, read, conjugated, cast, filled in, compared, measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.canonicalize.complex.pairs import Lowering, Pair, Pairs, Part, real_type
from frpc.core.graph import is_complex, replace

__all__ = ["PARTS"]

aten = torch.ops.aten


def _conjugate(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    z = c.of(given["self"])
    return Pair(z.re, c.neg(z.im))


def _joined(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return Pair(given["real"], given["imag"])


def _seen_as_complex(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return Pair(*(c.call(aten.select.int, given["self"], -1, part) for part in (0, 1)))


def _seen_as_real(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """A part that is read alone is that part; what reads both gets them side by side."""
    pair, last = c.of(given["self"]), node.meta["val"].dim() - 1
    for user in list(node.users):
        if user.target is aten.select.int and user.args[1] in (-1, last):
            c.at(user)
            replace(user, c.nodes(pair)[int(user.args[2])])  # type: ignore[arg-type]
    c.at(node)
    return c.stacked(pair)


def _length(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    z = c.of(given["self"])
    return c.node(c.length(z), z.re if isinstance(z.re, fx.Node) else z.im)


def _angle(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    found = c.angle(c.of(given["self"]))
    assert isinstance(found, fx.Node)
    return found


def _polar(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    return c.polar(given["abs"], given["angle"])


def _cast(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node | None:
    """To another complex type, from a real one, or to a real one, which drops the imaginary part."""
    dtype = given["dtype"]
    if dtype is None:
        return None
    z = c.of(given["self"])
    parts = [_typed(c, p, real_type(dtype)) for p in z.parts]
    return Pair(*parts) if dtype.is_complex else c.node(parts[0], parts[1])


def _typed(c: Pairs, part: Part, dtype: torch.dtype) -> Part:
    same = not isinstance(part, fx.Node) or part.meta["val"].dtype is dtype
    return part if same else c.call(aten._to_copy.default, part, dtype=dtype)


def _reread(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair | fx.Node | None:
    """``z.view(float)``: parts side by side, and back."""
    before, after = given["self"].meta["val"].dtype, given["dtype"]
    if before.is_complex and after is real_type(before):
        return c.call(aten.flatten.using_ints, c.stacked(c.of(given["self"])), -2, -1)
    if after.is_complex and before is real_type(after):
        both = c.call(aten.unflatten.int, given["self"], -1, [node.meta["val"].shape[-1], 2])
        return _seen_as_complex(c, node, {"self": both})
    return None


def _filled(c: Pairs, node: fx.Node, given: dict[str, Any]) -> Pair:
    """``full``, ``zeros``, ``ones`` and the like of a complex type."""
    halves = []
    for part in (0, 1):
        named = {**node.kwargs, "dtype": real_type(node.meta["val"].dtype)}
        args: list[Any] = [c.of(a).parts[part] if isinstance(a, complex) else a for a in node.args]
        args = [c.nodes(c.of(a))[0] if isinstance(a, fx.Node) and is_complex(a) else a for a in args]
        halves.append(c.call(node.target, *args, **named))  # type: ignore[arg-type]
    complex_fill = any(isinstance(a, complex) for a in node.args)
    return Pair(halves[0], halves[1] if complex_fill else 0)


def _equal(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    a, b, differ = c.of(given["self"]), c.of(given["other"]), "ne." in str(node.target)
    both = [_compared(c, x, y, differ) for x, y in zip((c.nodes(a)), b.parts, strict=True)]
    return c.call(aten.bitwise_or.Tensor if differ else aten.bitwise_and.Tensor, *both)


def _compared(c: Pairs, x: fx.Node, y: Part, differ: bool) -> fx.Node:
    if isinstance(y, fx.Node):
        return c.call(aten.ne.Tensor if differ else aten.eq.Tensor, x, y)
    return c.call(aten.ne.Scalar if differ else aten.eq.Scalar, x, y)


def _vector_norm(c: Pairs, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    z = c.of(given["self"])
    size = c.node(c.length(z), z.re)
    order = given["ord"] if "ord" in given else 2 if given["p"] is None else given["p"]
    return c.call(aten.linalg_vector_norm.default, size, order, given["dim"], given["keepdim"])


PARTS: dict[Any, Lowering] = {
    **dict.fromkeys((aten._conj.default, aten.conj_physical.default, aten._conj_physical.default), _conjugate),
    aten.complex.default: _joined,
    aten.polar.default: _polar,
    aten.view_as_complex.default: _seen_as_complex,
    aten.view_as_real.default: _seen_as_real,
    aten.real.default: lambda c, node, given: c.nodes(c.of(given["self"]))[0],
    aten.imag.default: lambda c, node, given: c.nodes(c.of(given["self"]))[1],
    aten.abs.default: _length,
    aten.angle.default: _angle,
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype), _cast),
    aten.view.dtype: _reread,
    **dict.fromkeys(
        (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.full_like.default), _filled
    ),
    **dict.fromkeys((aten.ones_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _filled),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar), _equal),
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), _vector_norm),
}
"""Operators, and what each does to pairs."""
