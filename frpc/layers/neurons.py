"""A few neurons of a layer, answered by transposed windows: one evaluation, then each neuron's cone alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.emit.plan import total_cost
from frpc.layers.context import LayerContext
from frpc.windows.patches import cone_flops, pull_patch

__all__ = ["cones_are_cheaper", "neuron_maps"]

Index = tuple[int, ...]


def cones_are_cheaper(context: LayerContext, indices: Sequence[Index]) -> bool:
    """Says whether pulling the cones of these neurons costs less than whole transposed passes.

    Cones need the layer's values and bias field first, two forward passes; a compiled program needs one, and then a whole
    pass for every neuron.
    """
    if context.rows is None:
        return False
    whole = total_cost(context.assignment, context.nodes).flops
    cones = sum(cone_flops(context.rows, *_place(index)[1:]) for index in indices)
    return 2.0 * whole + cones < (1 + len(indices)) * whole


def _place(index: Index) -> tuple[int, int, int]:
    """``(c, i, j)`` of an index; one spatial axis counts as columns."""
    return (index[0], 0, index[1]) if len(index) == 2 else (index[0], index[1], index[2])


def neuron_maps(context: LayerContext, indices: Sequence[Index]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the values, local maps and biases of neurons.

    Shapes: values ``[B, K]``, maps ``[B, K, C0, *spatial]`` like the input, biases ``[B, K]``.
    """
    assert context.rows is not None, "asked only where windows exist"
    x = context.x
    out = x.new_zeros([x.shape[0], len(indices), *x.shape[1:]])
    canvas = out if x.dim() == 4 else out.unsqueeze(-2)
    at: dict[tuple[int, int], list[int]] = {}
    for k, index in enumerate(indices):
        at.setdefault(_place(index)[1:], []).append(k)
    with torch.no_grad():
        for (i, j), members in at.items():  # neurons at one position share their cone
            seeds = x.new_zeros([len(members), context.rows.size[0]])
            seeds[torch.arange(len(members)), torch.tensor([indices[k][0] for k in members])] = 1
            patch = pull_patch(context.rows, seeds, i, j)
            h, w = patch.relevance.shape[-2:]
            canvas[:, members, :, patch.row : patch.row + h, patch.column : patch.column + w] = patch.relevance.movedim(0, 1)
    picked: list[Any] = [(slice(None), *index) for index in indices]
    values = torch.stack([context.values[p] for p in picked], 1)
    return values, out, torch.stack([context.bias[p] for p in picked], 1)
