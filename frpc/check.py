"""Conservation, checked layer by layer at one input: does every operator pass on what it received?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from frpc.affine import Affine, Operand
from frpc.assign import Assigned
from frpc.errors import OptionError, TargetError
from frpc.explainer import Explainer
from frpc.explanation import Explanation
from frpc.graph import fetch, first_result, origin_of
from frpc.printing import columns
from frpc.propagate import affine_maps, evaluate, pull
from frpc.targets import Target

__all__ = ["Conservation", "LayerConservation", "check"]


@dataclass(frozen=True)
class LayerConservation:
    """Conservation in one layer, over all samples.

    Attributes:
        layer: module path.
        nodes: how many operators it has.
        error: the largest ``|<G_z, z> - sum_k <G_k, a_k> - <G_z, c>| / sum |G_z z|`` of its nodes.
        constants: ``<G_z, c>`` of its nodes over the explained output.
        worst: the node with the largest error.
    """

    layer: str
    nodes: int
    error: float
    constants: float
    worst: str


@dataclass(frozen=True)
class Conservation:
    """What :func:`check` found; prints as a table.

    Attributes:
        error: end to end, the largest ``|sum V - y| / sum |V|`` over samples.
        constants: the constants' share of the explained output.
        rows: one for each layer, from the output back.
        worst: name of the node with the largest error of all.
    """

    error: float
    constants: float
    rows: tuple[LayerConservation, ...]

    @property
    def worst(self) -> str:
        return max(self.rows, key=lambda row: row.error).worst if self.rows else ""

    def __str__(self) -> str:
        totals = f"conservation error {self.error:.1e} end to end, constants {self.constants:.1%} of the output"
        head = f"{totals}, worst node {self.worst}"
        cells = [("layer", "nodes", "error", "constants", "worst node")]
        cells += [(r.layer or "(top level)", str(r.nodes), f"{r.error:.1e}", f"{r.constants:.2%}", r.worst) for r in self.rows]
        return f"{head}\n{columns(cells)}"


def check(
    explainer: Explainer, *inputs: Tensor, target: Target | None = None, seed: Tensor | None = None, **named: Tensor
) -> Conservation:
    """Reports conservation end to end and for every layer.

    The end-to-end figure is the compiled program's; the figures of the layers come from running the same rules operator by
    operator. Sums are taken in float64, so that the rounding of the check itself does not count.

    Args:
        explainer: a compiled explainer.
        inputs, named, target, seed: as for calling it, with one target a sample.

    Raises:
        TargetError: for several targets a sample.
        OptionError: for rule sets that do not account for the whole output: what theirs leave out is the explanation's ``bias``.
    """
    if not explainer.rules.account.constants:
        raise OptionError(
            f"check holds maps against the whole output, which {explainer.rules.name} does not explain (it conserves "
            f"{explainer.rules.account.conserves}); what its map leaves out is explanation.bias."
        )
    explanation = explainer(*inputs, target=target, seed=seed, **named)
    if explanation.bias.dim() != 1:
        raise TargetError("check takes one target a sample; call it for each of the K targets.")
    inputs = explanation.inputs
    compiled = explainer.compiled(*inputs)
    functional = explainer.seed_for(*inputs, target=target, seed=seed)
    explained = (explanation.output.double() * functional.double()).flatten(1).sum(1)
    module = compiled.assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    result = module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    with torch.no_grad():
        values = evaluate(module.graph, constants, [x.detach() for x in inputs])
        maps = affine_maps(compiled.assignment, values, compiled.plan.pulled)
        audit = _Audit(values, maps)
        pull(compiled.assignment, maps, {result: functional}, compiled.plan.wanted, record=audit.record)
    whole = float(explained.abs().sum()) or 1.0
    rows = tuple(audit.row(layer, whole) for layer in audit.by_layer)
    return Conservation(*_end_to_end(explanation, explained, explainer.bias_policy == "separate"), rows)


def _end_to_end(explanation: Explanation, explained: Tensor, separate: bool) -> tuple[float, float]:
    maps = explanation.relevance if isinstance(explanation.relevance, tuple) else (explanation.relevance,)
    sums = sum(m.double().flatten(1).sum(1) for m in maps) + (explanation.bias.double() if separate else 0.0)
    size = sum(m.double().abs().flatten(1).sum(1) for m in maps) + (explanation.bias.double().abs() if separate else 0.0)
    assert isinstance(sums, Tensor) and isinstance(size, Tensor)
    error = (sums - explained).abs() / size.clamp(min=torch.finfo(torch.float64).tiny)
    share = float(explanation.bias.double().sum() / (explained.sum() if float(explained.sum()) else 1.0))
    return float(torch.where(size == 0, explained.abs(), error).max()), share


class _Audit:
    """Collects what every node received and passed on."""

    def __init__(self, values: Mapping[fx.Node, object], maps: Mapping[fx.Node, Affine]) -> None:
        self.values, self.maps = values, maps
        self.by_layer: dict[str, list[tuple[str, float, float]]] = {}  # node, error, constants

    def record(self, assigned: Assigned, v: Tensor, passed: Mapping[Operand, Tensor]) -> None:
        received = v.double() * self._value(assigned.node)
        constant = self.maps[assigned.node].constant
        kept = 0.0 if constant is None else float((v.double() * constant).sum())
        gave = sum(float((share.double() * self._value(assigned.operands[name])).sum()) for name, share in passed.items())
        size = float(received.abs().sum())
        error = abs(float(received.sum()) - gave - kept) / size if size else abs(gave + kept)
        self.by_layer.setdefault(origin_of(assigned.node).module, []).append((assigned.node.name, error, kept))

    def _value(self, node: fx.Node) -> Tensor:
        value = self.values[node]
        first = first_result(value)
        assert isinstance(first, Tensor)
        return first.double()

    def row(self, layer: str, whole: float) -> LayerConservation:
        entries = self.by_layer[layer]
        worst = max(entries, key=lambda e: e[1])
        return LayerConservation(layer, len(entries), worst[1], sum(e[2] for e in entries) / whole, worst[0])
