"""An explained text as HTML that needs nothing but itself: no script, no style sheet, no font to fetch.

The templates lie beside this file. Jinja escapes everything that comes from a text, a tokenizer or a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from frpc.plots.panels import AGAINST, FOR, signed
from frpc.text.sheet import ENDS, Sheet, colours

__all__ = ["fragment", "page"]


def fragment(sheet: Sheet) -> str:
    """One text as a ``<div>``, for notebooks and pages."""
    return _templates().get_template("fragment.html").render(sheet=sheet)


def page(sheets: Sequence[Sheet], title: str = "frpc: explained texts") -> str:
    """A whole document with one box for each sheet; its policy forbids the browser to load or run anything."""
    return _templates().get_template("page.html").render(sheets=sheets, title=title)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("frpc", "text"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["signed"] = signed
    found.globals.update({"words": _words, "colours": colours, "ends": ENDS, "in_favour": FOR, "against": AGAINST})
    return found


@dataclass(frozen=True)
class _Shown:
    """A word as the page shows it.

    Attributes:
        text, special: see :class:`frpc.text.sheet.Word`.
        hint: what a pointer on it reads.
        strength: how strong its colour is.
        apart: whether a space goes before it.
    """

    text: str
    special: bool
    hint: str
    strength: float
    apart: bool


def _words(sheet: Sheet) -> Iterator[_Shown]:
    pieces = {token.tokens[0]: token.text for token in sheet.tokens}
    for at, word in enumerate(sheet.words):
        inside = " ".join(pieces[position] for position in word.tokens if position in pieces)
        hint = f"{signed(word.relevance)}   {'added by the tokenizer' if word.special else inside}"
        apart = word.space or word.special or sheet.words[at - 1].special
        yield _Shown(word.text, word.special, hint, sheet.strength(word), apart)
