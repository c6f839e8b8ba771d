"""Complex values as pairs of real ones: what a pass that takes them apart works with.

A node with complex values has two real nodes beside it, its real and its imaginary part. Where one is known to be a number (the
imaginary part of a real value is 0), it stays a number, and nothing is computed with it that has no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.editor import Editor
from frpc.core.graph import is_complex
from frpc.core.torch_compat import FakeTensorMode, OpOverload, fake_mode_of, is_fake

__all__ = ["Lowering", "Pair", "Pairs", "Part", "real_type"]

aten = torch.ops.aten
Part = fx.Node | float

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


@dataclass(frozen=True)
class Pair:
    """A complex value: real part and imaginary part, each a node with real values, or a number."""

    re: Part
    im: Part

    @property
    def parts(self) -> tuple[Part, Part]:
        return self.re, self.im


def real_type(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of a complex type's parts; a real type stays."""
    return _REAL.get(dtype, dtype)


class Pairs:
    """The parts of a graph's complex values, and arithmetic with parts before the node that is being replaced.

    Attributes:
        edit: inserts calls before the current node.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.module = graph_module
        self.found: dict[fx.Node, Pair] = {}
        self.edit: Editor
        examples = [n.meta.get("val") for n in graph_module.graph.nodes]
        self.mode: FakeTensorMode = next(fake_mode_of(e) for e in examples if isinstance(e, Tensor) and is_fake(e))

    def at(self, node: fx.Node) -> None:
        """Calls go before this node from now on."""
        self.edit = Editor(self.module, node)

    def of(self, value: Any) -> Pair:
        """Returns the parts of a value: of a node, or of a number."""
        if isinstance(value, complex):
            return Pair(value.real, value.imag)
        if not isinstance(value, fx.Node) or not is_complex(value):
            return Pair(value, 0)
        if value not in self.found:  # a parameter, or the result of an operator that stays complex
            both = self.call(aten.view_as_real.default, value)
            self.found[value] = Pair(*(self.call(aten.select.int, both, -1, part) for part in (0, 1)))
        return self.found[value]

    def call(self, op: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call; one that makes a tensor of nothing (``zeros``) needs the mode of the examples."""
        with self.mode:
            return self.edit.call(op, *args, **kwargs)

    # ---- arithmetic ------------------------------------------------------------------------------------------------

    def add(self, a: Part, b: Part, alpha: float = 1) -> Part:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a + alpha * b
        if not isinstance(b, fx.Node) and b == 0:
            return a
        if not isinstance(a, fx.Node):
            scaled = self.mul(b, alpha)
            return scaled if a == 0 else self.call(aten.add.Tensor, scaled, a)
        return self.call(aten.add.Tensor, a, b, **({} if alpha == 1 else {"alpha": alpha}))

    def sub(self, a: Part, b: Part, alpha: float = 1) -> Part:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self.call(aten.sub.Tensor, a, b, **({} if alpha == 1 else {"alpha": alpha}))
        return self.add(a, b, -alpha)

    def mul(self, a: Part, b: Part) -> Part:
        if not isinstance(a, fx.Node):
            a, b = b, a
        if not isinstance(a, fx.Node):
            assert not isinstance(b, fx.Node)
            return a * b
        if not isinstance(b, fx.Node) and b in (0, 1, -1):
            return 0 if b == 0 else a if b == 1 else self.call(aten.neg.default, a)
        return self.call(aten.mul.Tensor, a, b)

    def neg(self, a: Part) -> Part:
        return self.mul(a, -1)

    def div(self, a: Part, b: Part) -> Part:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a / b
        if not isinstance(a, fx.Node):
            return 0 if a == 0 else self.mul(self.call(aten.reciprocal.default, b), a)
        return self.call(aten.div.Tensor, a, b)

    def product(self, a: Pair, b: Pair) -> Pair:
        """``(ar br - ai bi, ar bi + ai br)``."""
        return Pair(
            self.sub(self.mul(a.re, b.re), self.mul(a.im, b.im)),
            self.add(self.mul(a.re, b.im), self.mul(a.im, b.re)),
        )

    def quotient(self, a: Pair, b: Pair) -> Pair:
        """``a conj(u) / |b|`` with ``u = b / |b|``: no square that leaves the range of the type."""
        if b.im == 0:
            return Pair(self.div(a.re, b.re), self.div(a.im, b.re))
        size = self.length(b)
        unit = Pair(self.div(b.re, size), self.neg(self.div(b.im, size)))
        found = self.product(a, unit)
        return Pair(self.div(found.re, size), self.div(found.im, size))

    def length(self, a: Pair) -> Part:
        """``|a|``."""
        if not isinstance(a.re, fx.Node) and not isinstance(a.im, fx.Node):
            return abs(complex(a.re, a.im))
        if a.im == 0 or a.re == 0:
            return self.call(aten.abs.default, a.re if a.im == 0 else a.im)
        return self.call(aten.hypot.default, self.node(a.re, a.im), self.node(a.im, a.re))

    def angle(self, a: Pair) -> Part:
        """``atan2(im, re)``."""
        return self.call(aten.atan2.default, self.node(a.im, a.re), self.node(a.re, a.im))

    def polar(self, size: Part, angle: Part) -> Pair:
        """``size (cos angle, sin angle)``."""
        assert isinstance(angle, fx.Node)
        return Pair(*(self.mul(size, self.call(op, angle)) for op in (aten.cos.default, aten.sin.default)))

    def node(self, part: Part, like: Part) -> fx.Node:
        """Returns a part as a node: a number fills a tensor like another part."""
        if isinstance(part, fx.Node):
            return part
        assert isinstance(like, fx.Node)
        return self.call(aten.full_like.default, like, part)

    # ---- as nodes ------------------------------------------------------------------------------------------------------

    def nodes(self, pair: Pair) -> tuple[fx.Node, fx.Node]:
        """Returns both parts as nodes."""
        return self.node(pair.re, pair.im), self.node(pair.im, pair.re)

    def stacked(self, pair: Pair) -> fx.Node:
        """``view_as_real``: both parts along a new last dimension."""
        both = [self.call(aten.unsqueeze.default, part, -1) for part in self.nodes(pair)]
        return self.call(aten.cat.default, both, -1)

    def fitted(self, pair: Pair, value: Tensor) -> Pair:
        """Gives both parts the type and the shape that the complex value has."""
        dtype = real_type(value.dtype)
        parts: list[Part] = []
        for part in pair.parts:
            if isinstance(part, fx.Node) and part.meta["val"].dtype is not dtype:
                part = self.call(aten._to_copy.default, part, dtype=dtype)
            parts.append(part)
        short = [p for p in parts if isinstance(p, fx.Node) and not _same(p, value)]
        if not short:
            return Pair(*parts)
        whole = next((p for p in parts if isinstance(p, fx.Node) and p not in short), None)
        if whole is None:  # x + iy with x and y of other shapes: broadcast one by the other
            re, im = (self.call(aten.zeros_like.default, p) for p in self.nodes(pair))
            whole = self.call(aten.add.Tensor, re, im)
        return Pair(*(self.call(aten.expand_as.default, p, whole) if p in short else p for p in parts))


def _same(node: fx.Node, value: Tensor) -> bool:
    return [str(n) for n in node.meta["val"].shape] == [str(n) for n in value.shape]


Lowering = Callable[[Pairs, fx.Node, dict[str, Any]], Pair | fx.Node | None]
"""``lowering(pairs, node, arguments)``: what an operator does to pairs; None where it is not known."""
