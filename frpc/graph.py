"""What the compiler keeps on graph nodes beside torch.fx's own fields, and how it moves when nodes are replaced.

``node.meta["origin"]``  an :class:`Origin`: where the user wrote this operator;
``node.meta["layers"]``  module paths whose output this node is;
``node.meta["val"]``     the example value, a fake tensor;
``node.meta["samples"]`` where its samples lie, as a trial run found it (:mod:`frpc.samples`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import fx

from frpc.torch_compat import expression_of

__all__ = [
    "NOWHERE",
    "Origin",
    "describe",
    "empty_like",
    "fetch",
    "first_result",
    "free_name",
    "hold",
    "origin_of",
    "replace",
    "replace_items",
    "set_layers",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module: path of the innermost module, e.g. ``layer1.0.conv1``.
        modules: paths of all modules around the call, outermost first.
        file, line, source: the user's line.
    """

    module: str
    modules: tuple[str, ...]
    file: str
    line: int
    source: str

    @property
    def where(self) -> str:
        """``file.py:12``, without folders: those belong to the machine."""
        return f"{PurePath(self.file).name}:{self.line}" if self.file else "?"


NOWHERE = Origin("", (), "", 0, "")


def origin_of(node: fx.Node) -> Origin:
    """Returns where the node was written; nodes the compiler made have no place of their own."""
    found = node.meta.get("origin", NOWHERE)
    assert isinstance(found, Origin)
    return found


def set_layers(graph: fx.Graph, known: Collection[str]) -> None:
    """Notes on each node the modules whose output it is: the last node computed inside them.

    Args:
        graph: a captured graph.
        known: the model's module paths; a second call of a module is captured as ``path@1``.
    """
    last: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for path in origin_of(node).modules:
            if path.partition("@")[0] in known:
                last[path] = node
    for path, node in last.items():
        node.meta["layers"] = (*node.meta.get("layers", ()), path)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Lets ``new`` stand for ``old``: users, layer names and origin follow, and ``old`` is erased."""
    new.meta["layers"] = (*new.meta.get("layers", ()), *old.meta.get("layers", ()))
    new.meta.setdefault("origin", origin_of(old))
    new.meta.setdefault("val", old.meta.get("val"))
    if "samples" in old.meta:
        new.meta.setdefault("samples", old.meta["samples"])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def replace_items(old: fx.Node, results: Sequence[fx.Node]) -> None:
    """Lets nodes stand for the items of a call with several results."""
    for user in list(old.users):
        assert user.target is operator.getitem, "an operator with several results is read item by item"
        position: Any = user.args[1]
        replace(user, results[position])
    old.graph.erase_node(old)


def free_name(module: torch.nn.Module, name: str) -> str:
    """Returns a name that nothing in a module has, as near to one as can be."""
    free = name.replace(".", "_")
    while hasattr(module, free):
        free += "_"
    return free


def hold(module: torch.nn.Module, name: str, value: torch.Tensor, persistent: bool = True) -> str:
    """Keeps a tensor in a module and returns its name there: the one given, unless another tensor has that.

    The same values in the same order of memory are kept once.
    """
    found = name.replace(".", "_")
    while hasattr(module, found):
        there = getattr(module, found)
        if isinstance(there, torch.Tensor) and _looks(there) == _looks(value) and torch.equal(there, value):
            return found
        found += "_"
    module.register_buffer(found, value, persistent)
    return found


def _looks(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, value.shape, None if value.is_mkldnn else value.stride(), value.is_mkldnn


def fetch(module: torch.nn.Module, target: str) -> Any:
    """Returns the tensor a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def first_result(value: Any) -> Any:
    """Returns a value, or the first of the values of an operator with several: the one that carries relevance."""
    return value[0] if isinstance(value, tuple | list) else value


def empty_like(example: torch.Tensor) -> torch.Tensor:
    """A real tensor without samples, of an example's other sizes."""
    return torch.empty([0, *(int(s) for s in example.shape[1:])], dtype=example.dtype, device=example.device)


def describe(value: Any) -> str:
    """Writes a value's type as ``f32[B, 64, 7, 7]``; symbolic sizes stand as ``B``."""
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(v) for v in value) + ")"
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    names = {
        torch.float32: "f32",
        torch.float64: "f64",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.int64: "i64",
        torch.bool: "b8",
    }
    sizes = ", ".join(_size(s) for s in value.shape)
    return f"{names.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"


def _size(size: Any) -> str:
    """Writes one size; the batch symbol of torch.export has a name of its own making."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    symbols = sorted(expression_of(size).free_symbols, key=str)
    names = {symbol: "B" if i == 0 else f"K{i}" for i, symbol in enumerate(symbols)}
    return str(expression_of(size).subs(names))
