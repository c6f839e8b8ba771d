"""Rule sets: which rule each node of a graph gets, and what the multipliers that are pulled through them mean.

A rule set answers one question, ``rule_for(site)``, and has one property, its :class:`Account`. :class:`FRP` answers from the
table of affine forms; ``overrides`` replaces rules by module path pattern or by operator, first match first.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from frpc.affine import TABLE, Rule, RuleFunction
from frpc.carriers import PRODUCTS, Product
from frpc.errors import InputError, OptionError
from frpc.references import Reference
from frpc.torch_compat import OpOverload, schema_of
from frpc.values import all_hold, whole

__all__ = ["FRP", "Account", "Box", "RuleSet", "Site", "check_boxes"]

Box = tuple[Tensor | float, Tensor | float]
Gives = Literal["relevance", "multiplier"]


@dataclass(frozen=True)
class Site:
    """Where a rule is asked for.

    Attributes:
        op: the operator.
        module: path of the innermost module around the call.
        first: the call reads the explained input, but for views.
        weighted: the call multiplies by parameters: a convolution or a linear layer.
        behind: the one activation that reads the result and is its only reader, if there is one.
        before: the call is such an activation, and what it reads is a layer with weights.
    """

    op: Any
    module: str
    first: bool = False
    weighted: bool = False
    behind: OpOverload | None = None
    before: bool = False


@dataclass(frozen=True)
class Account:
    """What the multipliers ``G`` of a rule set mean.

    Attributes:
        constants: constants are followed, and their share of the explained number is spread by the bias policy. Otherwise what
            a map leaves out is what its rules absorbed.
        reference: relevance is ``(a - a_ref) G``, an account of what changed since a reference input, instead of ``a G``.
        from_reference: rules look at the reference too, and not at the input alone.
        gives: ``relevance``, or the ``multiplier`` itself (plain gradients).
        spelled_out: norms are taken apart into what they compute; products carry both factors and both operands of
            a division.
        gradients: what is asked for is autograd's derivative, which stops at ``detach()``. Other rules explain values, and there
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
        """Returns the rule for a call, or None where there is none."""
        return TABLE.get(site.op)

    def product_for(self, module: str) -> Product:
        """Returns how products of two carried values are shared in a module."""
        return "auto"

    def boxes(self) -> tuple[Box, ...]:
        """Bounds ``(low, high)`` that inputs must keep for the rules to hold; none by default."""
        return ()

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuses inputs that the rules cannot take: those outside a box.

        Raises:
            InputError: says how far outside they are.
        """
        check_boxes(inputs, self.boxes())


def check_boxes(inputs: Sequence[Tensor], boxes: Sequence[Box]) -> None:
    """Refuses inputs outside one of the boxes.

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
                f"The z-box rule is for inputs between low and high; this one goes {where}. Give the bounds of your "
                "preprocessing, for a normalized photo low = -mean/std and high = (1 - mean)/std."
            )


@dataclass(frozen=True)
class FRP(RuleSet):
    """Forward relevance propagation: ``V_z = sum_k M_k V_k + c/N`` with ``sum(V_z) == z``.

    Args:
        overrides: where -> rule function, as for :func:`frpc.rule`. Where is an operator overload, a module path pattern
            (``"features.*"``: every operator there), or a pair of both.
        product: how a product ``a b`` of two carried values is shared, everywhere or by module path pattern (first match
            first, ``"auto"`` where none matches). ``"half"``: ``b/2`` on a, ``a/2`` on b. ``"gate"``: one factor is a
            coefficient and the other takes all; the one that is a sigmoid, softmax, exponential or norm, else the second.
            ``"auto"``: ``gate`` where exactly one factor is of that kind (attention, squeeze-excite, LSTM, norms), else ``half``.

    Raises:
        OptionError: for an unknown way to share products.

    Exact when: always; every operator's rule is an identity at the given input.

    Source: thesis eqs. 3.5, 3.8, 3.12; operators beyond it in closed form (``docs/rules.md``).
    """

    overrides: Mapping[str | OpOverload | tuple[str, OpOverload], RuleFunction] = field(default_factory=dict)
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
            path, wanted = key if isinstance(key, tuple) else (key, None) if isinstance(key, str) else ("*", key)
            matches = fnmatch.fnmatchcase(site.module, path) and wanted in (None, site.op)
            if matches and isinstance(site.op, OpOverload):
                carries = standard.carries if standard else (schema_of(site.op).arguments[0].name,)
                return Rule(site.op, function, carries, "given by the user", "override")
        return standard

    def product_for(self, module: str) -> Product:
        """Returns how products are shared in a module."""
        if isinstance(self.product, str):
            return self.product
        return next((way for path, way in self.product.items() if fnmatch.fnmatchcase(module, path)), "auto")
