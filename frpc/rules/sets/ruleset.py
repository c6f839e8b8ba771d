"""Rule sets: which rule each node of a graph gets, and what the multipliers mean that are pulled through the rules.

A rule set has a method, ``rule_for(site)``, and a property, its :class:`Account`. :class:`FRP` takes rules from the
table of affine forms; ``overrides`` replaces rules by module path pattern or by operator, first match first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from frpc.core.patterns import Pattern, inside, is_op
from frpc.core.torch_compat import OpOverload, schema_of
from frpc.core.values import all_hold, whole
from frpc.errors import InputError, OptionError
from frpc.rules.carriers import PRODUCTS, Product
from frpc.rules.references import Reference
from frpc.rules.table import TABLE, Rule, RuleFunction

__all__ = ["FRP", "Account", "Box", "RuleSet", "Site", "check_boxes"]

Box = tuple[Tensor | float, Tensor | float]
Gives = Literal["relevance", "multiplier"]


@dataclass(frozen=True)
class Site:
    """A call that needs a rule.

    Attributes:
        op: the operator.
        module: path of the innermost module around the call.
        first: the call reads the explained input, directly or through views.
        weighted: the call multiplies what it carries by something that does not carry: a convolution, a linear layer or
            another product of matrices.
        by_value: the other factor is not a parameter but is computed from the input.
        behind: the function of one number that is the only reader of the result, if there is one.
        before: the call is such a function, and it reads a layer with weights.
        called: the operator as the model calls it, which may become several operators of the graph.
    """

    op: Any
    module: str
    first: bool = False
    weighted: bool = False
    by_value: bool = False
    behind: OpOverload | None = None
    before: bool = False
    called: Any = None


@dataclass(frozen=True)
class Account:
    """What the multipliers ``G`` of a rule set mean.

    Attributes:
        constants: constants are tracked, and the bias policy distributes their share of the explained number. Otherwise what
            a map leaves out is what its rules absorbed.
        reference: relevance is ``(a - a_ref) G``, which explains the change since a reference input, instead of ``a G``.
        from_reference: rules use the reference as well as the input.
        gives: ``relevance``, or the ``multiplier`` itself (plain gradients).
        spelled_out: norms are decomposed into the operators they compute; products carry both factors and both operands of
            a division.
        gradients: the rules give autograd's derivative, which stops at ``detach()``. Other rules explain values, and for them
            ``detach`` is a copy.
        conserves: what the map sums to, in words, for tables.
    """

    constants: bool = False
    reference: Reference | None = None
    from_reference: bool = False
    gives: Gives = "relevance"
    spelled_out: bool = False
    gradients: bool = False
    conserves: str = ""


class RuleSet:
    """Assigns a rule to every node; see :class:`FRP` for one."""

    @property
    def name(self) -> str:
        """Short name, shown in tables."""
        return type(self).__name__

    @property
    def account(self) -> Account:
        """What its multipliers mean."""
        return Account()

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the rule for a call, or None if there is none."""
        return TABLE.get(site.op)

    def patterns(self) -> tuple[Pattern, ...]:
        """The modules and operators that its options name; each must exist in the model."""
        return ()

    @property
    def for_first_layer(self) -> bool:
        """Says whether the layer that reads the input gets a different rule."""
        return False

    def note_for(self, site: Site) -> str | None:
        """Says why a call gets a different rule than the one that this set is named after; None if it does not."""
        return None

    def product_for(self, module: str) -> Product:
        """Returns how products of two carried values are split in a module."""
        return "auto"

    def boxes(self) -> tuple[Box, ...]:
        """Bounds ``(low, high)`` that inputs must keep for the rules to hold; none by default."""
        return ()

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Raises an error for inputs outside a box that the rules need.

        Raises:
            InputError: says how far outside they are.
        """
        check_boxes(inputs, self.boxes())


def check_boxes(inputs: Sequence[Tensor], boxes: Sequence[Box]) -> None:
    """Raises an error for inputs outside one of the boxes.

    Raises:
        InputError: says how far outside they are.
    """
    for low, high in boxes:
        for x in (x for x in inputs if x.is_floating_point()):
            inside = (low - x <= 1e-6) & (x - high <= 1e-6)
            if all_hold(inside, "The z-box rule is for inputs between low and high; this one goes outside."):
                continue
            under, above = float(whole(low - x).max()), float(whole(x - high).max())
            where = f"{under:.3g} below low" if under >= above else f"{above:.3g} above high"
            raise InputError(
                f"The z-box rule needs inputs between low and high; this one goes {where}. Give the bounds of your "
                "preprocessing, for a normalized photo low = -mean/std and high = (1 - mean)/std."
            )


@dataclass(frozen=True)
class FRP(RuleSet):
    """Forward relevance propagation: ``V_z = sum_k M_k V_k + c/N`` with ``sum(V_z) == z``.

    Args:
        overrides: where -> rule function, as for :func:`frpc.rule`. Where is an operator of the canonical graph (an overload or
            a packet), a pattern of module paths (``"features"``: every operator in there), or a pair of both.
        product: how a product ``a b`` of two carried values is split, everywhere or by module path pattern (first match
            first, ``"auto"`` if none matches). ``"half"``: ``b/2`` on a, ``a/2`` on b. ``"gate"``: one factor is a
            coefficient and the other takes all; the one that is a sigmoid, softmax, exponential or norm, else the second.
            ``"auto"``: ``gate`` where exactly one factor is of that kind (attention, squeeze-excite, LSTM, norms), else ``half``.

    Raises:
        OptionError: for an unknown ``product``; when a model is compiled, for a pattern that matches nothing in it.

    Exact when: always; every operator's rule is an identity at the given input.

    Source: thesis eqs. 3.5, 3.8, 3.12; operators beyond it in closed form (``docs/rules.md``).
    """

    overrides: Mapping[Any, RuleFunction] = field(default_factory=dict)
    product: Product | Mapping[str, Product] = "auto"

    def __post_init__(self) -> None:
        ways = [self.product] if isinstance(self.product, str) else self.product.values()
        for way in ways:
            if way not in PRODUCTS:
                raise OptionError(f"product={way!r} is unknown; choose one of {', '.join(PRODUCTS)}.")

    @property
    def account(self) -> Account:
        return Account(constants=True, conserves="the explained output")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the override that matches first, else the operator's affine form."""
        standard = TABLE.get(site.op)
        for key, function in self.overrides.items():
            path, wanted = _place(key)
            matches = (path is None or inside(site.module, path)) and (wanted is None or is_op(site.op, wanted))
            if matches and isinstance(site.op, OpOverload):
                carries = standard.carries if standard else (schema_of(site.op).arguments[0].name,)
                return Rule(site.op, function, carries, "given by the user", "override")
        return standard

    def product_for(self, module: str) -> Product:
        """Returns how products are split in a module."""
        if isinstance(self.product, str):
            return self.product
        return next((way for path, way in self.product.items() if inside(module, path)), "auto")

    def patterns(self) -> tuple[Pattern, ...]:
        """The keys of ``overrides`` and of ``product``."""
        places = [Pattern("overrides", *_place(key)) for key in self.overrides]
        return (*places, *(Pattern("product", path) for path in (() if isinstance(self.product, str) else self.product)))


def _place(key: Any) -> tuple[str | None, Any]:
    """The pattern of module paths and the operator in a key of ``overrides``; None for a part that it does not have."""
    if isinstance(key, tuple):
        return key[0], key[1]
    return (key, None) if isinstance(key, str) else (None, key)
