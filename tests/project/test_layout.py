"""docs/layout.md lists every folder and file once, in an order in which each imports only from those above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

PACKAGES = {"frpc": ROOT / "frpc", "frpc_kernels": ROOT / "kernels" / "frpc_kernels"}
LINE = re.compile(r"^- `([^`]+\.py)` — (\S.*)$", re.MULTILINE)


def listed() -> list[str]:
    return [path for path, _ in LINE.findall((ROOT / "docs" / "layout.md").read_text(encoding="utf-8"))]


def sources() -> set[str]:
    found = (path for folder in ("frpc", "kernels") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_every_file_is_listed_once() -> None:
    names = listed()
    assert sorted(names) == sorted(set(names)), "a file is listed twice"
    assert sources() - set(names) == set(), "files that docs/layout.md does not list"
    assert set(names) - sources() == set(), "files that docs/layout.md lists and that do not exist"


def test_files_import_from_files_above() -> None:
    position = {name: at for at, name in enumerate(listed())}
    wrong = [
        f"{name}:{line} imports {target}, which is listed below it"
        for name in position
        for line, target in imports(ROOT / name)
        if position.get(target, -1) >= position[name]
    ]
    assert not wrong, "\n".join(wrong)


FOLDER = re.compile(r"^### `([^`]+)`.*?^Imports: ([^\n]*)\.$", re.MULTILINE | re.DOTALL)
FACES = {"frpc/rules/__init__.py": "frpc/rules/sets/"}  # a package's face stands where all its parts are done


def folders() -> dict[str, set[str]]:
    """The folders of docs/layout.md, in order, and what each may import."""
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    return {
        name: set(re.findall(r"`([^`]+)`", allowed))
        for section in re.split(r"(?=^### )", text, flags=re.MULTILINE)
        for name, allowed in FOLDER.findall(section)
    }


def folder_of(path: str) -> str:
    return path if path == "frpc/errors.py" else FACES.get(path, path.rsplit("/", 1)[0] + "/")


def test_folders_import_what_they_say_and_nothing_from_below() -> None:
    known = folders()
    order = ["frpc/errors.py", *known]
    for name, allowed in known.items():
        below = [other for other in allowed if other != "frpc/" and order.index(other) >= order.index(name)]
        assert not below, f"{name} says that it imports {below[0]}, which stands below it"
    found: dict[str, set[str]] = {name: set() for name in known}
    for path in sources() - {"frpc/errors.py", "frpc/__init__.py"}:
        for line, target in imports(ROOT / path):
            here, there = folder_of(path), folder_of(target)
            if here != there:
                assert there in known[here], f"{path}:{line} imports {target}, and {here} may not import {there}"
                found[here].add(there)
    assert {name: allowed - found[name] for name, allowed in known.items() if allowed - found[name]} == {}


def test_folders_and_files_are_small() -> None:
    assert len([p for p in (ROOT / "frpc").iterdir() if p.name != "__pycache__"]) <= 24
    for folder in {(ROOT / path).parent for path in sources()}:
        assert len([p for p in folder.iterdir() if p.is_file()]) <= 14, folder
    long = {path: count for path in sources() if (count := len((ROOT / path).read_text(encoding="utf-8").splitlines())) > 350}
    assert not long


def test_files_of_tests_are_small() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "tests").rglob("*.py")}
    assert not {
        name: count for name, path in files.items() if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }


def test_few_stages_know_one_another() -> None:
    """Which top folder imports which: 344 files knew one another when all of them lay side by side."""
    arrows = {
        (a, b)
        for path in sources()
        for _, target in imports(ROOT / path)
        if (a := "/".join(path.split("/")[:2])) != (b := "/".join(target.split("/")[:2]))
    }
    assert len(arrows) <= 130


def test_no_file_is_a_drawer() -> None:
    """A name says what is inside."""
    assert not [name for name in sources() if Path(name).stem in {"utils", "util", "helpers", "misc", "common"}]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and file of every import of the project's own, at module level or inside functions, but not for types alone."""
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if (target := file_of(module)) is not None:
                yield node.lineno, target


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from running(other)
            continue
        yield child
        yield from running(child)


def file_of(module: str) -> str | None:
    """The file that defines a dotted name: its own, or the one of the module or package that holds it."""
    package, *parts = module.split(".")
    if package not in PACKAGES:
        return None
    for count in range(len(parts), -1, -1):
        path = PACKAGES[package].joinpath(*parts[:count])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate.relative_to(ROOT).as_posix()
    return None
