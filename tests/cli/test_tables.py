"""Tables that commands print: no cell is cut, on a terminal of any width and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from frpc.cli.session import PIPE_WIDTH, _console, print_pairs, print_table

HEAD = ("node", "rule", "source", "error")
ROWS = [
    ("convolution_1", "linear", "x = self.features[0](x)  # [not markup]", "1.0e-07"),
    ("a_name_of_forty_letters_without_any_space", "", "y", "2.5e-06"),
]


def printed(width: int, terminal: bool = True, rows=ROWS) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    print_table(console, HEAD, rows, words=("node", "rule", "source"))
    print_pairs(console, [("python", "3.11"), ("platform", "Linux-with-a-name-that-is-longer-than-forty-letters")])
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80, 200, PIPE_WIDTH])
def test_no_cell_is_cut(width, terminal):
    text = re.sub(r"\x1b\[\d*m", "", printed(width, terminal))
    assert "…" not in text and max(len(line) for line in text.splitlines()) <= width
    if width == 40:  # some words are longer than the line
        text = re.sub(r"\s", "", text)
    for word in [word for cell in (*HEAD, *sum(ROWS, ())) for word in cell.split()]:
        assert word in text


def test_a_narrow_terminal_gets_blocks_and_a_wide_one_lines():
    narrow, wide = printed(40), printed(200)
    assert re.search(r"^node +convolution_1 *$", narrow, re.MULTILINE)
    assert not re.search(r"^rule *$", narrow, re.MULTILINE), "an empty cell has no line"
    lines = re.sub(r"\x1b\[\d*m", "", wide).splitlines()
    assert lines[0].split() == list(HEAD)
    assert {len(line[: line.index(end)] + end) for line, end in zip(lines[1:3], ("1.0e-07", "2.5e-06"), strict=True)} == {
        len(lines[0].rstrip())
    }, "numbers end below one another"


def test_lines_in_a_pipe_are_whole_and_end_where_the_text_ends(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = _console(quiet=False)
    print_table(console, HEAD, [("n", "r", "word " * 100 + "end", "1"), ("n", "r", "short", "2")], words=("source", "error"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "end" in lines[1] and all(line == line.rstrip() for line in lines)
    monkeypatch.setenv("COLUMNS", "50")
    assert _console(quiet=False).width == 50
