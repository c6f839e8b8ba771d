"""Propagation: the values of a graph, the affine map of every operator at those values, and relevance pulled back through them.

This is frpc's semantics in one page. It is plain tensor code over the canonical graph: run eagerly it is the reference that
:mod:`frpc.check` reports from; traced by :mod:`frpc.emit.program` it becomes the compiled program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assigned, Assignment, call_of
from frpc.capture.batch import Batch, one_per_sample
from frpc.core.graph import first_result
from frpc.rules.table import Affine, Operand

__all__ = [
    "AffineMaps",
    "Observer",
    "Pulled",
    "Record",
    "Spread",
    "affine_maps",
    "evaluate",
    "inner",
    "pull",
    "push",
    "reached_from",
]

AffineMaps = Mapping[fx.Node, Affine]
"""The affine form of every node that carries relevance, at one input."""

Observer = Callable[[fx.Node, str], AbstractContextManager[Any]]
"""Called around the work for each node with ``"value"``, ``"rule"`` or ``"pull"``; lets a tracer note whose work it sees."""

Spread = Callable[[Assigned, Tensor, Tensor | float], None]
"""Called with a node, the relevance pulled to its result ``v`` and its constant ``c``: what to do with ``<c, v>``."""

Record = Callable[[Assigned, Tensor, Mapping[Operand, Tensor]], None]
"""Called with a node, the relevance pulled to its result and the relevance it passed to each operand."""


class Pulled(NamedTuple):
    """The result of a transposed pass at the requested nodes.

    Attributes:
        multiplier: ``G`` of a node.
        direct: relevance that first layers gave to a node without a multiplier.
    """

    multiplier: dict[fx.Node, Tensor]
    direct: dict[fx.Node, Tensor]


def _unobserved(node: fx.Node, phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


def evaluate(
    graph: fx.Graph,
    constants: Mapping[str, Any],
    inputs: Sequence[Tensor],
    observe: Observer = _unobserved,
    until: fx.Node | None = None,
    given: Mapping[fx.Node, Any] | None = None,
) -> dict[fx.Node, Any]:
    """Runs the graph and returns the value of every node.

    Args:
        graph: a canonical graph.
        constants: value of each ``get_attr`` target.
        inputs: in placeholder order.
        observe: see :data:`Observer`.
        until: the last node wanted; all by default.
        given: values that take the place of what these nodes compute.
    """
    given = given or {}
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in graph.nodes:
        here = next(feed) if node.op == "placeholder" else None
        if node in given:
            values[node] = given[node]
        elif node.op == "placeholder":
            values[node] = here
        elif node.op == "get_attr":
            values[node] = constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with observe(node, "value"):
                values[node] = node.target(*args, **kwargs)
        else:
            values[node] = values[node.args[0]]
        if node is until:
            break
    return values


def affine_maps(
    assignment: Assignment,
    values: Mapping[fx.Node, Any],
    nodes: Iterable[fx.Node],
    observe: Observer = _unobserved,
    references: Mapping[fx.Node, Any] | None = None,
) -> dict[fx.Node, Affine]:
    """Returns ``z = sum_k M_k a_k + c`` for each of ``nodes`` at the given values.

    Args:
        assignment: rules of the graph.
        values: value of every node.
        nodes: which maps are wanted.
        observe: see :data:`Observer`.
        references: value of every node at the reference input, for rules that look at it.
    """
    there = references.__getitem__ if references is not None and assignment.account.from_reference else None
    maps: dict[fx.Node, Affine] = {}
    for node in nodes:
        assigned = assignment.rules[node]
        with observe(node, "rule"):
            maps[node] = assigned.rule(call_of(node, frozenset(assigned.operands), values.__getitem__, there, assigned.hints))
    return maps


def reached_from(assignment: Assignment, wanted: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns ``wanted`` and all carrying nodes computed from them: relevance need be pulled through no others."""
    reached = set(wanted)
    for node in assignment.graph_module.graph.nodes:
        feeds = assignment.rules[node].operands.values() if node in assignment.rules else node.all_input_nodes
        if node in assignment.carried and any(n in reached for n in feeds):
            reached.add(node)
    return reached


def pull(
    assignment: Assignment,
    maps: AffineMaps,
    seeds: Mapping[fx.Node, Tensor],
    wanted: Iterable[fx.Node],
    spread: Spread | None = None,
    observe: Observer = _unobserved,
    record: Record | None = None,
) -> Pulled:
    """Pulls relevance back: ``G_a = sum over the uses of a of M^T G_z``, from ``seeds`` to the ``wanted`` nodes.

    Args:
        assignment: rules of the graph.
        maps: affine form of every node between ``wanted`` and the seeds.
        seeds: ``G`` at the nodes to start from, ``[*L, *shape]``.
        wanted: the nodes whose pulled relevance is returned.
        spread: called with every constant on the path.
        observe: see :data:`Observer`.
        record: told what every node passed on.

    Returns:
        ``G`` of each wanted node that the seeds depend on, and the relevance that first layers gave to it directly.
    """
    wanted = set(wanted)
    reached = reached_from(assignment, wanted)
    pulled: dict[fx.Node, Tensor] = dict(seeds)
    found = Pulled({}, {})
    landed: dict[fx.Node, Tensor] = {}  # relevance that no longer needs the values: it only moves with its elements
    for node in reversed(assignment.graph_module.graph.nodes):
        if node in landed:
            share = landed.pop(node)
            if node in wanted:
                found.direct[node] = share
            elif node in maps and node not in wanted:
                for name, operand in assignment.rules[node].operands.items():
                    with observe(node, "pull"):
                        _accumulate(landed, operand, maps[node].terms[name].pull(share))
        v = pulled.pop(node, None)
        if v is None:
            continue
        if node in wanted:
            found.multiplier[node] = v
        if node.target is operator.getitem:
            _accumulate(pulled, node.args[0], v)
        elif node in maps:
            assigned, affine = assignment.rules[node], maps[node]
            with observe(node, "pull"):
                if spread is not None and affine.constant is not None:
                    spread(assigned, v, affine.constant)
                passed = {k: affine.terms[k].pull(v) for k, operand in assigned.operands.items() if operand in reached}
            for name, share in passed.items():
                with observe(node, "pull"):
                    _accumulate(landed if affine.direct else pulled, assigned.operands[name], share)
            if record is not None:
                record(assigned, v, passed)
    return found


def push(
    assignment: Assignment,
    maps: AffineMaps,
    columns: Mapping[fx.Node, Tensor],
    layer: fx.Node,
    values: Mapping[fx.Node, Any] | None = None,
) -> Tensor | None:
    """Carries columns forward: ``V_z = sum_k M_k V_k`` (thesis eqs. 3.5, 3.8, algorithm 1).

    Args:
        assignment: rules of the graph.
        maps: affine form of every node up to the layer.
        columns: what the sources start with, ``[*L, *shape]``; empty for the bias field, which starts with nothing.
        layer: where to stop.
        values: given for the bias field, ``beta_z = sum_k M_k beta_k + c``: the value of every node.

    Returns:
        the layer's columns ``[*L, *shape]``, or None where nothing reaches it.
    """
    carried: dict[fx.Node, Tensor] = dict(columns)
    for node in assignment.graph_module.graph.nodes:
        if node.target is operator.getitem and node in assignment.carried and node.args[0] in carried:
            carried[node] = carried[node.args[0]]
        elif node in maps:
            assigned, affine = assignment.rules[node], maps[node]
            parts = [affine.terms[k].push(carried[n]) for k, n in assigned.operands.items() if n in carried]
            if values is not None and affine.constant is not None:
                parts.append(torch.zeros_like(first_result(values[node])) + affine.constant)
            if parts:
                carried[node] = sum(parts[1:], parts[0])
        if node is layer:
            break
    return carried.get(layer)


def _accumulate(pulled: dict[fx.Node, Tensor], node: fx.Node, v: Tensor) -> None:
    pulled[node] = pulled[node] + v if node in pulled else v


def inner(v: Tensor, c: Tensor | float, shape: Sequence[Any], batch: Batch) -> Tensor:
    """Returns ``<c, v>`` for each sample and column; complex numbers count as pairs, ``Re(conj(c) v)``.

    Shapes: v ``[*L, *shape]``, c broadcastable to ``shape``; returns ``[*L, B]``.
    """
    rank = len(shape)
    sizes = [1] * rank if not isinstance(c, Tensor) else [1] * (rank - c.dim()) + list(c.shape)
    repeated = [d - rank for d in range(rank) if d != batch.axis and isinstance(sizes[d], int) and sizes[d] == 1]
    if repeated:  # sum first over what c repeats: one pass over v, and the product is small
        v = v.sum(repeated, keepdim=True)
    pairs = v.is_complex()
    product = (torch.view_as_real(v) * torch.view_as_real(c + torch.zeros_like(v))).sum(-1) if pairs else v * c
    return one_per_sample(product, rank, batch)
