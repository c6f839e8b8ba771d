"""Sources that can be explained: their samples can be told apart, and a carried path leads from them to what is explained."""

from __future__ import annotations

from torch import Tensor

from frpc.assign.assignment import Assignment
from frpc.assign.reach import feeding
from frpc.capture.batch import place_of
from frpc.core.graph import describe, first_result
from frpc.core.refusal import Refusal
from frpc.emit.plan import Plan
from frpc.errors import SourceError

__all__ = ["demand_path", "demand_samples", "unreached"]


def demand_samples(assignment: Assignment) -> None:
    """Refuses sources whose samples cannot be told apart.

    Raises:
        SourceError: names them.
    """
    for node in assignment.sources:
        if node not in assignment.batches or isinstance(node.meta.get("samples"), str):
            raise SourceError(
                f"The source {describe(first_result(node.meta['val']))} cannot be split by sample: frpc cannot tell "
                f"which of its elements belong to which sample.\n    {place_of(node)}\n"
                "  Choose another source with source=, or keep samples in its first dimension."
            )


def demand_path(assignment: Assignment, plan: Plan) -> None:
    """Refuses a question whose answer would owe everything to constants, because nothing carries.

    Gradients are no shares of anything: where nothing leads back they are 0, as autograd's are.

    Raises:
        SourceError: names the values at which the ways from the sources end.
    """
    if plan.result in assignment.carried or assignment.account.gradients:
        return
    graph = assignment.graph_module.graph
    behind, ends = set(assignment.sources), []
    for node in graph.nodes:
        fed = [n for n in node.all_input_nodes if n in behind]
        if fed and node.op == "call_function":
            value = first_result(node.meta.get("val"))
            if isinstance(value, Tensor) and value.is_floating_point() and node not in assignment.rules:
                ends.append(node)
            behind.add(node)
    what = f"the layer {plan.query.of}" if plan.query.of else "the output"
    places = "".join(f"\n    {place_of(node)}" for node in ends[:5]) or "\n    (it is computed from none of the sources)"
    raise SourceError(
        f"No path carries relevance from the sources ({', '.join(n.name for n in assignment.sources)}) to {what}: its map would "
        f"come only from constants. The paths end at{places}\n  Choose a source on the path with source=, or treat fewer parts "
        "as constants."
    )


def unreached(assignment: Assignment, plan: Plan) -> list[Refusal]:
    """The sources from which no carried path leads to what is explained: their maps hold constants alone, or gradients of 0."""
    if plan.query.layers:
        return []
    reaching = feeding(assignment, plan.result)
    holds = "gradient is 0" if assignment.account.gradients else "map contains only constants"
    return [
        Refusal("relevance", n.name, f"no path carries relevance to it from the explained output: its {holds}")
        for n in assignment.sources
        if n not in reaching
    ]
