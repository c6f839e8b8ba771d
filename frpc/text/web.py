"""An explained text as HTML that needs nothing but itself: no script, no style sheet, no font to fetch.

Everything that comes from a text, a tokenizer or a model goes through :func:`html.escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from frpc.plots.panels import AGAINST, FOR, signed
from frpc.text.sheet import ENDS, Line, Sheet, Word, colours

__all__ = ["fragment", "page"]

BOX = (
    "font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:56em;"
    "padding:1em 1.3em;margin:1em auto;border:1px solid #ddd;border-radius:6px"
)
WORD = "padding:.12em .12em;border-radius:3px"
ADDED = "font-size:.82em;font-style:italic;outline:1px dashed #999;outline-offset:-1px;"
SMALL = "font-size:.85em;color:#555"
NUMBER = "text-align:right;font-variant-numeric:tabular-nums;padding:0 .9em"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def fragment(sheet: Sheet) -> str:
    """One text as a ``<div>``, for notebooks and pages."""
    words = "".join(_word(sheet, at) for at in range(len(sheet.words)))
    remarks = "".join(f'<p style="margin:.3em 0;{SMALL}">{escape(remark)}</p>' for remark in sheet.remarks)
    return (
        f'<div style="{BOX}"><h2 style="font-size:1.05em;margin:0 0 .6em">{escape(sheet.heading)}</h2>'
        f'<p dir="auto" style="font-size:1.15em;line-height:2;margin:.4em 0;overflow-wrap:anywhere">{words}</p>'
        f"{_scale(sheet)}{_account(sheet)}{remarks}{_details(sheet)}</div>"
    )


def page(sheets: Sequence[Sheet], title: str = "frpc: explained texts") -> str:
    """A whole document with one box for each sheet; its policy forbids the browser to load or run anything."""
    body = "\n".join(fragment(sheet) for sheet in sheets)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f'<title>{escape(title)}</title>\n</head>\n<body style="background:#f4f4f4;margin:1em">\n'
        f"{body}\n</body>\n</html>\n"
    )


def _word(sheet: Sheet, at: int) -> str:
    word = sheet.words[at]
    apart = word.space or word.special or sheet.words[at - 1].special
    pair = colours(sheet.strength(word))
    colour = f"background:{pair[0]};color:{pair[1]};" if pair else ""
    pieces = {token.tokens[0]: token.text for token in sheet.tokens}
    inside = " ".join(pieces[position] for position in word.tokens if position in pieces)
    hint = f"{signed(word.relevance)}   {'added by the tokenizer' if word.special else inside}"
    style = f"{colour}{ADDED if word.special else ''}{WORD}"
    # <wbr> lets a line break between words that stand without a space.
    gap = " " if at and apart else "<wbr>" if at else ""
    return f'{gap}<span title="{escape(hint)}" style="{style}">{escape(word.text)}</span>'


def _scale(sheet: Sheet) -> str:
    ramp = f"linear-gradient(to right,{AGAINST},#fff,{FOR})"
    bar = f'<span style="display:inline-block;width:12em;height:.8em;border:1px solid #ccc;background:{ramp}"></span>'
    beyond = ", ".join(f"“{word.text}” {signed(word.relevance)}" for word in sheet.beyond)
    note = f"<br>Beyond the scale: {escape(beyond)}" if beyond else ""
    return (
        f'<p style="margin:.9em 0;{SMALL}">{ENDS[0]} {signed(-sheet.limit)} {bar} {signed(sheet.limit)} {ENDS[1]}'
        f"{note}<br>Relevance of a word; point at it for its number.</p>"
    )


def _account(sheet: Sheet) -> str:
    rows = [_row(line, "") for line in sheet.parts]
    rows += [
        _row(line, "font-weight:600;" + ("border-top:1px solid #999;" if at == 0 else "")) for at, line in enumerate(sheet.total)
    ]
    return f'<table style="border-collapse:collapse;font-size:.92em">{"".join(rows)}</table>'


def _row(line: Line, style: str) -> str:
    return (
        f'<tr><td style="{style}text-align:left">{escape(line.name)}</td><td style="{style}{NUMBER}">{signed(line.value)}</td>'
        f'<td style="{SMALL};text-align:left">{escape(line.note)}</td></tr>'
    )


def _details(sheet: Sheet) -> str:
    rows = "".join(_token(sheet, token) for token in sheet.tokens)
    return (
        f'<details style="margin-top:.8em;{SMALL}"><summary>Token by token</summary>'
        f'<table style="border-collapse:collapse"><tr><th style="text-align:right">position</th>'
        f'<th style="text-align:left;padding:0 .9em">token</th><th style="{NUMBER}">relevance</th></tr>{rows}</table></details>'
    )


def _token(sheet: Sheet, token: Word) -> str:
    pair = colours(sheet.strength(token))
    colour = f"background:{pair[0]};color:{pair[1]};" if pair else ""
    return (
        f'<tr><td style="text-align:right">{token.tokens[0]}</td>'
        f'<td style="padding:0 .9em;font-family:monospace;text-align:left;white-space:pre">{escape(token.text)}</td>'
        f'<td style="{colour}{NUMBER}">{signed(token.relevance)}</td></tr>'
    )
