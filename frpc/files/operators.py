"""The closed list of what a program file may hold: operators, words, element types, memory formats.

A file names them; nothing else in it reaches Python. Only operators of PyTorch whose traits allow it may be used; none is
looked up by a name that a file makes up. Compiled programs hold no other operators: a test compares.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from frpc.core.torch_compat import OpOverload
from frpc.core.traits import InFile
from frpc.rules.table import TABLE, traits_of

__all__ = [
    "ARITHMETIC",
    "DTYPES",
    "LAYOUTS",
    "MEMORY_FORMATS",
    "WORDS",
    "aten_operator",
    "may_hold",
    "operator_named",
    "operators",
]

ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    f"operator.{function.__name__}": function
    for function in (operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.mod)
}
"""Arithmetic on sizes, and taking one of several results."""

WORDS: frozenset[str] = frozenset({"none", "tanh", "floor", "trunc", "sum", "prod", "mean", "amax", "amin"})
"""Strings that operators take as arguments."""

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex64", "complex128"),
    )
}
"""Element types."""

MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
"""Memory formats."""

LAYOUTS: Mapping[str, torch.layout] = {"strided": torch.strided}
"""Layouts."""


_USES: Mapping[InFile, tuple[InFile, ...]] = {
    "programs": ("programs", "constants", "layout"),
    "constants": ("constants", "layout"),
    "layout": ("layout",),
}


def may_hold(name: str, use: InFile = "programs") -> bool:
    """Says whether a file may hold an operator.

    Args:
        name: namespace, name and overload, e.g. ``aten.relu.default``.
        use: ``programs`` may call it; ``constants`` may be computed by it from the weights of a model when a file is read;
            ``layout``: a file's own tensors may be laid out by it for a program.
    """
    op = TABLE.named.get(name)
    return op is not None and op.namespace == "aten" and traits_of(op).in_file in _USES[use]


def operators(use: InFile = "programs") -> frozenset[str]:
    """Returns the names of all operators that a file may hold for a use."""
    return frozenset(name for name in TABLE.named if may_hold(name, use))


def operator_named(name: str) -> OpOverload | Callable[..., Any]:
    """Returns what a file may call by a name: an operator, or arithmetic in :data:`ARITHMETIC`.

    Raises:
        KeyError: for any other name.
    """
    return ARITHMETIC[name] if name in ARITHMETIC else aten_operator(name)


def aten_operator(name: str) -> OpOverload:
    """Returns the operator of a name that a file may hold.

    Raises:
        KeyError: for any other name.
    """
    if not may_hold(name):
        raise KeyError(name)
    return TABLE.named[name]
