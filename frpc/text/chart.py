"""An explained text as a bar chart: one bar for each word, in reading order."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from frpc.plots.panels import AGAINST, FOR, SMALL, TITLE, signed
from frpc.text.sheet import Sheet, Word

__all__ = ["bars"]

MOST = 40  # bars on one page
LETTERS = 24  # of a word


def bars(sheet: Sheet, unit: str) -> Figure:
    """A free-standing figure; in long texts the weakest words share one bar, so that the bars still add up."""
    shown, rest = _chosen(sheet)
    names = [_short(word.text) for word in shown]
    values = [word.relevance for word in shown]
    if rest:
        names.append(f"({len(rest)} weaker words together)")
        values.append(math.fsum(word.relevance for word in rest))
    figure = Figure(figsize=(6.4, 1.3 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.barh(rows, values, height=0.75, color=[FOR if value > 0 else AGAINST for value in values])
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(rows, names, parse_math=False)
    axes.invert_yaxis()
    for row, value in enumerate(values):
        axes.annotate(
            signed(value), (value, row), xytext=(3 if value >= 0 else -3, 0), textcoords="offset points",
            va="center", ha="left" if value >= 0 else "right", fontsize=SMALL,
        )  # fmt: skip
    axes.margins(x=0.16, y=0.01)
    axes.tick_params(labelsize=SMALL + 1)
    axes.set_xlabel(f"{unit}   (blue speaks against it, red for it)", fontsize=SMALL + 1, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    outside = [f"{line.name} {signed(line.value)}" for line in sheet.parts if line.name != "words"]
    account = ", ".join([f"words {signed(sheet.parts[0].value)}", *outside, f"total {signed(sheet.total[0].value)}"])
    axes.set_title(f"{sheet.heading}\n{account}", fontsize=TITLE, parse_math=False, loc="left")
    return figure


def _chosen(sheet: Sheet) -> tuple[list[Word], list[Word]]:
    """The words that get a separate bar, in reading order, and the others."""
    words = list(sheet.words)
    if len(words) <= MOST:
        return words, []
    order = sorted(range(len(words)), key=lambda at: -abs(words[at].relevance))
    kept = set(order[: MOST - 1])
    return [word for at, word in enumerate(words) if at in kept], [word for at, word in enumerate(words) if at not in kept]


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
