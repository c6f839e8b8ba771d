"""Arguments of calls as JSON: numbers and lists as they are, everything else as an object with one key that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from frpc.files.operators import DTYPES, LAYOUTS, MEMORY_FORMATS, WORDS

__all__ = ["FaultError", "Names", "integer", "read_value", "record", "sequence", "show", "strings", "text", "write_value"]

_DEEPEST = 4
_LARGEST = 2**63

_NAMED: Mapping[str, Mapping[str, Any]] = {"dtype": DTYPES, "memory_format": MEMORY_FORMATS, "layout": LAYOUTS}
_FLOATS: Mapping[str, float] = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

Names = Callable[[str, Any], Any]
"""Resolves a reference: its kind (``node`` or ``constant``), and the value it refers to."""


class FaultError(Exception):
    """What is wrong with a part of a document, in words; the reader of the file adds its name."""


def write_value(value: Any, reference: Callable[[Any], dict[str, Any] | None]) -> Any:
    """Writes an argument.

    Args:
        value: the argument.
        reference: how a reference to a tensor is written; None for anything else.

    Raises:
        FaultError: a file cannot contain it.
    """
    if (found := reference(value)) is not None:
        return found
    if value is None or isinstance(value, bool) or (type(value) is int and abs(value) <= _LARGEST):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, list | tuple):
        return [write_value(v, reference) for v in value]
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, str) and value in WORDS:
        return value
    for kind, table in _NAMED.items():
        for name, entry in table.items():
            if value is entry:
                return {kind: name}
    raise FaultError(f"an argument {show(value)} of type {type(value).__name__}")


def read_value(raw: Any, names: Names, device: torch.device, depth: int = 0) -> Any:
    """Reads an argument, lists as lists.

    Args:
        raw: parsed JSON.
        names: see :data:`Names`.
        device: the device the program is read for; it replaces the device in the file.
        depth: lists around it.

    Raises:
        FaultError: it is nothing that :func:`write_value` writes.
    """
    if raw is None or isinstance(raw, bool):
        return raw
    if isinstance(raw, int):
        return integer(raw)
    if isinstance(raw, float):
        if not math.isfinite(raw):
            raise FaultError("a number that is too large")
        return raw
    if isinstance(raw, str):
        if raw not in WORDS:
            raise FaultError(f"the word {show(raw)}, which no operator takes")
        return raw
    if isinstance(raw, list):
        if depth >= _DEEPEST:
            raise FaultError(f"lists nested more than {_DEEPEST} deep")
        return [read_value(r, names, device, depth + 1) for r in raw]
    if isinstance(raw, dict) and len(raw) == 1:
        return _read_named(*next(iter(raw.items())), names, device)
    raise FaultError(f"an argument {show(raw)}")


def _read_named(kind: str, name: Any, names: Names, device: torch.device) -> Any:
    if kind in ("node", "constant"):
        return names(kind, name)
    if not isinstance(name, str):
        raise FaultError(f"an argument {show({kind: name})}")
    if kind == "device" and name in ("cpu", "cuda"):
        return device
    table = _FLOATS if kind == "float" else _NAMED.get(kind, {})
    if name not in table:
        raise FaultError(f"an argument {show({kind: name})}")
    return table[name]


def integer(raw: Any, least: int = -_LARGEST, most: int = _LARGEST - 1) -> int:
    """Reads an integer within bounds.

    Raises:
        FaultError: it is none.
    """
    if type(raw) is not int or not least <= raw <= most:
        raise FaultError(f"{show(raw)} instead of an integer from {least} to {most}")
    return raw


def text(raw: Any, longest: int = 200) -> str:
    """Reads a text of one line, which may end up in a comment of printed code.

    Raises:
        FaultError: it is none.
    """
    if not isinstance(raw, str) or len(raw) > longest or not raw.isprintable():
        raise FaultError(f"{show(raw)} instead of one line of text of at most {longest} characters")
    return raw


def strings(raw: Any) -> tuple[str, ...]:
    """Reads a list of texts.

    Raises:
        FaultError: it is none.
    """
    return tuple(text(r) for r in sequence(raw))


def sequence(raw: Any, most: int = 100_000) -> Sequence[Any]:
    """Reads a list.

    Raises:
        FaultError: it is none, or longer than ``most``.
    """
    if not isinstance(raw, list) or len(raw) > most:
        raise FaultError(f"{show(raw)} instead of a list of at most {most} entries")
    return raw


def record(raw: Any, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Reads an object with given keys.

    Raises:
        FaultError: it is none, a key is missing, or there is another.
    """
    if not isinstance(raw, dict):
        raise FaultError(f"{show(raw)} instead of an object")
    if missing := [k for k in required if k not in raw]:
        raise FaultError(f"an object without {missing[0]!r}")
    if foreign := [k for k in raw if k not in (*required, *optional)]:
        raise FaultError(f"an object with {show(foreign[0])}, which this version does not know")
    return raw


def show(value: Any) -> str:
    """Writes a value in a message, truncated if it is long."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        written = f"a {type(value).__name__}"
    return written if len(written) <= 60 else f"{written[:57]}..."
