"""Programs and rules as text: the emitted code with shape, origin and rule beside each line, and the table of rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import fx

from frpc.assign.assignment import Assignment
from frpc.core.graph import describe, origin_of

__all__ = ["code", "columns", "comment", "place", "rule_name", "rule_table"]

_ASSIGNMENT = re.compile(r"^(\s+)(\w+)(?:: [^=]+)? = (.*)$")


def code(program: fx.GraphModule, rules: Mapping[str, str]) -> str:
    """Returns the program as valid Python; comments give result, module, line and rule.

    Args:
        program: a graph of ATen operators.
        rules: canonical node name -> name of its rule.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    lines = ["import torch", "from torch import device", "", ""]
    section = ""
    for line in program.code.strip().splitlines():
        match = _ASSIGNMENT.match(line)
        node = nodes.get(match[2]) if match else None
        if match is None or node is None:
            lines.append(re.sub(r'"[^"]*"', "", line) if line.startswith("def ") else line)
            continue
        phase = _SECTIONS.get(node.meta.get("phase", ""), section)
        if phase != section:
            section = phase
            lines.append(f"{match[1]}# ---- {section}")
        lines.append(f"{line}  # {comment(node, rules)}")
    return "\n".join(lines) + "\n"


_SECTIONS = {
    "value": "values: the model's forward pass",
    "reference": "values at the reference input",
    "rule": "coefficients of the rules",
    "pull": "relevance, from the output back",
}


def comment(node: fx.Node, rules: Mapping[str, str]) -> str:
    """Says what a node gives, where it comes from and by which rule."""
    rule = rule_name(node, rules) if node.meta.get("phase") != "value" else ""
    parts = [describe(node.meta.get("val")), place(node), f"rule {rule}" if rule else ""]
    return " | ".join(part for part in parts if part)


def place(node: fx.Node) -> str:
    """Says where a node comes from; programs read from a file bring the text with them."""
    if "place" in node.meta:
        return str(node.meta["place"])
    origin = origin_of(node)
    parts = [str(node.meta["constant"])] if node.op == "get_attr" and "constant" in node.meta else []
    return " | ".join([*parts, f"{origin.module} {origin.where}".strip()] if origin.file else parts)


def rule_name(node: fx.Node, rules: Mapping[str, str]) -> str:
    """The name of the rule that a node works for, or of whose operand; nothing where there is none."""
    return str(node.meta["rule"]) if "rule" in node.meta else rules.get(node.meta.get("of", ""), "")


def rule_table(assignment: Assignment) -> str:
    """Returns which rule and maps each node got, one line a node."""
    rows = [("node", "operator", "rule", "maps", "module", "line", "result")]
    for node, assigned in assignment.rules.items():
        origin = origin_of(node)
        name = str(node.target).removeprefix("aten.").removesuffix(".default")
        rows.append((node.name, name, assigned.rule.name, assigned.maps, origin.module, origin.where, describe(node.meta["val"])))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]], widest: int = 48) -> str:
    """Sets rows of text in columns, the first row as the head; cells longer than ``widest`` are cut."""
    cut = [[c if len(c) <= widest else c[: widest - 1] + "…" for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cut]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
