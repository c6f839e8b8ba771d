"""Assignment: which nodes carry relevance, and by which rule. All gaps are collected before anything is said."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload

from frpc.affine import Affine, Call, Operand, Rule, bind
from frpc.errors import Gap, RuleDeclinedError, UnsupportedOpError
from frpc.graph import Batch, batch_of, describe, origin_of
from frpc.maps import LinearMap
from frpc.rules.ruleset import RuleSet

__all__ = ["Assigned", "Assignment", "assign", "call_of"]

aten = torch.ops.aten

_VALUE_FREE = {  # operators whose result does not depend on the values of a floating operand
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.sym_size.int,
}


@dataclass(frozen=True)
class Assigned:
    """The rule of one node.

    Attributes:
        node: the graph node.
        rule: its rule.
        operands: which arguments carry, and the nodes that feed them.
        batch: where the samples are in its result.
        maps: class names of the maps the rule chose, for tables.
    """

    node: fx.Node
    rule: Rule
    operands: dict[Operand, fx.Node]
    batch: Batch
    example: Affine

    @property
    def maps(self) -> str:
        return " + ".join(type(m).__name__ for m in self.example.terms.values()) or "constant"


@dataclass(frozen=True)
class Assignment:
    """Rules for every node of a graph that carries relevance.

    Attributes:
        graph_module: the canonical graph.
        sources: the nodes relevance is asked about, in input order.
        rules: node -> its rule, in graph order.
        carried: all nodes that carry relevance, sources included.
        gaps: nodes that ought to carry and cannot.
    """

    graph_module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    rules: dict[fx.Node, Assigned]
    carried: frozenset[fx.Node]
    gaps: tuple[Gap, ...]

    def demand_complete(self) -> Assignment:
        """Returns itself, or raises with every gap at once.

        Raises:
            UnsupportedOpError: if a node cannot carry relevance.
        """
        if self.gaps:
            raise UnsupportedOpError(self.gaps, len(self.rules) + len(self.gaps))
        return self


def operands_of(node: fx.Node) -> dict[Operand, fx.Node]:
    """Names every node argument of a call: by schema name, or name and position inside a list."""
    assert isinstance(node.target, OpOverload)
    found: dict[Operand, fx.Node] = {}
    for name, value in bind(node.target, node.args, node.kwargs).items():
        if isinstance(value, fx.Node):
            found[name] = value
        elif isinstance(value, list | tuple):
            found.update({(name, i): v for i, v in enumerate(value) if isinstance(v, fx.Node)})
    return found


def call_of(node: fx.Node, carried: frozenset[Operand], values: Any) -> Call:
    """Returns the call a rule is asked about.

    Args:
        node: a ``call_function`` node of an operator overload.
        carried: operands that carry.
        values: function from a node to its value.
    """
    assert isinstance(node.target, OpOverload)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values)
    return Call(node.target, bind(node.target, args, kwargs), values(node), carried)


def assign(graph_module: fx.GraphModule, rules: RuleSet, constant: Sequence[str], fixed_batch: int | None) -> Assignment:
    """Gives every node that carries relevance its rule.

    Args:
        graph_module: a canonical graph.
        rules: the rule set.
        constant: module path patterns whose nodes count as constants.
        fixed_batch: the batch size where it is fixed.
    """
    sources = tuple(n for n in graph_module.graph.find_nodes(op="placeholder") if n.meta["val"].is_floating_point())
    carried: set[fx.Node] = set(sources)
    found: dict[fx.Node, Assigned] = {}
    gaps: list[Gap] = []
    needed = _ancestors(graph_module)
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node not in needed or not _may_carry(node, carried, constant):
            continue
        carried.add(node)
        if node.target is operator.getitem:
            continue  # the first result of an operator with several: the operator's own rule speaks for it
        try:
            found[node] = _assign_one(node, carried, rules, fixed_batch)
        except RuleDeclinedError as reason:
            gaps.append(_gap(node, str(reason)))
    return Assignment(graph_module, sources, found, frozenset(carried), tuple(gaps))


def _ancestors(graph_module: fx.GraphModule) -> set[fx.Node]:
    """The nodes the output depends on."""
    needed: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if node.op == "output" or any(user in needed or user.op == "output" for user in node.users):
            needed.add(node)
    return needed


def _may_carry(node: fx.Node, carried: set[fx.Node], constant: Sequence[str]) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or node.target in _VALUE_FREE:
        return False
    modules = origin_of(node).modules or ("",)
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in constant for path in modules):
        return False
    if node.target is operator.getitem and node.args[1] != 0:
        return False
    return any(argument in carried for argument in node.all_input_nodes)


def _assign_one(node: fx.Node, carried: set[fx.Node], rules: RuleSet, fixed_batch: int | None) -> Assigned:
    if not isinstance(node.target, OpOverload):
        raise RuleDeclinedError("not an ATen operator")
    if node.target._schema.is_mutable:
        raise RuleDeclinedError("it writes into its operand")
    rule = rules.rule_for(node.target, origin_of(node).module)
    if rule is None:
        raise RuleDeclinedError("no rule")
    operands = {name: n for name, n in operands_of(node).items() if n in carried}
    for name in operands:
        argument = name if isinstance(name, str) else name[0]
        if argument not in rule.carries:
            raise RuleDeclinedError(f"carried value as {argument!r}: the rule takes it as a coefficient only")
    call = call_of(node, frozenset(operands), lambda n: n.meta["val"])
    batch = batch_of(call.value, fixed_batch)
    if batch is None:
        raise RuleDeclinedError("its result has no batch dimension: it mixes samples")
    with call.value.fake_mode, enable_python_dispatcher():  # type: ignore[attr-defined]
        example = rule(call)
    missing = set(operands) - set(example.terms)
    terms: dict[Operand, LinearMap] = dict(example.terms)
    return Assigned(node, rule, {k: n for k, n in operands.items() if k not in missing}, batch, Affine(terms, example.constant))


def _gap(node: fx.Node, reason: str) -> Gap:
    origin = origin_of(node)
    return Gap(node.name, str(node.target), reason, origin.module, origin.where, origin.source, describe(node.meta["val"]))
