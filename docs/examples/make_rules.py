"""Writes docs/rules.md, the table of operators and their affine forms, from the rules themselves.

Run it after changing a rule: ``python docs/examples/make_rules.py``. A test compares the page with :func:`render`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from types import ModuleType

from frpc import rules
from frpc.rules.functions import elementwise
from frpc.rules.table import TABLE, Rule

__all__ = ["render"]

PAGE = Path(__file__).parents[1] / "rules.md"
FOLDERS = (rules.forms, rules.functions, rules.increments, rules.lrp)
FAMILIES: tuple[ModuleType, ...] = tuple(
    sorted((getattr(folder, name) for folder in FOLDERS for name in folder.__all__), key=lambda m: m.__name__.rsplit(".", 1)[1])
)
HEAD = """\
# Rules

<!-- made by docs/examples/make_rules.py from the rules themselves; edit those, then run it again -->

This page lists every operator that has a rule. `frpc.examine(model, inputs)` shows the operators of your model. An operator
without a rule is an error that lists every place; [adding a rule](adding_a_rule.md) shows how to write one.

A rule writes one call of an operator as `z = sum_k M_k a_k + c` at the given input: a linear map for each operand that
carries relevance, and a constant ([mathematics](mathematics.md)). In the formulas `a` is the first operand that carries,
`b` the second; `M` is the factor, slope or selection that acts on it, and `c` is 0 unless it is given. Operands that are
not listed under *carries* must be constants: they cannot be values that come from the input.

The operators are those of the canonical graph. The compiler first rewrites some operators: `conv1d`, `conv2d`, `conv3d` and
their transposed forms become `convolution`, max pooling becomes the forms with indices, `split`, `chunk` and `unbind` become
slices, `glu` becomes its factors, and embedding bags become embeddings and a reduction. Operators composed of others (losses,
bilinear layers, cross products, unpooling, `logcumsumexp`, ...) are decomposed into those. Dropout and copies are removed.

In the last column **T** is the thesis that introduced forward relevance propagation, with equation numbers; *method §2* is
section 2 of [mathematics](mathematics.md), which extends its recursion to these operators.
"""


def render() -> str:
    """Returns the page: a table for each family, operators in alphabetical order, the same form once."""
    table = {op: rule for op, rule in TABLE.rules.items() if _family(rule) is not None}
    assert table, "rules are not where they are looked for"
    sections = [HEAD, f"{len(table)} operators have a rule.\n"]
    for module in FAMILIES:
        members = [rule for rule in table.values() if _family(rule) == module.__name__]
        if members:
            sections.append(_section(module, members))
    return "\n".join(sections)


def _family(rule: Rule) -> str | None:
    """Names the module the rule was written in, or None for rules that are not frpc's own.

    The factories of :mod:`frpc.rules.table` wrap a function from that module; only activations wrap torch's own functions.
    """
    known = {module.__name__ for module in FAMILIES}
    wrapped = [v for v in inspect.getclosurevars(rule.function).nonlocals.values() if callable(v)]
    origins = [rule.function.__module__, *(getattr(v, "__module__", None) or "" for v in wrapped)]
    found = next((origin for origin in origins if origin in known), None)
    if found is None and rule.function.__qualname__.startswith("elementwise.") and origins[1].split(".")[0] in ("torch", ""):
        return elementwise.__name__
    return found


def _section(module: ModuleType, members: Iterable[Rule]) -> str:
    title = module.__name__.rsplit(".", 1)[1]
    about = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split()).replace("``", "`")
    rows = [
        "| operator | carries | M, and c where it is not 0 | source |",
        "|---|---|---|---|",
    ]
    forms = sorted(members, key=lambda r: (_form(r), _operator(r).replace("_", "")))
    merged = [list(group) for _, group in groupby(forms, key=_form)]
    for group in sorted(merged, key=lambda g: _operator(g[0]).replace("_", "")):
        carries, formula, source = _form(group[0])
        rows.append(f"| {', '.join(_operator(r) for r in group)} | {carries} | {formula} | {source} |")
    return f"## {title}\n\n{about}\n\n" + "\n".join(rows) + "\n"


def _form(rule: Rule) -> tuple[str, str, str]:
    cells = (", ".join(rule.carries), rule.formula, rule.source)
    return tuple(cell.replace("|", "\\|") for cell in cells)  # type: ignore[return-value]


def _operator(rule: Rule) -> str:
    return f"`{str(rule.op).removeprefix('aten.').removesuffix('.default')}`"


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
