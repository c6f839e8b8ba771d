"""Running a program: over several references, and under ``torch.func.vmap``, where the mapped dimension joins the batch.

Programs treat samples apart, so a call mapped over N slices is one call on N times as many samples. That is faster than mapping
every operator, and needs no batching rule for any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.capture.batch import FIRST, Batch
from frpc.core.sizes import size_hint
from frpc.core.torch_compat import is_batched
from frpc.core.values import is_traced
from frpc.optimize.lower.footprint import footprint

__all__ = ["Form", "peak_bytes", "run"]

Program = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Form:
    """Where samples lie in what a program takes and gives.

    Attributes:
        inputs: how many inputs it takes before the seed.
        columns: K leads in the seed and in relevances.
        layers: how many layers it gives relevances of, followed by their values; 0 for one about its sources.
        fixed: it takes one batch size only.
        places: where samples are in each relevance, K left out; first where nothing is said.
    """

    inputs: int
    columns: bool
    layers: int = 0
    fixed: bool = False
    places: tuple[Batch, ...] = ()

    def seed_axis(self) -> int:
        return int(self.columns)

    def unfold(self, results: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Parts the dimension of N B samples in each result, and lets N lead.

        Shapes: relevances ``[*K, ..., outer * N * B * inner, ...]``; the constants' share ``[*K, N * B]``; others
            ``[N * B, ...]``.
        """
        output, *rest = results
        relevances = rest[: self.layers or len(rest) - 1]
        places = self.places or (FIRST,) * len(relevances)
        found = [_part(output, FIRST, 0, count)]
        found += [_part(r, place, int(self.columns), count) for r, place in zip(relevances, places, strict=True)]
        others = rest[len(relevances) :]
        if self.layers:
            return (*found, *(_part(v, place, 0, count) for v, place in zip(others, places, strict=True)))
        return (*found, *(_part(share, FIRST, int(self.columns), count) for share in others))


def run(
    program: Program, inputs: Sequence[Tensor], functional: Tensor, references: Sequence[tuple[Tensor, ...]], form: Form
) -> list[Tensor]:
    """Runs a program; maps are averaged over reference inputs where there are several."""
    given = [*(x.detach() for x in inputs), functional]
    results = [_call(program, form, [*given, *others]) for others in references]
    if len(results) == 1:
        return list(results[0])
    output, *_ = results[0]
    return [output, *(sum(parts[1:], parts[0]) / len(parts) for parts in list(zip(*results, strict=True))[1:])]


def _call(program: Program, form: Form, tensors: list[Tensor]) -> Sequence[Tensor]:
    if is_traced() or not any(is_batched(t) for t in tensors):
        return program(*tensors)
    results: Sequence[Tensor] = _Mapped.apply(program, form, *tensors)
    return results


class _Mapped(torch.autograd.Function):
    """A program, with what ``torch.func.vmap`` makes of it; it has no derivative."""

    @staticmethod
    def forward(program: Program, form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(program(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, program: Program, form: Form, *tensors: Tensor) -> tuple[Any, Any]:
        count, mapped = info.batch_size, in_dims[2:]
        axes = [0] * form.inputs + [form.seed_axis()] + [None] * (len(tensors) - form.inputs - 1)
        if form.fixed:
            slices = [_call(program, form, _slice(tensors, mapped, n)) for n in range(count)]
            results = [torch.stack(parts) for parts in zip(*slices, strict=True)]
            return tuple(results), (0,) * len(results)
        folded = [_fold(t, d, a, count) for t, d, a in zip(tensors, mapped, axes, strict=True)]
        found = _call(program, form, folded)
        return form.unfold(found, count), (0,) * len(found)


def _part(result: Tensor, place: Batch, lead: int, count: int) -> Tensor:
    """``[*lead, ..., outer * N * B * inner, ...] -> [N, *lead, ..., outer * B * inner, ...]``."""
    axis = lead + place.axis
    parted = result.unflatten(axis, (place.outer, count, -1)).movedim(axis + 1, 0)
    return parted.flatten(axis + 1, axis + 2)


def _slice(tensors: Sequence[Tensor], mapped: Sequence[int | None], n: int) -> list[Tensor]:
    return [t if d is None else t.select(d, n) for t, d in zip(tensors, mapped, strict=True)]


def _fold(tensor: Tensor, mapped: int | None, axis: int | None, count: int) -> Tensor:
    """Joins the mapped dimension with the samples': ``[N, ..., B, ...] -> [..., N B, ...]``."""
    if axis is None:
        return tensor
    whole = tensor.unsqueeze(0).expand(count, *tensor.shape) if mapped is None else tensor.movedim(mapped, 0)
    return whole.movedim(0, axis).flatten(axis, axis + 1)


def peak_bytes(program: fx.GraphModule) -> int:
    """Bytes of one sample and of what is computed of it, as far as they are alive at one time; parameters do not count."""
    given = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder")]
    samples = sum(math.prod(size_hint(s) for s in x.shape[1:]) * x.element_size() for x in given)
    return footprint(program, columns=False).bytes() + samples
