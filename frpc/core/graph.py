"""What the compiler stores on graph nodes in addition to torch.fx's fields, and how it moves when nodes are replaced.

``node.meta["origin"]``  an :class:`Origin`: where the user wrote this operator;
``node.meta["layers"]``  names of the module outputs that this node is, see :func:`entry_names`;
``node.meta["val"]``     the example value, a fake tensor;
``node.meta["samples"]`` where its samples lie, as a trial run found it (:mod:`frpc.capture.batch`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import fx

from frpc.core.torch_compat import OpOverload, expression_of, schema_of
from frpc.errors import nearest

__all__ = [
    "NOWHERE",
    "Origin",
    "Returned",
    "bind",
    "describe",
    "empty_like",
    "entry_names",
    "fetch",
    "first_result",
    "free_name",
    "hold",
    "is_complex",
    "name_layers",
    "origin_of",
    "replace",
    "replace_items",
    "unknown_layer",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module: path of the innermost module, e.g. ``layer1.0.conv1``.
        modules: paths of all modules around the call, outermost first.
        file, line, source: the user's line.
        op: the operator that is called there, which may become several in the graph; None if it is not known.
    """

    module: str
    modules: tuple[str, ...]
    file: str
    line: int
    source: str
    op: Any = None

    @property
    def where(self) -> str:
        """``file.py:12``, without folders: those belong to the machine."""
        return f"{PurePath(self.file).name}:{self.line}" if self.file else "?"


NOWHERE = Origin("", (), "", 0, "")


def origin_of(node: fx.Node) -> Origin:
    """Returns where the node was written; nodes made by the compiler have no place."""
    found = node.meta.get("origin", NOWHERE)
    assert isinstance(found, Origin)
    return found


@dataclass(frozen=True)
class Returned:
    """What one call of a module returned.

    Attributes:
        paths: the paths that the module has in the model.
        order: the position of the call among all, counted where calls begin.
        suffixes: how each floating-point tensor of the result is reached, e.g. ``[0]``; "" where the result is that tensor.
        main: which of them the module's name means; None if several are possible.
    """

    paths: tuple[str, ...]
    order: int
    suffixes: tuple[str, ...]
    main: int | None


def entry_names(calls: Sequence[tuple[str, Returned]]) -> list[list[list[str]]]:
    """Names what modules returned: for every call, for each of its tensors, all names.

    A module's path names the tensor it returns: the only floating-point one, or the first of a tuple. Each of several is
    ``path[0]``, ``path['logits']`` as well. Of a module that is called several times, the path is the last call, and ``path@0``,
    ``path@1``, ... are the calls.

    Args:
        calls: the path of the module and what it returned, in order.
    """
    total, seen = Counter(path for path, _ in calls), Counter[str]()
    found = []
    for path, call in calls:
        position = seen[path]
        seen[path] += 1
        bases = [path] if position == total[path] - 1 else []
        bases += [f"{path}@{position}"] if total[path] > 1 else []
        names = [[base for base in bases if i == call.main] for i in range(len(call.suffixes))]
        for own, suffix in zip(names, call.suffixes, strict=True):
            own.extend(base + suffix for base in bases if suffix)
        found.append(names)
    return found


def name_layers(results: Sequence[tuple[fx.Node, str]], returned: Sequence[Returned]) -> None:
    """Notes on each node the names of the module outputs that it is; see :func:`entry_names`.

    Args:
        results: the nodes of all tensors that were returned, with the path of the module as the graph has it.
        returned: the calls they belong to, in the same order.
    """
    feed = iter(results)
    calls: list[tuple[str, Returned]] = []
    nodes: list[list[fx.Node]] = []
    for call in returned:
        own = [next(feed) for _ in call.suffixes]
        traced = {path for _, path in own} & set(call.paths)
        calls.append((traced.pop() if len(traced) == 1 else call.paths[0], call))
        nodes.append([node for node, _ in own])
    names: dict[fx.Node, list[tuple[int, str]]] = {}
    for (_, call), results_of, named in zip(calls, nodes, entry_names(calls), strict=True):
        for node, these in zip(results_of, named, strict=True):
            names.setdefault(node, []).extend((call.order, name) for name in these)
    for node, found in names.items():
        if node.op != "get_attr":  # a parameter is no result
            node.meta["layers"] = tuple(name for _, name in sorted(found, key=lambda entry: entry[0]))


def unknown_layer(name: str, known: Sequence[str]) -> str:
    """Says what a name of no layer may have meant, as the tail of an error message."""
    parts = [other for other in known if other.startswith((f"{name}[", f"{name}@"))]
    if parts:
        return f"it returns several tensors, each with a name: {', '.join(parts)}"
    return nearest(name, known)


def bind(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by schema name, with the schema's defaults filled in."""
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema_of(op).arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def replace(old: fx.Node, new: fx.Node) -> None:
    """Replaces ``old`` by ``new``: users, layer names and origin move to it, and ``old`` is erased."""
    new.meta["layers"] = (*new.meta.get("layers", ()), *old.meta.get("layers", ()))
    new.meta.setdefault("origin", origin_of(old))
    new.meta.setdefault("val", old.meta.get("val"))
    if "samples" in old.meta:
        new.meta.setdefault("samples", old.meta["samples"])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def replace_items(old: fx.Node, results: Sequence[fx.Node]) -> None:
    """Replaces the items of a call with several results by nodes."""
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


def is_complex(value: Any) -> bool:
    """Says whether a node's value, or the first of its values, is complex."""
    example = value.meta.get("val") if isinstance(value, fx.Node) else value
    example = example[0] if isinstance(example, tuple | list) and example else example
    return isinstance(example, complex) or (isinstance(example, torch.Tensor) and example.is_complex())


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
    """Writes one size; the batch symbol of torch.export has a generated name."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    symbols = sorted(expression_of(size).free_symbols, key=str)
    names = {symbol: "B" if i == 0 else f"K{i}" for i, symbol in enumerate(symbols)}
    return str(expression_of(size).subs(names))
