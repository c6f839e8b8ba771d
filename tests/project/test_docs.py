"""The documentation runs: every python block of a page, in order, in one namespace; and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from frpc.rules.table import TABLE
from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = "<!-- no-run -->"
NEEDS = {"embedding.md": ("onnx", "onnxscript", "onnxruntime")}  # what pip install 'frpc[export]' brings


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """First line and source of every python block, but for those with the comment `no-run` directly above."""
    for match in FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2].strip()
        if above != NOT_RUN:
            yield text.count("\n", 0, match.start(1)), match[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and with line numbers of the page in what is raised."""
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason=f"{page.name} needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))  # rules that a page registers are its own
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and pickle look a class up
    for line, source in blocks(page.read_text(encoding="utf-8")):
        exec(compile("\n" * line + source, str(page), "exec"), module.__dict__)


def test_blocks_are_found() -> None:
    text = f"a\n```python\nx = 1\n```\n{NOT_RUN}\n```python\nno\n```\n\n```python title\ny = 2\nz = 3\n```\n```bash\nls\n```\n"
    assert list(blocks(text)) == [(2, "x = 1\n"), (10, "y = 2\nz = 3\n")]


@pytest.mark.parametrize("name", ["rules", "methods"])
def test_generated_page_is_up_to_date(name: str) -> None:
    """docs/rules.md and docs/methods.md are what their scripts make of the tables in frpc."""
    path = ROOT / "docs" / "examples" / f"make_{name}.py"
    spec = importlib.util.spec_from_file_location(f"make_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert made == module.render(), f"docs/{name}.md is out of date: run python docs/examples/make_{name}.py"
