"""What a program in a file answers: one target or K, of the input or of layers, from which start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from frpc.driver.pipeline import Query
from frpc.files.values import FaultError, integer, record, show, strings
from frpc.rules.top import TOPS, Top

__all__ = ["FileQuestion", "question_of", "read_question", "read_top", "write_question", "write_top"]


@dataclass(frozen=True)
class FileQuestion:
    """What a program in a file answers.

    Attributes:
        columns: K linear functionals a sample instead of one.
        layers: module paths of inner layers; empty for the sources.
        top: where relevance starts.
    """

    columns: bool = False
    layers: tuple[str, ...] = ()
    top: Top = field(default_factory=lambda: TOPS["logit"])

    def __str__(self) -> str:
        what = f"layers {', '.join(self.layers)}" if self.layers else "input"
        start = "" if self.top == TOPS["logit"] else f", from {write_top(self.top)['name']}"
        return f"{what} for {'K targets' if self.columns else 'one target'}{start}"


def question_of(query: Query) -> FileQuestion | None:
    """What a compiled program answers, or None for one about the neurons of a layer, which no file holds."""
    return None if query.of else FileQuestion(query.columns, query.layers, query.top)


def write_question(question: FileQuestion) -> dict[str, Any]:
    """Writes a question as JSON."""
    return {"columns": question.columns, "layers": list(question.layers), "top": write_top(question.top)}


def write_top(top: Top) -> dict[str, Any]:
    """Writes a top as JSON.

    Raises:
        FaultError: it is the user's own.
    """
    for name, known in TOPS.items():
        if type(top) is type(known):
            return {"name": name, **vars(top)}
    raise FaultError(f"the start of relevance {type(top).__name__}, which is a custom class")


def read_question(raw: Any) -> FileQuestion:
    """Reads a question.

    Raises:
        FaultError: it is none.
    """
    parts = record(raw, ("columns", "layers", "top"))
    if not isinstance(parts["columns"], bool):
        raise FaultError(f"columns {show(parts['columns'])}")
    return FileQuestion(parts["columns"], strings(parts["layers"]), read_top(parts["top"]))


def read_top(raw: Any) -> Top:
    """Reads a top.

    Raises:
        FaultError: it is none.
    """
    parts = record(raw, ("name",), ("steps",))
    if not isinstance(parts["name"], str) or parts["name"] not in TOPS:
        raise FaultError(f"the start of relevance {show(parts['name'])}")
    kind, steps = TOPS[parts["name"]], {k: integer(v, 1, 10**6) for k, v in parts.items() if k != "name"}
    if set(steps) != set(vars(kind)):
        raise FaultError(f"the start of relevance {show(parts)}")
    return type(kind)(**steps)
