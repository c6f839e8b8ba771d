"""Rule sets: which rule each node of a graph gets.

A rule set answers one question, ``rule_for(op, module)``. :class:`FRP` answers from the table of affine forms; ``overrides``
replaces rules by module path pattern or by operator, first match first.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch._ops import OpOverload

from frpc.affine import TABLE, Rule, RuleFunction
from frpc.carriers import PRODUCTS, Product
from frpc.errors import OptionError

__all__ = ["FRP", "RuleSet"]


class RuleSet(Protocol):
    """Assigns a rule to a node."""

    @property
    def name(self) -> str:
        """Short name, shown in tables."""
        ...

    def rule_for(self, op: Any, module: str) -> Rule | None:
        """Returns the rule for an operator called in a module, or None where there is none."""
        ...

    def product_for(self, module: str) -> Product:
        """Returns how products of two carried values are shared in a module."""
        ...


@dataclass(frozen=True)
class FRP:
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
    def name(self) -> str:
        return "FRP"

    def rule_for(self, op: Any, module: str) -> Rule | None:
        """Returns the override that matches first, else the operator's affine form."""
        standard = TABLE.get(op)
        for key, function in self.overrides.items():
            path, wanted = key if isinstance(key, tuple) else (key, None) if isinstance(key, str) else ("*", key)
            matches = fnmatch.fnmatchcase(module, path) and wanted in (None, op)
            if matches and isinstance(op, OpOverload):
                carries = standard.carries if standard else (op._schema.arguments[0].name,)
                return Rule(op, function, carries, "given by the user", "override")
        return standard

    def product_for(self, module: str) -> Product:
        """Returns how products are shared in a module."""
        if isinstance(self.product, str):
            return self.product
        return next((way for path, way in self.product.items() if fnmatch.fnmatchcase(module, path)), "auto")
