"""Which modules could be treated as constants if an operator has no rule, so that something is left to explain."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from frpc.errors import Gap
from frpc.rules.carriers import may_carry

__all__ = ["cure"]


def cure(
    graph: fx.Graph, sources: Sequence[fx.Node], constant: Sequence[str], explained: Collection[fx.Node], gaps: Sequence[Gap]
) -> str:
    """Returns a line for the error: how to treat the gaps as constants, or that this is not possible."""
    modules = sorted({gap.module for gap in gaps})
    if all(modules) and _reached(graph, sources, (*constant, *modules), explained):
        names = ", ".join(f'"{name}"' for name in modules)
        return f"or treat it as a constant: frpc.compile(..., constant=[{names}])"
    nodes = {gap.node for gap in gaps}
    if _reached(graph, sources, constant, explained, nodes):
        return 'or move that line into a separate module and treat it as a constant: constant=["path.of.module"]'
    return "it cannot be a constant: every path from the input to the output passes through it"


def _reached(
    graph: fx.Graph,
    sources: Sequence[fx.Node],
    constant: Sequence[str],
    explained: Collection[fx.Node],
    blocked: Collection[str] = (),
) -> bool:
    """Says whether anything that is explained still depends on a source by values."""
    carried = set(sources)
    for node in graph.nodes:
        if node.op == "call_function" and node.name not in blocked and may_carry(node, carried, constant):
            carried.add(node)
    return any(node in carried for node in explained)
