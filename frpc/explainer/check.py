"""Checks conservation layer by layer for one input: does every operator pass on all the relevance it receives?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from frpc.core.graph import origin_of
from frpc.driver.balance import balance_of
from frpc.driver.printing import columns as table
from frpc.driver.targets import Target
from frpc.emit.audit import NodeAccount, audit
from frpc.errors import OptionError, TargetError
from frpc.explainer.explainer import Explainer

__all__ = ["Conservation", "LayerConservation", "check"]


@dataclass(frozen=True)
class LayerConservation:
    """Conservation in one layer, over all samples.

    Attributes:
        layer: module path.
        nodes: how many operators it has.
        error: the largest ``|<G_z, z> - sum_k <G_k, a_k> - <G_z, c>|`` of its nodes, over the larger of ``sum |G_z z|`` and
            ``sum_k sum |G_k a_k|``.
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
    """The result of :func:`check`; prints as a table.

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
        return f"{head}\n{table(cells)}"


def check(
    explainer: Explainer, *inputs: Tensor, target: Target | None = None, seed: Tensor | None = None, **named: Tensor
) -> Conservation:
    """Reports conservation end to end and for every layer.

    The end-to-end error is that of the compiled program. The errors of the layers come from running the same rules operator by
    operator. Sums are computed in float64, so that the rounding of the check itself does not count.

    Args:
        explainer: a compiled explainer.
        inputs, named, target, seed: as in a call of the explainer, with one target per sample.

    Raises:
        TargetError: for several targets per sample.
        OptionError: for rule sets that do not explain the whole output; ``explanation.bias`` has what they leave out.
    """
    if not explainer.rules.account.constants:
        raise OptionError(
            f"check compares maps with the whole output, which {explainer.rules.name} does not explain (it conserves "
            f"{explainer.rules.account.conserves}); explanation.bias has what its map leaves out."
        )
    programs = explainer.programs
    inputs = programs.in_order(inputs, named)
    prepared = programs.prepared(inputs)
    functional, columns = programs.seed(prepared, inputs, target, seed)
    if columns:
        raise TargetError("check takes one target per sample; call it for each of the K targets.")
    compiled = programs.program(prepared, inputs, programs.query_with())
    results = programs.run(compiled, inputs, functional)
    balance = balance_of(compiled, functional, results)
    assert balance is not None, "rules that follow constants make an account"
    with programs.reading_graphs():
        found = audit(compiled.assignment, compiled.plan, inputs, functional)
    whole, share = float(balance.explained.abs().sum()) or 1.0, float(results[-1].double().sum())
    by_layer: dict[str, list[NodeAccount]] = {}
    for account in found.nodes:
        by_layer.setdefault(origin_of(account.assigned.node).module, []).append(account)
    rows = tuple(_row(layer, accounts, whole) for layer, accounts in by_layer.items())
    return Conservation(float(balance.errors.max()), share / (float(balance.explained.sum()) or 1.0), rows)


def _row(layer: str, accounts: list[NodeAccount], whole: float) -> LayerConservation:
    worst = max(accounts, key=lambda account: account.error)
    constants = sum(account.constants for account in accounts) / whole
    return LayerConservation(layer, len(accounts), worst.error, constants, worst.assigned.node.name)
