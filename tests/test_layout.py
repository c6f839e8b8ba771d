"""docs/layout.md lists every source file once, in an order in which each imports only from files above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def test_a_package_comes_after_its_parts() -> None:
    """All but the outermost, on whose public names the command line is built."""
    names = listed()
    for name in names:
        folder = name.removesuffix("__init__.py")
        if name.endswith("/__init__.py") and folder != "frpc/":
            below = [other for other in names[names.index(name) :] if other.startswith(folder) and other != name]
            assert not below, f"{name} stands above its part {below[0]}"


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
