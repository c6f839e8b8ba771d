"""Single choices of forward relevance propagation, and rule sets composed of others by module path and by operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from frpc.core.patterns import Pattern, inside, is_op
from frpc.core.torch_compat import OpOverload, OpOverloadPacket
from frpc.errors import OptionError
from frpc.rules.carriers import Product
from frpc.rules.sets.ruleset import FRP, Account, Box, RuleSet, Site
from frpc.rules.table import Rule

aten = torch.ops.aten

__all__ = ["Gate", "Half", "WinnerTakesAll", "compose"]


@dataclass(frozen=True)
class Gate(FRP):
    """Products give all of their relevance to one factor; the other (the gate, if there is one) is a coefficient."""

    product: Product | Mapping[str, Product] = "gate"


@dataclass(frozen=True)
class Half(FRP):
    """Products give half of their relevance to each factor."""

    product: Product | Mapping[str, Product] = "half"


@dataclass(frozen=True)
class WinnerTakesAll(FRP):
    """Max pools give all of their relevance to the winner: the standard rule, to be named in :func:`compose`."""


Key = str | OpOverload | OpOverloadPacket


@dataclass(frozen=True)
class _Composed(RuleSet):
    """See :func:`compose`."""

    choices: tuple[tuple[Key, RuleSet], ...]
    default: RuleSet

    @property
    def name(self) -> str:
        return f"{self.default.name} + {len(self.choices)} choices"

    @property
    def account(self) -> Account:
        sets = [self.default, *(chosen for _, chosen in self.choices)]
        if all(s.account.constants for s in sets):
            return self.default.account
        base = self.default.account
        return Account(False, base.reference, base.from_reference, base.gives, base.spelled_out, base.gradients, "see its parts")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the rule of the first choice that matches, else the default's."""
        return next((chosen for key, chosen in self.choices if _matches(key, site)), self.default).rule_for(site)

    def patterns(self) -> tuple[Pattern, ...]:
        """The keys of the choices, and what the sets that are chosen name themselves."""
        sets = (*(chosen for _, chosen in self.choices), self.default)
        keys = [
            Pattern("compose", key) if isinstance(key, str) else Pattern("compose", op=key, as_called=True)
            for key, _ in self.choices
        ]
        return (*keys, *(pattern for rules in sets for pattern in rules.patterns()))

    @property
    def for_first_layer(self) -> bool:
        return any(rules.for_first_layer for rules in (*(chosen for _, chosen in self.choices), self.default))

    def note_for(self, site: Site) -> str | None:
        """Forwards to the set that gives the rule."""
        return next((chosen for key, chosen in self.choices if _matches(key, site)), self.default).note_for(site)

    def product_for(self, module: str) -> Product:
        """Returns how products are split in a module."""
        for key, chosen in self.choices:
            if isinstance(key, str) and inside(module, key):
                return chosen.product_for(module)
        return self.default.product_for(module)

    def boxes(self) -> tuple[Box, ...]:
        return tuple(box for rules in (*(chosen for _, chosen in self.choices), self.default) for box in rules.boxes())


def _matches(key: Key, site: Site) -> bool:
    if isinstance(key, str):
        return inside(site.module, key)
    return is_op(site.op, key) or is_op(site.called, key)


def compose(choices: Mapping[Any, RuleSet], default: RuleSet | None = None) -> RuleSet:
    """Makes a rule set of others: by module path pattern and by operator, the first match counts.

    Args:
        choices: a pattern (``"features.0"``, ``"*.attn"``: the module and all inside it) or an operator, as the model calls it
            or by its name in the canonical graph (``torch.ops.aten.max_pool2d``, or one overload of it) -> the rule set asked
            there.
        default: asked everywhere else; :class:`FRP` by default.

    Raises:
        OptionError: if sets disagree on what multipliers mean (values or increments, relevance or gradients), or something is no
            rule set; when a model is compiled, for a key that matches nothing in it.
    """
    base = FRP() if default is None else default
    for key, chosen in choices.items():
        if not isinstance(key, str | OpOverload | OpOverloadPacket) or not isinstance(chosen, RuleSet):
            raise OptionError(
                f"compose takes patterns or operators -> rule sets, not {key!r} -> {type(chosen).__name__}; e.g. "
                '{"features.0": frpc.rules.ZBox(low, high)}.'
            )
        one, other = base.account, chosen.account
        if (one.reference, one.from_reference, one.gives, one.spelled_out) != (
            other.reference,
            other.from_reference,
            other.gives,
            other.spelled_out,
        ):
            raise OptionError(
                f"{chosen.name} at {key!r} and {base.name} cannot be combined: one explains values, the other increments or "
                "gradients. Give both the same reference, or compile them separately."
            )
    return _Composed(tuple(choices.items()), base)
