"""Codes in floating-point inputs: numbers that a model turns into whole ones and looks up in a table.

``embedding(x[:, 0].long())`` has no derivative and no share by ``x``: what the category does is a matter of the table's rows.
Asked about the input alone, a map would give its column nothing but an even share of constants. Steps that choose between values
(``x > 0``, the places of the largest) are no such codes: what they choose carries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import first_result, origin_of
from frpc.errors import SourceError
from frpc.rules.carriers import read_by
from frpc.rules.table import traits_of

__all__ = ["refuse_codes"]

aten = torch.ops.aten
Live = Mapping[fx.Node, Mapping[Any, fx.Node]]


def refuse_codes(graph: fx.Graph, sources: Sequence[fx.Node], live: Live) -> None:
    """Raises an error for inputs whose elements partly reach the output only as codes.

    Args:
        graph: a canonical graph.
        sources: the nodes that get relevance.
        live: the calls that carry relevance from the output to a source, with the operands it goes to.

    Raises:
        SourceError: names the table that the code reads, and how to explain both.
    """
    for source in (s for s in sources if s.op == "placeholder"):
        behind = _computed_from(graph, [source])
        for code in [n for n in graph.nodes if n in behind and _is_code(n, behind)]:
            table = _table_read_by(graph, code, behind)
            if table is not None and _lost(graph, source, code, behind, live):
                raise SourceError(_message(source, code, table))


def _computed_from(graph: fx.Graph, starts: Sequence[fx.Node]) -> set[fx.Node]:
    """Returns some nodes and all whose values depend on theirs, also through integers."""
    found = set(starts)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in found for n in read_by(node)):
            found.add(node)
    return found


def _is_code(node: fx.Node, behind: Collection[fx.Node]) -> bool:
    """Says whether a call converts real numbers to integers (not to booleans)."""
    kinds = (_kind(node), *(_kind(n) for n in read_by(node) if n in behind)) if node.op == "call_function" else ()
    return bool(kinds) and kinds[0] == "whole" and "real" in kinds[1:]


def _kind(node: fx.Node) -> str:
    value = first_result(node.meta.get("val"))
    if not isinstance(value, Tensor) or value.dtype is torch.bool:
        return "truth or size"
    return "real" if value.is_floating_point() or value.is_complex() else "whole"


def _table_read_by(graph: fx.Graph, code: fx.Node, behind: Collection[fx.Node]) -> fx.Node | None:
    """Returns the call that makes real numbers of a code, and reads nothing else that comes from the input, on the way to the
    output."""
    codes, useful = {code}, _needed(graph)
    for node in graph.nodes:
        feeds = read_by(node) if node.op == "call_function" else []
        if not any(n in codes for n in feeds):
            continue
        if _kind(node) != "real":
            codes.add(node)
        elif node in useful and not any(_kind(n) == "real" and n in behind for n in feeds):
            return node
    return None


def _needed(graph: fx.Graph) -> set[fx.Node]:
    needed = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _lost(graph: fx.Graph, source: fx.Node, code: fx.Node, behind: Collection[fx.Node], live: Live) -> bool:
    """Says whether the input elements behind the code do not reach the output in any other way."""
    held = _moved(graph, source)
    carried: set[int] = set()
    for node, elements in held.items():
        if (
            any(node in live[user].values() for user in node.users if user in live and user not in held)
            or node is graph.output_node().args[0]
        ):
            carried.update(elements.flatten().tolist())
    feeds = [n for n in read_by(code) if n in behind and _kind(n) == "real"]
    made_of = {e for n in feeds if n in held for e in held[n].flatten().tolist()}
    computed = [n for n in feeds if n not in held]
    if computed:  # a code of computed values: it reads all that they are computed from
        before = {n for n in held if any(_reaches(graph, n, c) for c in computed)}
        made_of |= {e for n in before for e in held[n].flatten().tolist() if any(u not in held for u in n.users)}
    return bool(made_of - carried - {-1})


def _reaches(graph: fx.Graph, start: fx.Node, end: fx.Node) -> bool:
    return end in _computed_from(graph, [start])


def _moved(graph: fx.Graph, source: fx.Node) -> dict[fx.Node, Tensor]:
    """Returns which elements of a sample each node holds that only moves them, by number; -1 is something else."""
    shape = source.meta["val"].shape
    count = 1
    for size in shape[1:]:
        count *= int(size)
    values: dict[fx.Node, Any] = {source: torch.arange(count).reshape([1, *shape[1:]]).expand([2, *shape[1:]])}
    for node in graph.nodes:
        if node.op != "call_function" or not any(n in values for n in node.all_input_nodes):
            continue
        if node.target is aten.sym_size.int or traits_of(node.target).picks:
            try:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _numbered(n, values))
                values[node] = node.target(*args, **kwargs)
            except (RuntimeError, TypeError, IndexError, ValueError):
                continue
    return {node: value for node, value in values.items() if isinstance(value, Tensor)}


def _numbered(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The numbers of a node's elements; of one that has none, -1 in its shape, with two samples."""
    if node in values:
        return values[node]
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TypeError("no tensor")
    sizes: list[Any] = list(value.shape)
    return torch.full([2 if isinstance(n, torch.SymInt) else n for n in sizes], -1)


def _message(source: fx.Node, code: fx.Node, table: fx.Node) -> str:
    origin, named = origin_of(code), table.meta.get("layers", ())
    ask = f'source=["{named[0]}", "input"]' if named else 'source=["path.of.the.module.that.reads.it", "input"]'
    place = f"{origin.module or '(top level)'}   {origin.where}   {origin.source}"
    return (
        f"Some elements of input {source.name!r} are codes: {code.target} converts them to integers, {table.target} looks up "
        "the entries, and they do not reach the output in any other way. An integer cannot get relevance: the map "
        f"would give these elements only an even share of the constants.\n    {place}\n"
        f'  To explain the looked-up entries and the input, use {ask}; to keep it like this, use source="input".'
    )
