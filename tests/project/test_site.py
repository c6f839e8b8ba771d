"""The pages hold together: every link leads somewhere, and every public name stands in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import frpc
from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(p for p in [ROOT / "README.md", *DOCS.rglob("*.md")] if "_build" not in p.parts)
FENCE = re.compile(r"^ *(`{3,}).*?^ *\1`*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)
SITE = {"front.md": DOCS}  # pages that the site shows at the place of another: links are relative to that


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text)


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: set[str] = set()
    for heading in HEADING.findall(prose(page.read_text(encoding="utf-8"))):
        name, again, count = slug(heading), slug(heading), 0
        while again in found:
            count += 1
            again = f"{name}-{count}"
        found.add(again)
    return found


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in LINK.findall(CODE.sub("", prose(page.read_text(encoding="utf-8")))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (SITE.get(page.name, page.parent) / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words, `code`\n## Again\n## Again\n[a](page.md#two-words-code) [b](#again-1) [c](https://x.y)\n"
        "[d](none.md) [e](#nowhere) ![f](figure.png) `[g](none.md)`\n```python\n# comment\nx[0](none)\n```\n[h](#comment)\n"
    )
    assert broken(page) == ["none.md", "#nowhere", "figure.png", "#comment"]


def test_every_page_is_on_the_site() -> None:
    """A page that no list of pages names can be found by nobody."""
    listed: set[Path] = set()
    for page, folder in ((DOCS / "site" / "front.md", DOCS), (DOCS / "reference" / "index.md", DOCS / "reference")):
        for block in re.findall(r"^```{toctree}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {folder / f"{name}.md" for name in names}
    without = {DOCS / "index.md", DOCS / "site" / "front.md"}  # the front page, and what stands at site/guide
    assert listed == set(PAGES) - {ROOT / "README.md"} - without


def test_every_public_name_is_in_the_reference() -> None:
    """Each by a directive that shows its docstring, under the name that users write."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    shown = set(re.findall(r"^\.\. auto\w+:: frpc\.(\w+)$", text, re.MULTILINE))
    assert set(frpc.__all__) - shown == set()
