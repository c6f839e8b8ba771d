"""Planning: what to compute, and by which strategy for each part of the graph.

This file knows costs, not rules: it reads FLOPs and bytes off the maps that assignment chose.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from frpc.assign.assignment import Assignment
from frpc.assign.reach import feeding
from frpc.core.graph import first_result
from frpc.core.sizes import Footprint, size_hint
from frpc.emit.bias import BiasPolicy
from frpc.emit.propagate import reached_from
from frpc.errors import OptionError
from frpc.maps import Cost
from frpc.rules.top import Logit, Top

__all__ = [
    "STRATEGIES",
    "Plan",
    "Query",
    "Segment",
    "Strategy",
    "check_strategy",
    "make_plan",
    "total_cost",
]

Strategy = Literal["auto", "windows", "forward", "transposed"]
STRATEGIES: tuple[Strategy, ...] = ("auto", "windows", "forward", "transposed")


@dataclass(frozen=True)
class Query:
    """What a program computes.

    Attributes:
        columns: several linear functionals of the output at once (``[K, B, ...]`` seeds) instead of one.
        layers: module paths whose relevance is computed; empty means the inputs.
        of: module path of the layer whose neurons are explained; empty means the model's output.
        bias: where constants go.
        top: where relevance starts at the output.
    """

    columns: bool = False
    layers: tuple[str, ...] = ()
    of: str = ""
    bias: BiasPolicy = "uniform"
    top: Top = field(default_factory=Logit)

    def __str__(self) -> str:
        what = f"relevance of {', '.join(self.layers)}" if self.layers else "relevance of the input"
        number = f"neurons of {self.of}" if self.of else "targets"
        return f"{what} for {'K ' + number if self.columns else 'one of the ' + number} a sample, bias {self.bias}"


@dataclass(frozen=True)
class Segment:
    """A run of nodes with one strategy.

    Units: per sample and column; FLOPs count multiply and add separately, bytes are read and written.
    """

    name: str
    strategy: str
    why: str
    nodes: int
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """How a query is answered; prints as a table.

    Attributes:
        query: what to compute.
        segments: in the order they run.
        result: the node whose neurons are explained.
        wanted: nodes whose pulled relevance the program returns.
        pulled: nodes relevance is pulled through.
        footprint: the memory a run takes, known known only after lowering; not with Inductor.
    """

    query: Query
    segments: tuple[Segment, ...]
    result: fx.Node
    wanted: tuple[fx.Node, ...]
    pulled: tuple[fx.Node, ...]
    footprint: Footprint | None = None

    @property
    def flops(self) -> float:
        return sum(s.cost.flops for s in self.segments)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of one sample and one column; see :meth:`peak_bytes_for`."""
        return self.peak_bytes_for()

    def peak_bytes_for(self, batch: int = 1, columns: int = 1) -> int:
        """Predicts the peak memory of a call in bytes, besides the parameters and its inputs.

        Args:
            batch: samples a call.
            columns: targets a sample.

        Raises:
            OptionError: on a plan whose program was not lowered, as it stands among the stages, or that Inductor runs.
        """
        if self.footprint is None:
            raise OptionError("Memory is known only after lowering: use explainer.plan. With inductor it is not known.")
        return self.footprint.bytes(batch, columns)

    def __str__(self) -> str:
        lines = [f"{self.query}", f"{'segment':<20} {'strategy':<12} {'nodes':>6} {'GFLOP':>9} {'MB':>9}  why"]
        for s in self.segments:
            lines.append(
                f"{s.name:<20} {s.strategy:<12} {s.nodes:>6} {s.cost.flops / 1e9:>9.3f} {s.cost.bytes / 1e6:>9.1f}  {s.why}"
            )
        if self.footprint is not None:
            one, two = self.peak_bytes_for(1), self.peak_bytes_for(2)
            lines.append(
                f"memory besides parameters and inputs: {one / 1e6:.1f} MB per call, {(two - one) / 1e6:.1f} MB per further "
                "sample"
            )
        return "\n".join(lines)


def check_strategy(name: str) -> Strategy:
    """Returns the strategy of that name.

    Raises:
        OptionError: for any other name.
    """
    for strategy in STRATEGIES:
        if strategy == name:
            return strategy
    raise OptionError(f"strategy={name!r} is unknown; choose one of {', '.join(STRATEGIES)}.")


def make_plan(assignment: Assignment, query: Query) -> Plan:
    """Chooses a strategy for the query.

    One linear functional of the output, or a few, is answered by one transposed pass: its cost is that of one forward pass
    for each, whatever the number of cells.
    """
    result = _demanded(assignment, query.of) if query.of else assignment.graph_module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    upstream = feeding(assignment, result)
    wanted = assignment.sources if not query.layers else tuple(_demanded(assignment, name) for name in query.layers)
    reached = reached_from(assignment, wanted)
    # The wanted nodes themselves are not pulled through, unless another wanted node lies below them.
    below = {n for w in wanted for n in _through(assignment, w, reached)} & upstream
    pulled = tuple(n for n in assignment.rules if n in below)
    computed = tuple(n for n in assignment.rules if n in upstream)
    values = total_cost(assignment, computed)
    why = "a few functionals of the output: one transposed pass each" if query.columns else "one functional of the output"
    segments = (
        Segment("values", "forward", "the model's own forward pass", len(computed), values),
        Segment("relevance", "transposed", why, len(pulled), total_cost(assignment, pulled)),
    )
    return Plan(query, segments, result, wanted, pulled)


def _demanded(assignment: Assignment, layer: str) -> fx.Node:
    node = assignment.layer_node(layer)
    assert node is not None, f"layer {layer} was checked when the query was made"
    if node in assignment.rules and assignment.rules[node].example.joined:
        raise OptionError(
            f"{layer}: the rule {assignment.rules[node].rule.name} treats this layer and the activation after it as one, so its "
            "neurons have no separate relevance; use the activation's layer name instead."
        )
    return node


def _through(assignment: Assignment, source: fx.Node, reached: set[fx.Node]) -> set[fx.Node]:
    """The carrying nodes computed from ``source``, itself left out."""
    found = {source}
    for node in assignment.graph_module.graph.nodes:
        feeds = assignment.rules[node].operands.values() if node in assignment.rules else node.all_input_nodes
        if node in reached and (node in assignment.rules or node.target is operator.getitem) and any(f in found for f in feeds):
            found.add(node)
    return found - {source}


def total_cost(assignment: Assignment, nodes: tuple[fx.Node, ...]) -> Cost:
    """Returns the cost of one column through these nodes, for one sample."""
    cost = Cost(0.0, 0.0)
    for node in nodes:
        assigned = assignment.rules[node]
        value = first_result(node.meta["val"])
        batch = size_hint(value.shape[assigned.batch.axis]) / assigned.batch.factor if value.dim() else 1.0
        for linear_map in assigned.example.terms.values():
            one = linear_map.cost(value.element_size())
            cost = cost + Cost(one.flops / batch, one.bytes / batch)
    return cost
