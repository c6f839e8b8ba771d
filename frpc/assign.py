"""Assignment: which nodes carry relevance, and by which rule. All gaps are collected before anything is said."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload

from frpc.affine import Affine, Call, Operand, Rule, bind
from frpc.carriers import carrying_operands, find_sources, is_first_result, may_carry
from frpc.errors import Gap, RuleDeclinedError, UnsupportedOpError
from frpc.graph import Batch, batches_of, describe, origin_of
from frpc.maps import LinearMap
from frpc.rules.ruleset import RuleSet

__all__ = ["Assigned", "Assignment", "assign", "call_of"]


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


def assign(
    graph_module: fx.GraphModule,
    rules: RuleSet,
    constant: Sequence[str],
    fixed_batch: int | None,
    source: Sequence[str] | None = None,
    of: str = "",
) -> Assignment:
    """Gives every node that carries relevance its rule.

    Args:
        graph_module: a canonical graph.
        rules: the rule set.
        constant: module path patterns whose nodes count as constants.
        fixed_batch: the batch size where it is fixed.
        source: see :func:`frpc.carriers.find_sources`.
        of: module path of the layer whose neurons are explained; empty for the model's output.
    """
    sources = find_sources(graph_module.graph, source)
    live = _live(graph_module, rules, constant, sources, of)
    batches = batches_of(graph_module.graph, fixed_batch)
    found: dict[fx.Node, Assigned] = {}
    gaps: list[Gap] = []
    fixed: set[fx.Node] = set()  # calls that turn out to pass on nothing: constants for those after them
    for node, every in live.items():
        operands = {name: n for name, n in every.items() if n not in fixed}
        if not operands:
            fixed.add(node)
            continue
        if node.target is operator.getitem:  # the first result of an operator with several: that one's rule speaks for it
            if not is_first_result(node):
                gaps.append(_gap(node, f"result {node.args[1]} of {node.args[0].target}: rules speak for the first"))  # type: ignore[union-attr]
            continue
        try:
            assigned = _assign_one(node, operands, rules, batches.get(node))
            if assigned.operands:
                found[node] = assigned
            else:
                fixed.add(node)
        except RuleDeclinedError as reason:
            gaps.append(_gap(node, str(reason)))
    return Assignment(graph_module, sources, found, frozenset((*sources, *live)) - fixed, tuple(gaps))


def _live(
    graph_module: fx.GraphModule, rules: RuleSet, constant: Sequence[str], sources: Sequence[fx.Node], of: str
) -> dict[fx.Node, dict[Operand, fx.Node]]:
    """Returns the calls that relevance passes on its way from the output to a source, with the operands it goes to."""
    carried: set[fx.Node] = set(sources)
    operands: dict[fx.Node, dict[Operand, fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node not in carried and may_carry(node, carried, constant):
            carried.add(node)
            if isinstance(node.target, OpOverload):
                operands[node] = carrying_operands(node, carried, rules.product_for(origin_of(node).module))
            else:
                operands[node] = {("", i): n for i, n in enumerate(node.all_input_nodes) if n in carried}
    explained = [n for n in graph_module.graph.nodes if of and of in n.meta.get("layers", ())]
    wanted: set[Any] = {*explained, graph_module.graph.output_node().args[0]}
    for node in reversed(graph_module.graph.nodes):
        if node in wanted and node in operands:
            wanted.update(operands[node].values())
    return {node: found for node, found in operands.items() if node in wanted}


def _assign_one(node: fx.Node, operands: dict[Operand, fx.Node], rules: RuleSet, batch: Batch | None) -> Assigned:
    if not isinstance(node.target, OpOverload):
        raise RuleDeclinedError("not an ATen operator")
    if node.target._schema.is_mutable:
        raise RuleDeclinedError("it writes into its operand")
    rule = rules.rule_for(node.target, origin_of(node).module)
    if rule is None:
        raise RuleDeclinedError("no rule")
    for name in operands:
        argument = name if isinstance(name, str) else name[0]
        if argument not in rule.carries:
            raise RuleDeclinedError(f"carried value as {argument!r}: the rule takes it as a coefficient only")
    call = call_of(node, frozenset(operands), lambda n: n.meta["val"])
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
