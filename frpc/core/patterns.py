"""Patterns: how options name modules and operators of a model, and the check that each of them names something.

**A pattern names a module and everything inside it.** ``"layer1"`` is ``layer1`` with ``layer1.0.conv1``; ``*``, ``?`` and
``[...]`` stand for other characters, dots among them; ``"*"`` is the whole model. The same holds in ``overrides``, ``product``,
:func:`compose` and ``constant``. An operator is named by an overload, ``torch.ops.aten.relu.default``, or by a packet,
``torch.ops.aten.relu``, which means all its overloads.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from frpc.core.graph import origin_of
from frpc.core.torch_compat import OpOverload
from frpc.errors import OptionError, nearest

__all__ = ["Pattern", "check_patterns", "inside", "is_op"]


@dataclass(frozen=True)
class Pattern:
    """One key of an option.

    Attributes:
        option: the option's name, for messages.
        path: the pattern of module paths; None where only an operator is named.
        op: the operator or packet; None where only modules are named.
        as_called: the operator may be named as the model calls it, and not only as the canonical graph has it.
    """

    option: str
    path: str | None = None
    op: Any = None
    as_called: bool = False

    def __str__(self) -> str:
        return repr(self.path) if self.op is None else str(self.op) if self.path is None else f"({self.path!r}, {self.op})"


def inside(module: str, pattern: str) -> bool:
    """Says whether a module is one that the pattern names, or lies inside one."""
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")


def is_op(op: Any, key: Any) -> bool:
    """Says whether an operator is the one that is named, or one of a packet's."""
    if isinstance(key, OpOverload):
        return op is key
    packet = getattr(op, "overloadpacket", None)
    return packet is not None and (
        packet is key or str(packet) == f"{key}_with_indices"
    )  # a canonical max pool gives its winners


def check_patterns(patterns: Iterable[Pattern], canonical: fx.Graph, modules: Sequence[str]) -> None:
    """Raises an error for patterns that match nothing in a model.

    Parts of the model that relevance does not reach count, and modules that compute nothing: there a pattern has no effect, but
    is no mistake.

    Args:
        patterns: the keys of all options.
        canonical: the graph that rules are written for.
        modules: paths of all modules of the model.

    Raises:
        OptionError: lists every such pattern, with the nearest names.
    """
    calls = [n for n in canonical.nodes if n.op == "call_function"]
    known = dict.fromkeys([*modules, *(name for n in calls for name in _names(n))])
    wrong = [f"{p.option}: {p} matches {missing}" for p in patterns if (missing := _missing(p, calls, list(known)))]
    if wrong:
        rule = "A pattern names a module and everything inside it; * stands for any characters."
        raise OptionError("\n".join([*wrong, rule]))


def _names(node: fx.Node) -> tuple[str, ...]:
    return (*(origin_of(node).modules or ("",)), *node.meta.get("layers", ()))


def _missing(pattern: Pattern, calls: Sequence[fx.Node], known: Sequence[str]) -> str:
    """An error text for a pattern that matches nothing, with the nearest names; empty if it matches something."""
    path = pattern.path
    if path is not None and not any(inside(name, path) for name in known):
        return f"no module of this model; {nearest(path, [name for name in known if name])}"
    if pattern.op is None:
        return ""
    here = [n for n in calls if path is None or any(inside(name, path) for name in _names(n))]
    if any(is_op(n.target, pattern.op) for n in here):
        return ""
    instead = dict.fromkeys(str(n.target) for n in here if is_op(origin_of(n).op, pattern.op))
    if instead:
        is_there = f"no operator of the graph that rules are written for: there it is {', '.join(instead)}, so name that"
        return "" if pattern.as_called else is_there
    where = "this model" if path is None else "these modules"
    return f"no operator of {where}; {nearest(str(pattern.op), dict.fromkeys(str(n.target) for n in here))}"
