"""Sizes of tensors, of which some may be symbols, and amounts of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from frpc.core.torch_compat import expression_of, hint_of

__all__ = ["Footprint", "Shape", "human_bytes", "numel", "same_size", "same_sizes", "size_hint"]

Shape = Sequence[Any]  # ints, or SymInts while a program is traced


def numel(shape: Shape) -> int:
    """Counts elements; a symbolic size (the batch) counts by its example value, without a guard."""
    return math.prod([size_hint(s) for s in shape])


def size_hint(size: Any) -> int:
    """Returns a size as a number; a symbolic one by its example value."""
    example: Any = hint_of(size) if isinstance(size, torch.SymInt) else size
    return int(example)


def same_size(a: Any, b: Any) -> bool:
    """Compares two sizes; a symbolic size equals only itself, so no guard is put on the batch."""
    one, other = (expression_of(n) if isinstance(n, torch.SymInt) else n for n in (a, b))
    return bool(one == other)


def same_sizes(a: Shape, b: Shape) -> bool:
    """Compares two shapes, size by size: see :func:`same_size`."""
    return len(a) == len(b) and all(same_size(m, n) for m, n in zip(a, b, strict=True))


def human_bytes(size: float) -> str:
    """Writes a number of bytes as ``5.1 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.1f} {unit}" if unit != "B" else f"{int(size)} B"
        size /= 1000
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Footprint:
    """Memory of a run besides the parameters and its inputs, as a function of samples and columns.

    Attributes:
        steps: bytes alive at a step of the program as ``(fixed, for each sample, for each column, for each column of each
            sample)``; of all steps, those that can be the largest.
    """

    steps: tuple[tuple[int, int, int, int], ...]

    def bytes(self, batch: int = 1, columns: int = 1) -> int:
        """The most that is alive at one time, for a batch and K columns a sample."""
        return max((f + b * batch + k * columns + bk * batch * columns for f, b, k, bk in self.steps), default=0)
