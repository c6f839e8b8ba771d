"""Assignment: which nodes carry relevance, and by which rule. All gaps are collected and reported in one error."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from frpc.assign.coded import refuse_codes
from frpc.assign.constants import cure
from frpc.assign.signs import never_negative
from frpc.capture.batch import Batch, batches_of
from frpc.core.graph import bind, describe, first_result, is_complex, origin_of
from frpc.core.stopped import stopped_by
from frpc.core.torch_compat import OpOverload, enable_python_dispatcher, fake_mode_of, schema_of
from frpc.errors import Gap, OptionError, RuleDeclinedError, SamplesUnknownError, UnsupportedOpError
from frpc.rules.carriers import carrying_operands, find_sources, is_first_result, may_carry, operands_of
from frpc.rules.lrp.lrp import factor_beside
from frpc.rules.sets.ruleset import Account, RuleSet, Site
from frpc.rules.table import TABLE, Affine, Call, Operand, Rule, traits_of

__all__ = ["Assigned", "Assignment", "assign", "call_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Hints:
    """What is known about a call before it runs, so that a rule can leave out terms that are always 0.

    Attributes:
        positive: the operands that are nonnegative everywhere.
        behind: the activation that alone reads the result, where the result is not itself explained.
    """

    positive: frozenset[Operand] = frozenset()
    behind: fx.Node | None = None

    @property
    def rectified(self) -> bool:
        """Says whether only ReLUs read the result."""
        return self.behind is not None and self.behind.target is aten.relu.default


NO_HINTS = Hints()


@dataclass(frozen=True)
class Assigned:
    """The rule of one node.

    Attributes:
        node: the graph node.
        rule: its rule.
        operands: which arguments carry, and the nodes that feed them.
        batch: where the samples are in its result.
        hints: what is known about the call before it runs.
        example: its affine form at the example values.
        maps: class names of the maps the rule chose, for tables.
    """

    node: fx.Node
    rule: Rule
    operands: dict[Operand, fx.Node]
    batch: Batch
    hints: Hints
    example: Affine

    @property
    def maps(self) -> str:
        return " + ".join(type(m).__name__ for m in self.example.terms.values()) or "constant"


@dataclass(frozen=True)
class Assignment:
    """Rules for every node of a graph that carries relevance.

    Attributes:
        graph_module: the canonical graph.
        sources: the nodes that get relevance, in input order.
        rules: node -> its rule, in graph order.
        carried: all nodes that carry relevance, sources included.
        gaps: nodes that ought to carry and cannot.
        account: what the multipliers of its rules mean.
        batches: where the samples are in every value.
        cure: how the gaps may count as constants, for the error about them.
        notes: where a rule set had to take another rule than its own, with the reason.
    """

    graph_module: fx.GraphModule
    sources: tuple[fx.Node, ...]
    rules: dict[fx.Node, Assigned]
    carried: frozenset[fx.Node]
    gaps: tuple[Gap, ...]
    account: Account = field(default_factory=Account)
    batches: Mapping[fx.Node, Batch] = field(default_factory=dict)
    cure: str = ""
    notes: tuple[tuple[fx.Node, str], ...] = ()

    def layer_node(self, layer: str) -> fx.Node | None:
        """Returns the node that is the output of a module, or None where no node is."""
        return next((node for node in self.graph_module.graph.nodes if layer in node.meta.get("layers", ())), None)

    def demand_complete(self) -> Assignment:
        """Returns itself, or raises with every gap at once.

        Raises:
            UnsupportedOpError: if a node cannot carry relevance.
        """
        if self.gaps:
            raise UnsupportedOpError(self.gaps, len(self.rules) + len(self.gaps), self.cure)
        return self


def call_of(node: fx.Node, carried: frozenset[Operand], values: Any, references: Any = None, hints: Hints = NO_HINTS) -> Call:
    """Returns the call for a rule.

    Args:
        node: a ``call_function`` node of an operator overload.
        carried: operands that carry.
        values: function from a node to its value.
        references: function from a node to its value at the reference input; None where rules do not look at one.
        hints: what is known about the call before it runs.
    """
    assert isinstance(node.target, OpOverload)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values)
    there = None if references is None else call_of(node, carried, references)
    behind = None if hints.behind is None else _function(hints.behind, values)
    return Call(
        node.target, bind(node.target, args, kwargs), values(node), carried, there, hints.positive, hints.rectified, behind
    )


def _function(node: fx.Node, values: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function of one number as a graph calls it: with its parameters, of the values in its first argument."""
    assert isinstance(node.target, OpOverload)
    rest, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), values)
    op = node.target

    def function(u: torch.Tensor) -> torch.Tensor:
        result: Any = op(u, *rest, **kwargs)
        first: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
        return first

    return function


def assign(
    graph_module: fx.GraphModule,
    rules: RuleSet,
    constant: Sequence[str],
    fixed_batch: int | None,
    source: Sequence[str] | None = None,
    of: str = "",
    layers: Sequence[str] = (),
) -> Assignment:
    """Gives every node that carries relevance its rule.

    Args:
        graph_module: a canonical graph.
        rules: the rule set.
        constant: module path patterns whose nodes count as constants.
        fixed_batch: the batch size, if it is fixed.
        source: see :func:`frpc.rules.carriers.find_sources`.
        of: module path of the layer whose neurons are explained; empty for the model's output.
        layers: module paths of inner layers whose relevance is computed.

    Raises:
        SourceError: if elements of an input are codes and no source was chosen; see :mod:`frpc.assign.coded`.
    """
    sources = find_sources(graph_module.graph, source)
    explained = _explained(graph_module.graph, of)
    starts = [*sources, *(n for n in graph_module.graph.nodes if layers and stopped_by(n) == "")]
    live = _live(graph_module, rules, constant, starts, of)
    if source is None and not rules.account.gradients and not layers:  # a gradient by a code is 0, as autograd's
        refuse_codes(graph_module.graph, sources, live)
    batches = batches_of(graph_module.graph, fixed_batch)
    positive, reading = never_negative(graph_module.graph), _reading(graph_module.graph, sources)
    computed = _computed(graph_module.graph)
    multiplying: set[fx.Node] = set()  # layers with weights
    first_layers: list[bool] = []
    found: dict[fx.Node, Assigned] = {}
    gaps: list[Gap] = []
    notes: list[tuple[fx.Node, str]] = []
    fixed: set[fx.Node] = set()  # calls that turn out to pass on nothing: constants for those after them

    def asked(node: fx.Node, operands: dict[Operand, fx.Node]) -> tuple[Site, Hints]:
        signs = frozenset(name for name, n in operands.items() if n in positive)
        behind = _behind(node, of, computed)
        (feed, *others) = operands.values()
        before = not others and feed in multiplying and found[feed].hints.behind is node
        by, first = factor_beside(node.target, operands), any(n in reading for n in operands.values())
        by_value = by is not None and operands_of(node).get(by) in computed
        op: Any = None if behind is None else behind.target
        origin = origin_of(node)
        site = Site(node.target, origin.module, first, by is not None, by_value, op, before, origin.op)
        return site, Hints(signs, behind)

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
            site, hints = asked(node, operands)
            assigned = _assign_one(node, operands, rules, batches.get(node), site, hints)
            if site.weighted and not site.by_value:
                multiplying.add(node)
                first_layers.append(site.first)
            if (why := rules.note_for(site)) is not None:
                notes.append((node, why))
            if assigned.operands:
                found[node] = assigned
            else:
                fixed.add(node)
        except RuleDeclinedError as reason:
            gaps.append(_gap(node, str(reason), isinstance(reason, SamplesUnknownError)))
    carried = frozenset((*sources, *live)) - fixed
    remedy = cure(graph_module.graph, sources, constant, explained, gaps) if gaps else ""
    if rules.for_first_layer and first_layers and not gaps and not any(first_layers):
        raise OptionError(
            f"{rules.name} has a rule for the first layer, but no layer with weights reads the input. It is read by: "
            f"{_readers(sources)}. Use a rule set without such a rule, or pass the layer's operand as source=."
        )
    return Assignment(graph_module, sources, found, carried, tuple(gaps), rules.account, batches, remedy, tuple(notes))


def _explained(graph: fx.Graph, of: str) -> list[Any]:
    """Returns the layer whose neurons are explained, or the model's output."""
    return [n for n in graph.nodes if of and of in n.meta.get("layers", ())] or [graph.output_node().args[0]]


def _readers(sources: Sequence[fx.Node]) -> str:
    """Names what reads the sources, for a message."""
    return ", ".join(f"{user.target} ({origin_of(user).where})" for source in sources for user in source.users)


def _behind(node: fx.Node, of: str, computed: Collection[fx.Node]) -> fx.Node | None:
    """Returns the function of one number that is the only reader of a call which is not itself explained."""
    if len(node.users) != 1 or (of and of in node.meta.get("layers", ())):
        return None
    (reader,) = node.users
    alone = [n for n in reader.all_input_nodes if n in computed] == [node] and reader.args[:1] == (node,)
    return reader if alone and traits_of(reader.target).elementwise else None


def _reading(graph: fx.Graph, sources: Sequence[fx.Node]) -> set[fx.Node]:
    """Returns the sources and what only moves their elements about: a layer that reads one of them is a first layer."""
    found = set(sources)
    for node in graph.nodes:
        traits, tensors = traits_of(node.target), [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        moves = traits.rearranges or (traits.picks and traits.view) or node.target is aten.cat.default
        if moves and tensors and all(n in found for n in tensors):
            found.add(node)
    return found


def _live(
    graph_module: fx.GraphModule, rules: RuleSet, constant: Sequence[str], starts: Sequence[fx.Node], of: str
) -> dict[fx.Node, dict[Operand, fx.Node]]:
    """Returns the calls that relevance passes on its path from the output to a start, with the operands it goes to.

    It starts at the sources; an inner layer behind a ``detach`` has a gradient too, though none of it reaches the input.
    """
    carried: set[fx.Node] = set(starts)
    all_carry = rules.account.spelled_out
    operands: dict[fx.Node, dict[Operand, fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node not in carried and may_carry(node, carried, constant):
            carried.add(node)
            if isinstance(node.target, OpOverload):
                product = "all" if all_carry else rules.product_for(origin_of(node).module)
                operands[node] = carrying_operands(node, carried, product)
            else:
                operands[node] = {("", i): n for i, n in enumerate(node.all_input_nodes) if n in carried}
    wanted: set[Any] = {*_explained(graph_module.graph, of), graph_module.graph.output_node().args[0]}
    for node in reversed(graph_module.graph.nodes):
        if node in wanted and node in operands:
            wanted.update(operands[node].values())
    return {node: found for node, found in operands.items() if node in wanted}


def _computed(graph: fx.Graph) -> set[fx.Node]:
    """Returns the tensors that depend on the model's inputs; the others are parameters, or computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        tensor = isinstance(first_result(node.meta.get("val")), torch.Tensor)
        if tensor and (node.op == "placeholder" or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _assign_one(
    node: fx.Node, operands: dict[Operand, fx.Node], rules: RuleSet, batch: Batch | None, site: Site, hints: Hints
) -> Assigned:
    if not isinstance(node.target, OpOverload):
        raise RuleDeclinedError("not an ATen operator")
    if schema_of(node.target).is_mutable:
        raise RuleDeclinedError("it writes in place into its operand")
    if reason := stopped_by(node):
        raise RuleDeclinedError(reason)
    rule = rules.rule_for(site)
    if rule is None:
        known = TABLE.refused.get(node.target)
        raise RuleDeclinedError(known or ("no rule" if rules.account.constants else f"no rule in {rules.name}"))
    if not traits_of(node.target).complex and any(is_complex(n) for n in (node, *operands.values())):
        raise RuleDeclinedError("no rule for complex numbers")
    for name in operands:
        argument = name if isinstance(name, str) else name[0]
        if argument not in rule.carries:
            raise RuleDeclinedError(f"carried value as {argument!r}: the rule accepts it only as a coefficient")
    references = (lambda n: n.meta["val"]) if rules.account.from_reference else None
    call = call_of(node, frozenset(operands), lambda n: n.meta["val"], references, hints)
    if batch is None:
        raise SamplesUnknownError("its result has no batch dimension: it mixes samples")
    with fake_mode_of(call.value), enable_python_dispatcher():
        example = rule(call)
    if example.direct and not site.first:
        raise RuleDeclinedError(
            f"{rule.name} distributes relevance without using values, so it can only be used for a layer that reads the input"
        )
    if rules.account.constants and example.constant is not None and isinstance(node.meta.get("samples"), str):
        raise SamplesUnknownError(f"{node.meta['samples']}, so its constants cannot be divided among them")
    missing = set(operands) - set(example.terms)
    terms = dict(example.terms)
    carrying = {k: n for k, n in operands.items() if k not in missing}
    return Assigned(node, rule, carrying, batch, hints, Affine(terms, example.constant, example.direct, example.joined))


def _gap(node: fx.Node, reason: str, samples: bool = False) -> Gap:
    origin = origin_of(node)
    op, fix = (str(node.target), "") if not stopped_by(node) else ("autograd", _STOPPED)
    shape = describe(node.meta["val"])
    return Gap(node.name, op, reason, origin.module, origin.where, origin.source, shape, fix, samples)


_STOPPED = (
    "write it in plain operators, whose derivatives are known (detach() is followed);\n"
    "       or use a method that needs no backward: frpc.rules.FRP(), LID(), LRP()"
)
