"""Traits: facts about an operator that hold for all arguments. They are one record, next to the operator's rule.

A pass that needs to know something about an operator reads it here and keeps no separate list. **A trait not given is false**:
of an operator whose traits are unknown every pass takes the worst. It may be negative, it is no gate, its result may depend on
all of its operands, no program file holds it.

Traits are given where the rule is registered, as keywords of :func:`frpc.rule`, :func:`frpc.rules.table.elementwise` and
:func:`frpc.rules.table.linear_op`; :func:`frpc.rules.table.declare` gives them to an operator that has no rule.
:func:`frpc.rules.table.traits_of` looks them up::

    elementwise(aten.relu6.default, secant, formula="min(max(a, 0), 6) / a", nonnegative=always, in_file="constants")
    traits_of(node.target).pointwise
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

__all__ = [
    "NAMES",
    "UNKNOWN",
    "Axes",
    "InFile",
    "Interval",
    "Locality",
    "Operand",
    "Sign",
    "Traits",
    "always",
    "if_all",
    "is_nonnegative",
]

Operand = str | tuple[str, int]
"""Names an operand by its schema name, or ``(name, position)`` inside a list argument such as ``cat``'s."""

Sign = Callable[[Mapping[str, Any], Collection[Operand]], bool]
"""``sign(arguments, positive)``: is the result of a call nowhere negative? The arguments are by schema name, defaults filled in;
tensors among them are not looked at. ``positive`` names the operands that are known to be nowhere negative."""

Interval = tuple[Tensor, Tensor]
"""Two int64 vectors: at each position of an axis the first cell of the input that can reach it, and the cell behind the last."""

Axes = tuple[Interval, ...]
"""An interval for each spatial axis."""

Locality = Callable[[Mapping[str, Any], Mapping[Operand, Axes], Sequence[Any]], Axes | None]
"""``locality(arguments, seen, shape)``: which cells the result of a call can see. The arguments are by schema name, tensors as
example values; ``seen`` is what those operands see that come from the input; ``shape`` is the result's. None: all cells. Axes are
those of ``[B, C, *spatial]``; it is asked only where the result has as many as the operands."""

InFile = Literal["never", "programs", "constants", "layout"]


@dataclass(frozen=True)
class Traits:
    """Facts about an operator. Every default is safe for an unknown operator.

    Attributes:
        elementwise: the result is a function of one number, applied to every element of the first argument; other arguments
            are its parameters. Implies ``pointwise``.
        pointwise: an element of the result depends on nothing but the elements at its own place in the operands, broadcast.
        linear: the result is linear in the operands that the rule carries, at least where choices made by their values stay as
            they are, and M is the Jacobian. Gradients and increments then use the rule too.
        keeps_order: the result has the first operand's elements in the same order, in another shape. Implies ``rearranges``.
        rearranges: the result has the first operand's elements, each exactly once. Implies ``picks``.
        picks: every element of the result is an element of the first operand, or of one of the tensors in that list. Implies
            ``passes_gates``, ``keeps_tokens`` and, where nothing is said, ``nonnegative`` where those tensors are.
        keeps_tokens: of token numbers it makes token numbers: it moves them, puts others between or shifts them.
        view: the result usually lies in the first operand's memory.
        casts: the result is the first operand in another type.
        ignores: arguments whose values do not matter; their shape and type may.
        factors: the two arguments whose product the result is, alone or added to something.
        weighted: it multiplies one operand by what are usually parameters, and sums: a layer with weights.
        activation: it stands between layers with weights as their nonlinearity.
        gate: the result is a number in (0, 1), a norm or what norms and softmax are made of (exp, sqrt, 1/a): as a factor
            it says how much of the other passes.
        passes_gates: of a gate and constants it makes a gate.
        nonnegative: see :data:`Sign`.
        rectifies: says for a call's arguments, by schema name, whether it sets negative values to 0, as ReLU does.
        complex: its rule knows complex numbers, as pairs of real ones.
        locality: see :data:`Locality`; pointwise operators need none.
        spelled_out: a norm that rules of increments decompose into the operators it computes.
        in_file: what a program file may use it for: ``programs``; ``constants`` too, which are computed when a file is read;
            ``layout`` too, which a model's own weights go through.
    """

    elementwise: bool = False
    pointwise: bool = False
    linear: bool = False
    keeps_order: bool = False
    rearranges: bool = False
    picks: bool = False
    keeps_tokens: bool = False
    view: bool = False
    casts: bool = False
    ignores: tuple[str, ...] = ()
    factors: tuple[str, str] | None = None
    weighted: bool = False
    activation: bool = False
    gate: bool = False
    passes_gates: bool = False
    nonnegative: Sign | None = None
    rectifies: Callable[[Mapping[str, Any]], bool] | None = None
    complex: bool = False
    locality: Locality | None = None
    spelled_out: bool = False
    in_file: InFile = "never"

    @property
    def reshapes(self) -> bool:
        """The result is the first operand seen in another shape."""
        return self.keeps_order and self.view

    @property
    def whole_view(self) -> bool:
        """The result shows every element of the first operand once, in its memory."""
        return self.rearranges and self.view

    def __post_init__(self) -> None:
        for cause, effects in _IMPLIED.items():
            if getattr(self, cause):
                for effect in effects:
                    object.__setattr__(self, effect, True)


_IMPLIED = {  # in an order in which effects come before what they cause
    "elementwise": ("pointwise",),
    "keeps_order": ("rearranges",),
    "rearranges": ("picks",),
    "picks": ("passes_gates", "keeps_tokens"),
}

NAMES = frozenset(f.name for f in fields(Traits))
UNKNOWN = Traits()


def always(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The result is nonnegative for all arguments."""
    return True


def if_all(*names: str) -> Sign:
    """The result is nonnegative if all these arguments are: operands, lists of operands or numbers."""

    def sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
        return all(is_nonnegative(name, arguments[name], positive) for name in names)

    return sign


def is_nonnegative(name: str, value: Any, positive: Collection[Operand]) -> bool:
    """Says whether an argument is known to be nonnegative: a number, an operand or a list of operands."""
    if isinstance(value, list | tuple):
        return all((name, i) in positive for i in range(len(value)))
    if isinstance(value, int | float):
        return value >= 0
    return name in positive
