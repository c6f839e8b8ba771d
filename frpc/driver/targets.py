"""Targets and inputs as a caller gives them, checked, and turned into what a program takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frpc.capture.export import InputSpec, check_finite
from frpc.core.values import all_hold, is_traced, is_transformed, whole
from frpc.errors import DeviceError, DtypeError, EmptyBatchError, InputError, NonFiniteError, ShapeError, TargetError

__all__ = ["Target", "check_inputs", "make_seed"]

Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | np.ndarray


def check_inputs(inputs: Sequence[Tensor], specs: Sequence[InputSpec]) -> None:
    """Checks inputs against what a program was compiled for.

    Raises:
        ShapeError, DtypeError, DeviceError, EmptyBatchError, NonFiniteError: each naming the input, what it is and what fits.
    """
    if len(inputs) != len(specs):
        raise ShapeError(f"{len(inputs)} inputs given, {len(specs)} expected: {', '.join(_wanted(s) for s in specs)}.")
    batches = set()
    for x, spec in zip(inputs, specs, strict=True):
        if not isinstance(x, Tensor):
            raise InputError(f"Input {spec.name!r} is {type(x).__name__}, not a tensor.")
        if tuple(x.shape[1:]) != spec.shape or x.dim() == 0:
            raise ShapeError(f"Input {spec.name!r} has shape {list(x.shape)}; the program takes {_wanted(spec)}.")
        if x.dtype != spec.dtype:
            raise DtypeError(
                f"Input {spec.name!r} is {x.dtype}; the program takes {spec.dtype}. Convert it with .to({spec.dtype})."
            )
        if x.device != spec.device:
            raise DeviceError(f"Input {spec.name!r} is on {x.device}; the program runs on {spec.device}.")
        if x.shape[0] == 0:
            raise EmptyBatchError(f"Input {spec.name!r} has no samples (shape {list(x.shape)}).")
        if spec.batch is not None and x.shape[0] != spec.batch:
            raise ShapeError(
                f"Input {spec.name!r} has a batch of {x.shape[0]}, but this model was captured with a fixed batch of "
                f"{spec.batch} (explainer.refusals says why)."
            )
        batches.add(int(x.shape[0]))
        check_finite(x, spec.name)
    if len(batches) > 1:
        raise ShapeError(f"The inputs have different batch sizes: {sorted(batches)}.")


def _wanted(spec: InputSpec) -> str:
    batch = "B" if spec.batch is None else str(spec.batch)
    return f"{spec.name} [{', '.join([batch, *map(str, spec.shape)])}] {spec.dtype}"


def make_seed(target: Target | None, seed: Tensor | None, like: Tensor, batch: int) -> tuple[Tensor, bool]:
    """Returns the linear functional of the output that is explained, and whether it has K columns.

    Shapes: the output is ``[B, *O]``. The seed comes back ``[B, *O]``, or ``[K, B, *O]`` with columns.

    Args:
        target: an int, a tuple of ints (outputs of several dimensions), a list with one of these for each sample, ``[B]`` or
            ``[B, K]`` class indices as a tensor or array.
        seed: instead of a target, ``[B, *O]`` or ``[B, K, *O]``.
        like: a tensor with the output's dtype, device and sizes beyond the batch (the batch itself may be anything).
        batch: number of samples.

    Raises:
        TargetError: if it fits no output.
    """
    sizes = [int(s) for s in like.shape[1:]]
    if (target is None) == (seed is None) and not (target is None and sizes in ([], [1])):
        given = "neither" if target is None else "both"
        raise TargetError(
            f"Give target= or seed= ({given} given): the output is {_outline(sizes)}, and only one number of it is explained."
        )
    if seed is not None:
        return _from_seed(seed, like, sizes, batch)
    if isinstance(target, list):
        return _from_list(target, like, sizes, batch)
    if isinstance(target, np.ndarray):
        target = torch.as_tensor(target)
    if isinstance(target, Tensor):
        return _from_indices(target, like, sizes, batch)
    one = like.new_zeros([1, *sizes])
    index = _as_index(target, sizes)
    _check_index(index, sizes)
    one[(0, *index)] = 1
    return one.expand([batch, *sizes]), False


def _outline(sizes: Sequence[int]) -> str:
    return f"[{', '.join(['B', *map(str, sizes)])}]"


def _as_index(target: object, sizes: Sequence[int]) -> tuple[int, ...]:
    """Reads an int, or a tuple of ints; numpy's count too, and None stands for the only output there is."""
    if target is None:
        return (0,) * len(sizes)
    entries = target if isinstance(target, tuple) else (target,)
    try:
        if any(isinstance(i, bool) for i in entries):
            raise TypeError
        return tuple(operator.index(i) for i in entries)
    except TypeError as error:
        raise TargetError(
            f"target={target!r} is not an index: use an int, a tuple of ints, or a tensor of class indices."
        ) from error


def _check_index(index: tuple[int, ...], sizes: Sequence[int]) -> None:
    if len(index) != len(sizes):
        how = "an int" if len(sizes) == 1 else f"a tuple of {len(sizes)} ints"
        raise TargetError(f"The output is {_outline(sizes)}: give target as {how}, not {index if len(index) != 1 else index[0]}.")
    for i, size in zip(index, sizes, strict=True):
        if not 0 <= i < size:
            raise TargetError(f"Target {i} is out of range: the output {_outline(sizes)} has indices 0 to {size - 1}.")


def _from_list(targets: list[Any], like: Tensor, sizes: Sequence[int], batch: int) -> tuple[Tensor, bool]:
    """One target for each sample."""
    if len(targets) != batch:
        raise TargetError(f"target lists {len(targets)} targets for {batch} samples: give one for each sample.")
    seed = like.new_zeros([batch, *sizes])
    for sample, target in enumerate(targets):
        index = _as_index(target, sizes)
        _check_index(index, sizes)
        seed[(sample, *index)] = 1
    return seed, False


def _from_indices(target: Tensor, like: Tensor, sizes: Sequence[int], batch: int) -> tuple[Tensor, bool]:
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TargetError(f"target is {target.dtype}; give integer class indices, or use seed= for a weighted sum of outputs.")
    if len(sizes) != 1:
        raise TargetError(f"The output is {_outline(sizes)}: give target as a tuple of {len(sizes)} ints, or use seed=.")
    if target.dim() == 0:
        target = target.expand(batch)
    if target.dim() > 2 or target.shape[0] != batch or target.numel() == 0:
        raise TargetError(f"target has shape {list(target.shape)}; give [B] or [B, K] with B = {batch}.")
    if not _are_classes(target, sizes):
        low, high = int(whole(target).min()), int(whole(target).max())
        raise TargetError(
            f"Target {low if low < 0 else high} is out of range: the output {_outline(sizes)} has classes 0 to {sizes[0] - 1}."
        )
    target = target.to(device=like.device, dtype=torch.int64)
    columns = target.dim() == 2
    index = target.t().unsqueeze(-1) if columns else target.unsqueeze(-1)  # [K, B, 1] or [B, 1]
    seed = like.new_zeros([*index.shape[:-1], sizes[0]])
    if is_traced() or is_transformed(index):  # neither writes what the other has made
        return seed.scatter(-1, index, 1.0), columns
    return seed.scatter_(-1, index, 1.0), columns


_FEW = 64  # numbers that are read one by one as fast as one operator runs


def _are_classes(target: Tensor, sizes: Sequence[int]) -> bool:
    """Says whether all numbers are indices of an output of one dimension."""
    count = sizes[0]
    if not is_traced() and not is_transformed(target) and target.is_cpu and target.numel() <= _FEW:
        return all(0 <= index < count for index in target.flatten().tolist())
    message = f"A target is out of range: the output {_outline(sizes)} has classes 0 to {count - 1}."
    return all_hold((target >= 0) & (target < count), message)


def _from_seed(seed: Tensor, like: Tensor, sizes: Sequence[int], batch: int) -> tuple[Tensor, bool]:
    columns = seed.dim() == len(sizes) + 2
    fits = list(seed.shape[2 if columns else 1 :]) == list(sizes) and seed.dim() > 0 and seed.shape[0] == batch
    if not fits or seed.numel() == 0:
        expected = f"{[batch, *sizes]} or {[batch, 'K', *sizes]}"
        raise TargetError(f"seed has shape {list(seed.shape)}; give {expected}, like the output.")
    if not all_hold(torch.isfinite(seed), "seed contains NaN or Inf."):
        raise NonFiniteError("seed contains NaN or Inf.")
    seed = seed.detach().to(device=like.device, dtype=like.dtype)
    return (seed.movedim(1, 0), True) if columns else (seed, False)
