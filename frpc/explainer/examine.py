"""Coverage of a model before compiling: which nodes carry relevance, by which rule, and which rules are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from frpc.core.graph import describe, origin_of
from frpc.core.snapshot import snapshot
from frpc.driver.calling import NamedInputs, named_inputs
from frpc.driver.pipeline import gaps_and_rules
from frpc.driver.prepare import prepare
from frpc.driver.printing import columns
from frpc.rules.sets.ruleset import FRP, RuleSet

__all__ = ["Coverage", "CoverageRow", "examine"]


@dataclass(frozen=True)
class CoverageRow:
    """One node that carries relevance, or ought to.

    Attributes:
        rule: name of its rule; empty where there is none.
        fix: what to do about a missing rule; empty where there is one.
    """

    node: str
    op: str
    rule: str
    module: str
    source: str
    where: str
    shape: str
    fix: str


@dataclass(frozen=True)
class Coverage:
    """What :func:`examine` found; prints as a table."""

    model: str
    rows: tuple[CoverageRow, ...]

    @property
    def ok(self) -> bool:
        """Says whether every node that carries relevance has a rule."""
        return all(row.rule for row in self.rows)

    @property
    def heading(self) -> str:
        """How many nodes have a rule."""
        missing = sum(not row.rule for row in self.rows)
        return f"{self.model}: {len(self.rows) - missing} of {len(self.rows)} carrying nodes have a rule"

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: the names of its columns, then a row for each node."""
        head = ("node", "operator", "rule", "module", "line", "source", "result", "fix")
        return [head, *((r.node, r.op, r.rule or "MISSING", r.module, r.where, r.source, r.shape, r.fix) for r in self.rows)]

    def __str__(self) -> str:
        return f"{self.heading}\n{columns(self.cells())}"


def examine(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    rule: RuleSet | None = None,
    source: str | Sequence[str] | None = None,
    constant: Sequence[str] = (),
    output: str | int | None = None,
) -> Coverage:
    """Captures a model and says which rule each node would get, without compiling and without raising on gaps.

    Args:
        model, inputs, rule, source, constant, output: as for :func:`frpc.compile`.

    Raises:
        CaptureError: if the model cannot be captured at all.
    """
    examples = [inputs] if isinstance(inputs, Tensor) else named_inputs(model, inputs) if isinstance(inputs, Mapping) else inputs
    names = examples.names if isinstance(examples, NamedInputs) else ()
    rules = rule or FRP()
    prepared = prepare(snapshot(model), examples, output, names, rules.account.gradients, apart=False)
    asked = (source,) if isinstance(source, str) else source
    found = gaps_and_rules(prepared, rules, constant, asked)
    gaps = {gap.node: gap for gap in found.gaps}
    rows = []
    for node in prepared.canonical.graph.nodes:
        origin = origin_of(node)
        place = (origin.module, origin.source, origin.where)
        if node in found.rules:
            rows.append(
                CoverageRow(node.name, str(node.target), found.rules[node].rule.name, *place, describe(node.meta["val"]), "")
            )
        elif node.name in gaps:
            gap = gaps[node.name]
            constant_too = f', or constant=["{gap.module}"]' if gap.module else ""
            fix = gap.fix or f"{gap.reason}: @frpc.rule(torch.ops.{gap.op}){constant_too}"
            rows.append(CoverageRow(node.name, gap.op, "", *place, gap.shape, fix))
    return Coverage(type(model).__name__, tuple(rows))
