"""The constants of a file's programs: tensors in the file or of the user's model, and what is computed from them when it is read.

What is computed is a list of calls, each on results above it. A file with its own weights holds only calls that move elements
(a kernel flipped, or in another memory order); one that refers to the weights of a model holds how the compiler derived its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of, storage_of
from frpc.files.container import checksum
from frpc.files.operators import DTYPES, aten_operator, may_hold
from frpc.files.values import FaultError, integer, read_value, record, sequence, show, text, write_value

__all__ = ["Entry", "Ref", "called", "check_calls", "computed", "originals", "read_entries", "write_entries"]

_LARGEST_GROWTH = 64  # bytes that calls may make, for each byte they are made from
_SPARE = 2**24
_MANY = 100_000


@dataclass(frozen=True)
class Ref:
    """Another constant, as an argument."""

    name: str


@dataclass(frozen=True)
class Entry:
    """One constant.

    Attributes:
        name: its name, also that of its tensor in the file.
        dtype, shape: the required dtype and shape.
        model: its name in the model, for one that is read there.
        sha256: checksum of the model's tensor.
        op: operator that computes it.
        args, kwargs: the operator's arguments, with :class:`Ref` for tensors.
        item: which of several results.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    model: str | None = None
    sha256: str | None = None
    op: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_entries(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Writes constants as JSON."""
    return [_write_entry(entry) for entry in entries]


def _write_entry(entry: Entry) -> dict[str, Any]:
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    written: dict[str, Any] = {"name": entry.name, "dtype": dtypes[entry.dtype], "shape": list(entry.shape)}
    if entry.model is not None:
        written |= {"model": entry.model, "sha256": entry.sha256}
    if entry.op is not None:
        written |= {
            "op": entry.op,
            "args": [write_value(a, _reference) for a in entry.args],
            "kwargs": {k: write_value(v, _reference) for k, v in entry.kwargs.items()},
            "item": entry.item,
        }
    return written


def _reference(value: Any) -> dict[str, Any] | None:
    return {"constant": value.name} if isinstance(value, Ref) else None


def read_entries(raw: Any, device: torch.device, own_weights: bool) -> list[Entry]:
    """Reads constants.

    Args:
        raw: parsed JSON.
        device: the device for them.
        own_weights: the file holds its weights, and only lays them out.

    Raises:
        FaultError: something in it is none.
    """
    known: dict[str, Entry] = {}
    for part in sequence(raw, _MANY):
        entry = _read_entry(part, known, device, own_weights)
        if entry.name in known:
            raise FaultError(f"two constants named {show(entry.name)}")
        known[entry.name] = entry
    return list(known.values())


def _read_entry(raw: Any, known: Mapping[str, Entry], device: torch.device, own_weights: bool) -> Entry:
    parts = record(raw, ("name", "dtype", "shape"), ("model", "sha256", "op", "args", "kwargs", "item"))
    name = text(parts["name"])
    if not isinstance(parts["dtype"], str) or parts["dtype"] not in DTYPES:
        raise FaultError(f"constant {name} of type {show(parts['dtype'])}")
    dtype = DTYPES[parts["dtype"]]
    shape = tuple(integer(n, 0) for n in sequence(parts["shape"], 64))
    if "model" in parts:
        if own_weights:
            raise FaultError(f"constant {name} of a model, in a file with its own weights")
        return Entry(name, dtype, shape, text(parts["model"], 1000), text(parts.get("sha256", "")))
    if "op" not in parts:
        return Entry(name, dtype, shape)

    def found(kind: str, other: Any) -> Ref:
        if kind != "constant" or not isinstance(other, str) or other not in known:
            raise FaultError(f"constant {name} computed from {show(other)}, which is not a constant above it")
        return Ref(other)

    op = parts["op"]
    if not isinstance(op, str) or not _allowed(op, own_weights):
        raise FaultError(f"constant {name} computed by {show(op)}, which is not allowed for constants")
    args = tuple(read_value(a, found, device) for a in sequence(parts.get("args", [])))
    kwargs = record(parts.get("kwargs", {}), (), [a.name for a in schema_of(aten_operator(op)).arguments])
    item = parts.get("item")
    return Entry(
        name,
        dtype,
        shape,
        op=op,
        args=args,
        kwargs={k: read_value(v, found, device) for k, v in kwargs.items()},
        item=None if item is None else integer(item, 0, 100),
    )


def _allowed(op: str, own_weights: bool) -> bool:
    """Says whether an operator may compute constants: by moving elements, and from a model's tensors also by other operators."""
    return may_hold(op, "layout" if own_weights else "constants")


def check_calls(entries: Sequence[Entry]) -> None:
    """Runs the calls on tensors without memory and compares shapes and types.

    Raises:
        FaultError: a call fails, makes something else than the file says, or all make far more than they are made from.
    """
    known = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries if e.op is None}
    given, made = sum(e.bytes for e in entries if e.op is None), 0
    for entry in (e for e in entries if e.op is not None):
        if not _is_tensor_first(entry):
            raise FaultError(f"constant {entry.name} computed by {entry.op} without a tensor")
        found = _called(entry, known)
        made += _memory(found, known)
        if made > _LARGEST_GROWTH * given + _SPARE:
            raise FaultError(f"constants of {made} bytes computed from {given}")
        if (tuple(found.shape), found.dtype) != (entry.shape, entry.dtype):
            raise FaultError(
                f"constant {entry.name} computed as {list(found.shape)} {found.dtype}, not {list(entry.shape)} {entry.dtype}"
            )
        known[entry.name] = found


def _memory(found: Tensor, known: Mapping[str, Tensor]) -> int:
    """Additional bytes that a result needs: none for a view."""
    place = found.untyped_storage()
    shared = any(storage_of(found) == storage_of(value) for value in known.values())
    return 0 if shared else place.nbytes()


def _is_tensor_first(entry: Entry) -> bool:
    first = entry.args[0] if entry.args else None
    return isinstance(first, Ref) or (isinstance(first, list | tuple) and any(isinstance(f, Ref) for f in first))


def called(entry: Entry, known: Mapping[str, Tensor]) -> Any:
    """The result of one call."""
    assert entry.op is not None
    args, kwargs = _filled(entry.args, known), {k: _filled(v, known) for k, v in entry.kwargs.items()}
    result = aten_operator(entry.op)(*args, **kwargs)
    return result if entry.item is None else result[entry.item]


def _filled(value: Any, known: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Ref):
        return known[value.name]
    return [_filled(v, known) for v in value] if isinstance(value, list | tuple) else value


def _called(entry: Entry, known: Mapping[str, Tensor]) -> Tensor:
    try:
        found = called(entry, known)
    except Exception as error:  # whatever an operator makes of wrong arguments
        raise FaultError(f"constant {entry.name}: {entry.op} fails on its arguments ({type(error).__name__})") from error
    if not isinstance(found, Tensor):
        raise FaultError(f"constant {entry.name}: {entry.op} does not return a tensor")
    return found


def originals(entries: Sequence[Entry], stored: Mapping[str, Tensor], model: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Collects what nothing computes: tensors in the file, and those of a model.

    Args:
        entries: the constants.
        stored: tensors of the file.
        model: tensors by their names in the model, where the file refers to one.

    Raises:
        FaultError: a tensor is missing, too much, or has another shape, type or contents.
    """
    found = {}
    for entry in (e for e in entries if e.op is None):
        source, name = (stored, entry.name) if entry.model is None else (model or {}, entry.model)
        where = "the file" if entry.model is None else "the model"
        value = source.get(name)
        if value is None:
            raise FaultError(f"no tensor {show(name)} in {where}")
        if (tuple(value.shape), value.dtype) != (entry.shape, entry.dtype):
            raise FaultError(
                f"tensor {show(name)} of {where} is {list(value.shape)} {value.dtype}, but the programs need "
                f"{list(entry.shape)} {entry.dtype}"
            )
        if entry.model is not None and checksum(value) != entry.sha256:
            raise FaultError(f"tensor {show(name)} of the model differs from the one that was compiled")
        found[entry.name] = value.detach()
    if extra := [name for name in stored if name not in found]:
        raise FaultError(f"a tensor {show(extra[0])} that no program uses")
    return found


def computed(entries: Sequence[Entry], known: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns all constants by name; :func:`check_calls` comes first."""
    values = {name: value.to(device) for name, value in known.items()}
    with torch.no_grad():
        for entry in (e for e in entries if e.op is not None):
            values[entry.name] = _called(entry, values)
    return values
