"""One file knows what PyTorch keeps private: no other touches it, and all it touches is written down and there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from frpc.core import torch_compat
from places import ROOT

DOOR = ROOT / "frpc" / "core" / "torch_compat.py"
INTERNAL = ("torch.fx.experimental",)  # private without an underscore
OBJECTS: dict[str, Any] = {  # of classes whose objects alone have an attribute
    "torch.nn.RNNBase": torch.nn.GRU(1, 1),
    "torch.autograd.function.BackwardCFunction": type("Some", (torch.autograd.Function,), {})._backward_cls,  # type: ignore[attr-defined]
}
OF_PYTHON = {"_replace", "_asdict", "_fields", "_getframe"}
DOTTED = re.compile(r"torch(\.\w+)+")
OPERATORS = re.compile(r"^(torch\.ops|aten|mkldnn)\.")


def is_private(name: str) -> bool:
    """Whether a dotted name of PyTorch's is private."""
    parts = name.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return hidden or any(f"{name}.".startswith(f"{one}.") for one in INTERNAL)


def touched(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything private to PyTorch that a file imports, reads or asks for by ``getattr``."""
    own = set(defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names if is_private(f"{node.module}.{a.name}"))
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "torch" and is_private(a.name))
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if OPERATORS.match(text) or text.startswith(("self.", "cls.", "super().")):
                continue
            hidden = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in own | OF_PYTHON
            of_sizes = node.attr in ("expr", "hint") and isinstance(node.value, ast.Attribute) and node.value.attr == "node"
            if hidden or of_sizes or (DOTTED.fullmatch(text) and is_private(text)):
                yield node.lineno, text
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and str(name.value).startswith("_") and not str(name.value).startswith("__"):
                yield node.lineno, f"{ast.unparse(node.args[0])}.{name.value}"


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives to things of its own: functions, classes, fields, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def found(text: str) -> list[str]:
    return [name for _, name in touched(ast.parse(text))]


def looked_up(name: str) -> Any:
    """What a dotted name stands for; an attribute that only objects have is found on one, or in its class's annotations."""
    owner, _, attribute = name.rpartition(".")
    if owner in OBJECTS:
        return getattr(OBJECTS[owner], attribute)
    parts = name.split(".")
    thing: Any = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], start=1):
        if part in getattr(thing, "__annotations__", {}) and not hasattr(thing, part):
            return thing.__annotations__[part]
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(parts[: at + 1]))
    return thing


def test_no_other_file_touches_what_is_private() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} touches {name}; put it into frpc/core/torch_compat.py"
        for folder in ("frpc", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != DOOR
        for line, name in touched(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "from torch._ops import OpOverload",
        "from torch import _dynamo",
        "import torch._inductor",
        "from torch.utils import _pytree as pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "import torch.fx.experimental.symbolic_shapes",
        "def f():\n    from torch._dynamo.source import LocalSource",
        "torch._C._functorch",
        "x = op._schema.arguments",
        "x = getattr(op, '_schema')",
        "x = size.node.expr",
        "x._version",
    ],
)
def test_what_is_private_is_seen(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize(
    "text",
    [
        "from torch.export import Dim",
        "import torch.nn.functional as F",
        "torch.ops.aten._softmax.default",
        "aten._softmax.default",
        "torch.__version__",
        "class A:\n    def _b(self): return self._c\ndef f(a): return a._b()",
        "point._replace(x=1)",
        "for n in graph.nodes: n.node.name",
        "class A:\n    def _b(self): return torch.cat([self._b()]).numpy()",
    ],
)
def test_what_is_not_private_passes(text: str) -> None:
    assert not found(text)


def test_all_that_the_door_touches_is_written_down() -> None:
    known = {entry.name for entry in torch_compat.PRIVATE}
    ends = {name.rsplit(".", 1)[-1] for name in known}
    missing = [
        f"{line}: {name}"
        for line, name in touched(ast.parse(DOOR.read_text(encoding="utf-8")))
        if name not in known and name.rsplit(".", 1)[-1] not in ends and not any(k.startswith(f"{name}.") for k in known)
    ]
    missing = [line for line in missing if "_functorch" not in line]  # an alias of the module three entries name
    assert not missing, missing


@pytest.mark.parametrize("entry", torch_compat.PRIVATE, ids=lambda entry: entry.name)
def test_it_is_there(entry: torch_compat.Private) -> None:
    assert entry.used_for and entry.seen
    try:
        looked_up(entry.name)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"PyTorch {torch.__version__} has no {entry.name}; it is used for: {entry.used_for}") from error


def test_a_name_that_is_gone_is_named() -> None:
    with pytest.raises(ImportError):
        looked_up("torch._ops.NoSuchOverload")


def test_dynamo_and_inductor_are_not_loaded_before_they_are_used() -> None:
    large = ("torch._dynamo", "torch._inductor.compile_fx")
    code = f"import sys, frpc.core.torch_compat; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_bounds_are_the_releases_that_were_seen() -> None:
    """From the oldest release seen up to, and without, the one after the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bounds,) = [line for line in project["dependencies"] if re.match(r"torch[<>=]", line)]
    low, high = re.fullmatch(r"torch>=(\d+\.\d+),<(\d+\.\d+)", bounds).groups()  # type: ignore[union-attr]
    seen = sorted(minor(version) for version in torch_compat.SEEN.split(", "))
    assert minor(low) == seen[0] and minor(high) == (seen[-1][0], seen[-1][1] + 1)
    assert minor(low) <= minor(torch.__version__) < minor(high), "these tests run on a release outside of the bounds"


def minor(version: str) -> tuple[int, int]:
    first, second = version.split(".")[:2]
    return int(first), int(second)


def test_composites_are_told_from_kernels() -> None:
    """``pad`` is composed of others, ``relu`` and ``convolution`` have kernels."""
    aten = torch.ops.aten
    for ask in (torch_compat.is_composite, torch_compat.has_composite_kernel):
        assert ask(aten.pad.default) and not ask(aten.relu.default) and not ask(aten.convolution.default)


def test_memory_in_common() -> None:
    x = torch.randn(4, 4)
    assert torch_compat.storage_of(x) == torch_compat.storage_of(x[1:].t()) != torch_compat.storage_of(x.clone())
    before = torch_compat.version_of(x)
    x.add_(1)
    assert torch_compat.version_of(x) == before + 1


def test_sizes_that_are_free() -> None:
    mode = torch_compat.FakeTensorMode(shape_env=torch_compat.shape_env())
    value = torch_compat.symbolic(mode, (3, 1), "columns", (True, False))
    assert torch_compat.fake_mode_of(value) is mode
    count, one = value.shape
    assert isinstance(count, torch.SymInt) and one == 1
    assert torch_compat.hint_of(count) == 3 and torch_compat.expression_of(count).free_symbols
