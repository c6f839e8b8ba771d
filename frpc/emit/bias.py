"""Bias policies: where the share of constants, ``sum <c, G_c>``, goes on the map.

``uniform`` (thesis eq. 3.7) spreads it evenly over all cells, ``receptive_field`` spreads each neuron's constant over the cells
that neuron can see, ``separate`` leaves it out of the map. In every policy the total per sample is returned with the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assigned
from frpc.assign.receptive import Field
from frpc.capture.batch import FIRST, Batch, spread_out
from frpc.core.graph import first_result
from frpc.emit.propagate import inner
from frpc.errors import OptionError

__all__ = ["POLICIES", "BiasPolicy", "Tally", "check_policy", "field_constants"]

BiasPolicy = Literal["uniform", "receptive_field", "separate"]
POLICIES: tuple[BiasPolicy, ...] = ("uniform", "receptive_field", "separate")


def check_policy(name: str) -> BiasPolicy:
    """Returns the policy of that name.

    Raises:
        OptionError: for any other name.
    """
    for policy in POLICIES:
        if policy == name:
            return policy
    raise OptionError(f"bias={name!r} is unknown; choose one of {', '.join(POLICIES)}.")


def field_constants(
    fields: Mapping[fx.Node, Field], shape: Sequence[int], nodes: Sequence[fx.Node], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the spreading matrices of the nodes with local fields, by name ``field_<node>_<axis>``.

    Args:
        shape: spatial sizes of the input.
        nodes: the nodes that have constants.
    """
    return {
        f"field_{node.name}_{axis}": fields[node].spread(axis, size, dtype)
        for node in nodes
        if fields[node].local
        for axis, size in enumerate(shape)
    }


class Tally:
    """Collects the constants of the nodes that a transposed pass goes through, for one run.

    Args:
        policy: where they go.
        matrices: spreading matrices from :func:`field_constants`, for ``receptive_field``.
    """

    def __init__(self, policy: BiasPolicy, matrices: Mapping[str, Tensor]) -> None:
        self.policy, self.matrices = policy, matrices
        self.everywhere: Tensor | None = None  # [*L, B], to be spread over all cells
        self.placed: Tensor | None = None  # [*L, B, *spatial], already spread

    def add(self, assigned: Assigned, v: Tensor, c: Tensor | float) -> None:
        """Takes the constant ``c`` of a node whose pulled relevance is ``v``."""
        name = f"field_{assigned.node.name}_0"
        if self.policy == "receptive_field" and name in self.matrices and assigned.batch == FIRST:
            placed = self._place(assigned, v, c)
            self.placed = placed if self.placed is None else self.placed + placed
            return
        value = assigned.node.meta["val"]
        shape = first_result(value).shape
        share = inner(v, c, shape, assigned.batch)
        self.everywhere = share if self.everywhere is None else self.everywhere + share

    def _place(self, assigned: Assigned, v: Tensor, c: Tensor | float) -> Tensor:
        value = assigned.node.meta["val"]
        spatial = first_result(value).dim() - 2
        t = (v * c).sum(-1 - spatial)  # [*L, B, *spatial']
        for axis in range(spatial):
            matrix = self.matrices[f"field_{assigned.node.name}_{axis}"]
            dim = axis - spatial
            t = (t.transpose(dim, -1) @ matrix).transpose(dim, -1)
        return t

    def total(self, like: Tensor) -> Tensor:
        """Returns the share of constants per sample and column, ``[*L, B]``; ``like`` has that shape."""
        parts = [] if self.everywhere is None else [self.everywhere]
        if self.placed is not None:
            parts.append(self.placed.flatten(like.dim()).sum(-1))
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(like)

    def on_map(self, relevance: Tensor, rank: int, batch: Batch, cells: int) -> Tensor:
        """Adds the constants to a map.

        Shapes: relevance ``[*L, *shape]``, of which the last ``rank`` dimensions are those of the source.

        Args:
            relevance: the local part.
            rank: rank of the source.
            batch: where its samples are.
            cells: number of cells that all sources together have for one sample.
        """
        if self.policy == "separate":
            return relevance
        if self.placed is not None:
            channels = relevance.shape[1 - rank]
            relevance = relevance + (self.placed / channels).unsqueeze(1 - rank)
        if self.everywhere is not None:
            relevance = relevance + spread_out(self.everywhere / cells, rank, batch)
        return relevance
