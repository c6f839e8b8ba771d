"""One layer at one input: its values, their bias field, the affine forms before it, and its windows, if there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment
from frpc.assign.reach import feeding
from frpc.core.graph import fetch, first_result, origin_of
from frpc.emit.program import at_reference, reference_constants
from frpc.emit.propagate import AffineMaps, affine_maps, evaluate, push
from frpc.errors import InputError, OptionError
from frpc.windows import LocalityEndsError, Rows, build_rows

__all__ = ["LayerContext", "layer_context"]


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What every strategy for a layer starts from.

    Attributes:
        assignment: rules of the graph.
        maps: affine form, at this input, of every node up to the layer.
        layer: the layer's node.
        x: the input's value, ``[B, C, *spatial]``; in rule sets of increments, its difference to the reference.
        values: the layer's values, or their increments.
        bias: the constants' share of each, like values; 0 in rule sets that follow no constants.
        nodes: the nodes with rules, up to the layer.
        rows: producer of the layer's windows, or None.
        ended: where windows end and why, or None.
    """

    assignment: Assignment
    maps: AffineMaps
    layer: fx.Node
    x: Tensor
    values: Tensor
    bias: Tensor
    nodes: tuple[fx.Node, ...]
    rows: Rows | None
    ended: str | None

    @property
    def one_way(self) -> str | None:
        """Returns the name and place of a rule without a forward direction, if there is one."""
        for node in self.nodes:
            assigned = self.assignment.rules[node]
            if assigned.example.direct or not all(m.pushes for m in assigned.example.terms.values()):
                return f"the rule {assigned.rule.name} at {origin_of(node).module or node.name}"
        return None

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of input cells; inputs with fewer axes count as one row."""
        sizes = [int(n) for n in self.x.shape[2:]] if self.x.dim() > 2 else [int(self.x.shape[1])]
        return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def layer_context(assignment: Assignment, layer: fx.Node, inputs: Sequence[Tensor]) -> LayerContext:
    """Evaluates a graph up to a layer.

    Raises:
        InputError: for models with several inputs, or an input with more than two spatial axes.
        OptionError: for rule sets that give plain gradients, or average over several references.
    """
    account = assignment.account
    if account.gives == "multiplier":
        raise OptionError(
            "Plain gradients do not add up, so there are no maps of layers; compile with frpc.rules.Gradient(), which "
            "multiplies by the input."
        )
    if account.reference is not None and account.reference.count > 1:
        raise OptionError("Maps of layers need a single reference; compile with one of them.")
    if len(assignment.sources) != 1:
        raise InputError("Maps of layers need a model with one input; this model has several. Use explainer.neurons().")
    source = assignment.sources[0]
    if source.op != "placeholder":
        raise InputError("Maps of layers need an input as source; this source is a layer. Use explainer.neurons().")
    x = inputs[assignment.graph_module.graph.find_nodes(op="placeholder").index(source)].detach()
    if x.dim() > 4:
        raise InputError(
            f"Maps of layers support inputs with one or two spatial axes, not {x.dim() - 2}. Use explainer.neurons()."
        )
    module = assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    constants |= reference_constants(assignment)
    upstream = feeding(assignment, layer)
    nodes = tuple(n for n in assignment.rules if n in upstream)
    with torch.no_grad():
        everything = evaluate(module.graph, constants, [t.detach() for t in inputs], until=layer)
        there = at_reference(assignment, constants, inputs, everything, until=layer)
        maps = affine_maps(assignment, everything, nodes, references=there)
        field = push(assignment, maps, {}, layer, everything) if account.constants else None
        values = first_result(everything[layer])
        if there is not None:
            x, values = x - first_result(there[source]), values - first_result(there[layer])
        bias = torch.zeros_like(values) if field is None else field.expand_as(values).contiguous()
        rows, ended = _windows(assignment, maps, x, layer)
    return LayerContext(assignment, maps, layer, x, values, bias, nodes, rows, ended)


def _windows(assignment: Assignment, maps: AffineMaps, x: Tensor, layer: fx.Node) -> tuple[Rows | None, str | None]:
    """Builds the producers of windows, or says where locality ends."""
    if x.dim() not in (3, 4):
        return None, "the input: it has no spatial axes"
    try:
        return build_rows(assignment, maps, assignment.sources[0], x, layer), None
    except LocalityEndsError as ended:
        return None, str(ended)
