"""A program file on disk: one safetensors file with a JSON document in its metadata and a checksum over both.

The checksum detects accidental changes. It is not a signature: whoever changes a file on purpose can compute it again,
so everything read is checked as if a stranger had written it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from frpc.errors import OutputFolderError, ProgramFileError

__all__ = ["FORMAT", "checksum", "fail", "read", "write"]

FORMAT = 1
"""Version of the format; a file of another version is an error."""

_LARGEST_HEADER = 32 * 2**20
_LARGEST_DOCUMENT = 16 * 2**20
_FORMAT, _DOCUMENT, _CHECKSUM = "frpc.format", "frpc.program", "frpc.sha256"


def fail(path: object, why: str, fix: str = "Save it again with explainer.save().") -> ProgramFileError:
    """The error for a file that cannot be taken."""
    return ProgramFileError(f"{Path(str(path)).name} is not a usable program file: {why}. {fix}")


def write(path: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a program file; whoever reads at the same time sees the old file or the new one, never a part.

    Raises:
        ProgramFileError: the document is too large for a header.
        OutputFolderError: the folder does not exist.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    if len(text) > _LARGEST_DOCUMENT:
        raise ProgramFileError(
            f"The programs take {len(text) / 2**20:.0f} MiB as text, but a file can hold {_LARGEST_DOCUMENT >> 20}: save fewer."
        )
    kept = _apart({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    metadata = {_FORMAT: str(FORMAT), _DOCUMENT: text, _CHECKSUM: _digest(text, kept)}
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputFolderError(f"{folder} is not a folder: create it first.")
    unfinished = folder / f".{path.name}.{secrets.token_hex(4)}"
    try:
        save_file(kept, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that share memory with another: safetensors does not accept them."""
    found, seen = {}, set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value
        seen.add(place)
    return found


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a program file's document and tensors.

    Raises:
        ProgramFileError: the file is missing, truncated, no safetensors file, of another version, too large in its header, or
            not what its checksum says.
    """
    if not path.is_file():
        raise fail(path, "the file does not exist" if not path.exists() else "it is not a regular file", "Check the path.")
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = _text(path, metadata)
            # A copy: not mapped to a file that may change, and where libraries like their operands to begin.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError, AttributeError) as error:
        raise fail(path, f"it cannot be read ({_short(error)})") from error
    if _digest(text, tensors) != metadata.get(_CHECKSUM):
        raise fail(path, "its contents do not match its checksum, so it was damaged or changed")
    document = _parsed(path, text)
    if not isinstance(document, dict):
        raise fail(path, "its program is not a JSON object")
    return document, tensors


def _check_size(path: Path) -> None:
    """Raises an error if the file ends in its header or the header is too large, before anything is loaded."""
    with path.open("rb") as file:
        start, length = file.read(8), path.stat().st_size
    if len(start) < 8:
        raise fail(path, f"it ends after {len(start)} bytes")
    (size,) = struct.unpack("<Q", start)
    if size > _LARGEST_HEADER:
        raise fail(path, f"it declares a header of {size} bytes, more than {_LARGEST_HEADER}")
    if 8 + size > length:
        raise fail(path, f"it ends after {length} bytes, inside its header of {size}")


def _text(path: Path, metadata: Mapping[str, str]) -> str:
    found = metadata.get(_FORMAT)
    if found != str(FORMAT):
        what = "it was not written by frpc" if found is None else f"it has format {found[:20]!r}, but this version reads {FORMAT}"
        raise fail(path, what, "Save it again with this version's explainer.save().")
    text = metadata.get(_DOCUMENT, "")
    if len(text) > _LARGEST_DOCUMENT:
        raise fail(path, f"its program has {len(text)} characters, more than {_LARGEST_DOCUMENT}")
    return text


def _parsed(path: Path, text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # a ValueError, too: a number of 5000 digits
        raise fail(path, f"its program is not valid JSON ({_short(error)})") from error


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the document and of every tensor's name, type, shape and bytes, in the order of names."""
    total = hashlib.sha256(f"{FORMAT}\n{len(text)}\n".encode())
    total.update(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"\n{name!r} {value.dtype} {list(value.shape)}\n".encode())
        total.update(_bytes(value))
    return total.hexdigest()


def checksum(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in the order of its elements."""
    return hashlib.sha256(_bytes(value.detach().cpu().contiguous())).hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.reshape(-1).view(torch.uint8).numpy()
