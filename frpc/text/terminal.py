"""An explained text in a terminal: coloured words, the scale, the sum."""

from __future__ import annotations

from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from frpc.plots.panels import signed
from frpc.text.sheet import ENDS, Sheet, Word, colours

__all__ = ["rendered"]

STRONGEST = 6
STEPS = 8  # cells of the scale on either side of 0


def rendered(sheet: Sheet) -> Group:
    """The sheet for :class:`rich.console.Console`; readable without colours too, since the strongest words are listed below."""
    return Group(
        Text(sheet.heading, style="bold"),
        Text(),
        _words(sheet),
        Text(),
        _scale(sheet),
        _strongest(sheet),
        Text(),
        _account(sheet),
        *(Text(remark, style="dim") for remark in sheet.remarks),
    )


def _style(strength: float) -> Style:
    pair = colours(strength)
    return Style(bgcolor=pair[0], color=pair[1]) if pair else Style()


def _words(sheet: Sheet) -> Text:
    text = Text()
    for at, word in enumerate(sheet.words):
        apart = word.space or word.special or sheet.words[at - 1].special
        text.append(" " if at and apart else "")
        text.append(word.text, _style(sheet.strength(word)) + Style(italic=word.special))
    return text


def _scale(sheet: Sheet) -> Text:
    text = Text(f"{signed(-sheet.limit)} ")
    for step in range(-STEPS, STEPS + 1):
        text.append(" " if step else "0", _style(step / STEPS))
    text.append(f" {signed(sheet.limit)}")
    text.append(f"   blue {ENDS[0]}, red {ENDS[1]}", "dim")
    if sheet.beyond:
        text.append("\nbeyond the scale: " + ", ".join(_number(word) for word in sheet.beyond), "dim")
    return text


def _strongest(sheet: Sheet) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, sign in (("for", 1), ("against", -1)):
        words = sheet.strongest(sign, STRONGEST)
        table.add_row(name, Text(", ".join(_number(word) for word in words) or "nothing"))
    return table


def _number(word: Word) -> str:
    return f"“{word.text}” {signed(word.relevance)}"


def _account(sheet: Sheet) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for line in sheet.parts:
        table.add_row(Text(line.name), signed(line.value), Text(line.note))
    table.add_section()
    for line in sheet.total:
        table.add_row(Text(line.name, style="bold"), Text(signed(line.value), style="bold"), Text(line.note))
    return table
