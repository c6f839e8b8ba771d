"""A layer's windows in one safetensors file, written block by block: the layer need not fit into memory."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import human_bytes
from frpc.errors import MemoryLimitError
from frpc.layers.maps import LayerMaps

__all__ = ["check_disk", "write_blocks"]

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_disk(maps: LayerMaps, folder: Path) -> None:
    """Makes sure that the windows fit the disk.

    Raises:
        MemoryLimitError: they do not; says both sizes.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if maps.nbytes() > 0.9 * free:
        raise MemoryLimitError(
            f"{maps.name}: the windows of {len(maps)} neurons need {human_bytes(maps.nbytes())}, "
            f"but {existing} has {human_bytes(free)} free. Leave out --save, or choose an earlier layer or another folder."
        )


def write_blocks(maps: LayerMaps, path: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Streams ``maps.blocks()`` into a safetensors file.

    The file holds ``values`` and ``bias`` like the layer, and the windows ``local/<row>/<first column>``, each
    ``[B, C, w, Rh, Rw]``: one row of positions, or a part of one. The windows' geometry is in its metadata.

    Args:
        maps: the layer.
        path: the file.
        advance: called with the number of neurons written since the last call.
    """
    batch, channels = (int(size) for size in maps.values.shape[:2])
    sides = [grid.side for grid in maps.window]
    shapes: dict[str, list[int]] = {"values": list(maps.values.shape), "bias": list(maps.bias.shape)}
    for first, last in maps.plan.column_spans(maps.memory_limit):
        shapes |= {f"local/{i}/{first}": [batch, channels, last - first, *sides] for i in range(maps.positions[0])}
    with path.open("wb") as file:
        file.write(_header(maps, shapes))
        _put(file.write, maps.values, maps.values.dtype)
        _put(file.write, maps.bias, maps.values.dtype)
        for block in maps.blocks():
            for row in block.local.unbind(2):
                _put(file.write, row, maps.values.dtype)
            advance(block.values.numel())


def _header(maps: LayerMaps, shapes: dict[str, list[int]]) -> bytes:
    """The safetensors header: its length, then names, shapes and places as JSON."""
    size, offset, entries = maps.values.element_size(), 0, {}
    for name, shape in shapes.items():
        end = offset + size * int(torch.Size(shape).numel())
        entries[name] = {"dtype": _DTYPES[maps.values.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    grids = zip(("rows", "columns"), maps.window, strict=True)
    geometry = {f"{axis}_{key}": str(value) for axis, grid in grids for key, value in vars(grid).items()}
    cells = f"{maps.cells[0]}x{maps.cells[1]}"
    metadata = {"layer": maps.name, "bias_policy": maps.policy, "cells": cells, **geometry}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _put(write: Callable[[Any], object], tensor: Tensor, dtype: torch.dtype) -> None:
    write(tensor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
