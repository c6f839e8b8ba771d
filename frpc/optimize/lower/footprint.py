"""What a run of a program holds in memory, read off its graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.sizes import Footprint
from frpc.core.torch_compat import expression_of
from frpc.optimize.lower.memory import Memory
from frpc.rules.effects import is_number

__all__ = ["footprint"]

Step = tuple[int, int, int, int]  # bytes: fixed, for each sample, for each column, for each column of each sample
aten = torch.ops.aten
_NOTHING: Step = (0, 0, 0, 0)


def footprint(graph_module: fx.GraphModule, columns: bool) -> Footprint:
    """Follows what is alive: memory is taken where a value is made, and given back when nobody reads it or a view of it again.

    Scratch memory inside operators does not count, but for operands that elementwise ones convert; nor do parameters and what
    the caller gives.

    Args:
        graph_module: ``(*inputs, seed, *references) -> results``, in the order in which it runs.
        columns: whether K leads in the seed.
    """
    nodes = list(graph_module.graph.nodes)
    memory = Memory(graph_module.graph, apart={n for n in nodes if _spreads(n) or n.target is operator.getitem})
    read = {used: at for at, node in enumerate(nodes) for used in [node, *node.all_input_nodes]}
    ends: dict[fx.Node, int] = {node: read[node] for node in nodes}
    for node in nodes:
        for owner in memory.owners(node):
            ends[owner] = max(ends[owner], read[node])
    sizes, given = _Sizes(graph_module, columns), {"placeholder", "get_attr", "output"}
    alive, steps, ending = _NOTHING, set[Step](), dict[int, list[Step]]()
    for at, node in enumerate(nodes):
        if node.op not in given and memory.owners(node) == frozenset([node]):
            size = sizes.of(node)
            alive = _plus(alive, size, 1)
            ending.setdefault(ends[node], []).append(size)
        steps.add(_plus(alive, _converted(node, sizes), 1))
        for size in ending.pop(at, ()):
            alive = _plus(alive, size, -1)
    return Footprint(_largest(steps))


def _converted(node: fx.Node, sizes: _Sizes) -> Step:
    """Bytes of operands that an operator first converts to its result's type, e.g. masks in a product."""
    found = _NOTHING
    if node.target in (aten.mul.Tensor, aten.mul_.Tensor) and node.meta["val"].device.type == "cpu":
        kind = node.meta["val"].dtype
        for operand in node.all_input_nodes:
            if operand.meta["val"].dtype != kind:
                found = _plus(found, sizes.of(operand, kind.itemsize), 1)
    return found


def _spreads(node: fx.Node) -> bool:
    """Says whether a call copies elements that are repeated in memory to separate places."""
    source: Any = node.args[0] if node.target is aten.reshape.default else None
    while isinstance(source, fx.Node) and source.target is aten.permute.default:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.target is aten.expand.default


def _plus(a: Step, b: Step, sign: int) -> Step:
    return (a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2], a[3] + sign * b[3])


def _largest(steps: set[Step]) -> tuple[Step, ...]:
    """Leaves out steps that another is never smaller than."""
    ordered = sorted(steps, reverse=True)
    return tuple(s for s in ordered if not any(o != s and all(a >= b for a, b in zip(o, s, strict=True)) for o in ordered))


class _Sizes:
    """Bytes of values as they grow with samples and columns."""

    def __init__(self, graph_module: fx.GraphModule, columns: bool) -> None:
        inputs = [n.meta["val"] for n in graph_module.graph.find_nodes(op="placeholder")]
        first = inputs[0].shape[0]
        self._batch = _symbols([first])
        self._columns = _symbols([s for x in inputs for s in x.shape]) - self._batch if columns else set()

    def of(self, node: fx.Node, itemsize: int | None = None) -> Step:
        """A number of bytes that is linear in samples and in columns, by its values at four places.

        Args:
            node: the value.
            itemsize: bytes of an element, if not the value's own.
        """
        value = None if is_number(node) else node.meta["val"]
        if not isinstance(value, Tensor):  # of several results, each lives as long as it is read by itself
            return _NOTHING
        one, more, wider, both = (self._at(value, itemsize, b, k) for b, k in ((1, 1), (2, 1), (1, 2), (2, 2)))
        mixed = both - more - wider + one
        sample, column = more - one - mixed, wider - one - mixed
        return one - sample - column - mixed, sample, column, mixed

    def _at(self, value: Tensor, itemsize: int | None, batch: int, columns: int) -> int:
        known = dict.fromkeys(self._batch, batch) | dict.fromkeys(self._columns, columns)
        count = 1
        sizes: Sequence[Any] = value.shape
        for size in sizes:
            count *= int(expression_of(size).subs(known)) if isinstance(size, torch.SymInt) else size
        return count * (itemsize or value.element_size())


def _symbols(sizes: Sequence[Any]) -> set[Any]:
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in expression_of(size).free_symbols}
