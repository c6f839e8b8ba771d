"""What a rule is: an operator, at one input, written as an affine map of the values it carries.

``z = sum_k M_k a_k + c``. If every carried operand's relevance map sums to the operand, ``V_z = sum_k M_k V_k + c/N`` sums to
``z``: conservation holds operator by operator (thesis eq. 3.12, extended to all operators).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import OpOverload, schema_of
from frpc.core.traits import NAMES, UNKNOWN, Operand, Traits
from frpc.errors import OptionError, nearest
from frpc.maps import LinearMap, LinearOp, Pool, Scale

__all__ = [
    "TABLE",
    "Affine",
    "Call",
    "Operand",
    "Rule",
    "RuleTable",
    "declare",
    "elementwise",
    "linear_op",
    "rule",
    "traits_of",
]


@dataclass(frozen=True, eq=False)
class Affine:
    """``z = sum_k M_k a_k + c`` for one call.

    Attributes:
        terms: a linear map for each carried operand.
        constant: ``c``, broadcastable to the result; None if it is zero, and in rule sets that do not track constants.
        direct: the pulled value is the operands' relevance itself, not a multiplier of it: rules of a first layer, which share
            relevance out without looking at the input's value.
        joined: the maps include the function after the call, so the call's result has no separate multiplier.
    """

    terms: Mapping[Operand, LinearMap]
    constant: Tensor | float | None = None
    direct: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Call:
    """One call of an operator as a rule sees it.

    Attributes:
        op: the operator.
        args: its arguments by schema name, defaults filled in; tensors hold values.
        out: its result; for operators with several results the tuple of them, of which the first carries.
        carried: the operands that carry relevance.
        reference: the same call at the reference input, in rule sets that explain increments; its batch is 1 or the call's.
        positive: the operands that are known to be nonnegative everywhere.
        rectified: only ReLUs read the result, so nothing is pulled to its negative elements.
        behind: the function of one number that is the only reader of the result, if there is one and the result is not explained.
    """

    op: OpOverload
    args: Mapping[str, Any]
    out: Any
    carried: frozenset[Operand]
    reference: Call | None = None
    positive: frozenset[Operand] = frozenset()
    rectified: bool = False
    behind: Callable[[Tensor], Tensor] | None = None

    @property
    def value(self) -> Tensor:
        """The result that carries relevance."""
        return self.out[0] if isinstance(self.out, tuple | list) else self.out

    def carries(self, operand: Operand) -> bool:
        """Says whether the operand carries relevance in this call."""
        return operand in self.carried


RuleFunction = Callable[..., Affine]


@dataclass(frozen=True)
class Rule:
    """How one operator becomes an affine map.

    Attributes:
        op: the operator.
        function: ``function(call, *arguments) -> Affine``.
        carries: names of the arguments that may carry relevance.
        formula: ``M`` and ``c`` in one line of text, for the rule table.
        source: paper and equation.
        traits: other facts about the operator.
    """

    op: OpOverload
    function: RuleFunction
    carries: tuple[str, ...]
    formula: str
    source: str
    traits: Traits = UNKNOWN

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    def __call__(self, call: Call) -> Affine:
        return self.function(call, *call.args.values())


@dataclass
class RuleTable:
    """Rules by operator. Registering an operator twice is an error unless ``override`` is true.

    Attributes:
        rules: the rules, each with the traits of its operator.
        described: traits of operators that have no rule.
        named: operators of either kind by their names.
        refused: operators that cannot have a rule, and why.
    """

    rules: dict[OpOverload, Rule] = field(default_factory=dict)
    described: dict[OpOverload, Traits] = field(default_factory=dict)
    named: dict[str, OpOverload] = field(default_factory=dict)
    refused: dict[OpOverload, str] = field(default_factory=dict)

    def add(self, new: Rule, override: bool = False) -> None:
        if new.op in self.rules and not override:
            raise OptionError(f"{new.op} already has a rule ({self.rules[new.op].name}); pass override=True to replace it.")
        self.rules[new.op] = new
        self.named[str(new.op)] = new.op

    def describe(self, op: OpOverload, traits: Traits) -> None:
        if op in self.rules or op in self.described:
            raise OptionError(f"{op} already has traits: give all of them when you register its rule.")
        self.described[op] = traits
        self.named[str(op)] = op

    def get(self, op: Any) -> Rule | None:
        return self.rules.get(op)


TABLE = RuleTable()
"""The rules of forward relevance propagation, filled by the modules of :mod:`frpc.rules` and by :func:`rule`."""


def traits_of(op: Any) -> Traits:
    """Returns what is known of an operator: its traits, or those of an unknown one, which are the most cautious."""
    found = TABLE.rules.get(op)
    return found.traits if found is not None else TABLE.described.get(op, UNKNOWN)


def declare(*ops: OpOverload, **traits: Any) -> None:
    """Gives traits to operators that have no rule; see :class:`~frpc.core.traits.Traits` for their names.

    Raises:
        OptionError: for a trait that does not exist, or an operator with a rule: its traits are given there.
    """
    record = _record(UNKNOWN, traits)
    for op in ops:
        TABLE.describe(op, record)


def _record(known: Traits, given: Mapping[str, Any]) -> Traits:
    """Adds traits to those that are known."""
    for name in given:
        if name not in NAMES:
            raise OptionError(f"{name!r} is not a trait of operators; {nearest(name, sorted(NAMES))}.")
    return replace(known, **given)


def rule(
    *ops: OpOverload,
    carries: str | Sequence[str] | None = None,
    formula: str = "",
    source: str = "",
    override: bool = False,
    **traits: Any,
) -> Callable[[RuleFunction], RuleFunction]:
    """Registers a function as the rule of one or more operators.

    The function gets the :class:`Call` and the operator's arguments in schema order, as tensors and numbers, and returns
    an :class:`Affine`. It must be plain tensor code.

    Args:
        ops: operator overloads, e.g. ``torch.ops.aten.cumsum.default``.
        carries: names of the arguments that may carry relevance; by default the first tensor argument.
        formula: ``M`` and ``c`` in words, shown in tables.
        source: where the rule comes from.
        override: replace an existing rule. The operator keeps its traits, except ``linear``.
        traits: facts about the operator, by the names of :class:`~frpc.core.traits.Traits`: ``elementwise=True``,
            ``linear=True`` (M is the Jacobian, so that gradients and increments can use the rule too), ``nonnegative=always`` ...
            Traits that are not given are assumed to be false.

    Raises:
        OptionError: for something that is not an operator overload, an argument the operator does not have, a trait that does not
            exist, or a second rule.
    """

    def register(function: RuleFunction) -> RuleFunction:
        for op in ops:
            if not isinstance(op, OpOverload):
                raise OptionError(f"{op} is not an operator overload: give one, such as torch.ops.aten.mean.dim, not aten.mean.")
            names = [a.name for a in schema_of(op).arguments]
            chosen = (carries,) if isinstance(carries, str) else tuple(carries or names[:1])
            unknown = [n for n in chosen if n not in names]
            if unknown:
                raise OptionError(f"{op} has no argument {unknown[0]!r}; it has {', '.join(names)}.")
            record = _record(replace(traits_of(op), linear=False) if override else TABLE.described.get(op, UNKNOWN), traits)
            TABLE.add(Rule(op, function, chosen, formula, source or "method: affine form", record), override)
        return function

    return register


def elementwise(
    op: OpOverload,
    secant: Callable[..., Tensor | float],
    at_zero: float | Callable[..., float] = 0.0,
    *,
    formula: str,
    **traits: Any,
) -> None:
    """Registers ``z = f(a)`` elementwise: ``M = (f(a) - f(0)) / a``, the secant through 0, and ``c = f(0)``.

    Args:
        op: the operator.
        secant: ``secant(a, *arguments)``, the closed form of M: finite and accurate at every a.
        at_zero: ``f(0)``, a number or a function of the arguments.
        formula: the closed form in text.
        traits: what else is true of the operator, see :func:`rule`.
    """

    def function(call: Call, a: Tensor, *arguments: Any) -> Affine:
        constant = at_zero(*arguments) if callable(at_zero) else at_zero
        return Affine({_first(op): Scale(secant(a, *arguments), a.shape)}, constant or None)

    function.__name__ = schema_of(op).name.split("::")[1]
    rule(op, formula=formula, source="T 3.8, method §2: secant through 0", elementwise=True, **traits)(function)


def linear_op(
    op: OpOverload, function: Callable[..., Callable[[Tensor], Tensor]], *, formula: str = "", pool: bool = False, **traits: Any
) -> None:
    """Registers an operator that is linear in its first argument; ``c`` is zero.

    Args:
        op: the operator.
        function: ``function(call, a, *arguments)`` returns the linear function, which takes ``[*L, *a.shape]``.
        formula: M in text.
        pool: the function treats samples independently but does not take column dimensions: fold them into the batch.
        traits: what else is true of the operator, see :func:`rule`.
    """
    kind = Pool if pool else LinearOp

    def build(call: Call, a: Tensor, *arguments: Any) -> Affine:
        return Affine({_first(op): kind(function(call, a, *arguments), a.shape, call.value.shape)})

    build.__name__ = schema_of(op).name.split("::")[1]
    rule(op, formula=formula or "the operator itself", source="method §2: linear", linear=True, **traits)(build)


def _first(op: OpOverload) -> str:
    return str(schema_of(op).arguments[0].name)


def is_float(value: Any) -> bool:
    """Says whether a value is a floating-point tensor, the only kind that can carry relevance."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
