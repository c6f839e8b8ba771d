"""Receptive fields: which input rows and columns a neuron can see, as exact intervals computed before the program runs.

For every node a :class:`Field` holds, for each spatial axis of the input, the interval ``[low, high)`` of every position along
the node's own axis. How an operator widens intervals is one of its traits; of an operator that does not say, every neuron is
taken to see the whole input. All operands count, those that only scale what is carried too: a gate is read like anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment
from frpc.core.graph import bind, first_result
from frpc.core.torch_compat import OpOverload
from frpc.core.traits import Axes, Operand
from frpc.rules.carriers import operands_of
from frpc.rules.locality import cells
from frpc.rules.table import traits_of

__all__ = ["Field", "receptive_fields"]


@dataclass(frozen=True)
class Field:
    """The receptive field of a node ``[B, C, *spatial']`` in an input ``[B, C0, *spatial]``.

    Attributes:
        axes: for each spatial axis the intervals, or None where every neuron may see the whole input.
    """

    axes: Axes | None

    @property
    def local(self) -> bool:
        return self.axes is not None

    def spread(self, axis: int, size: int, dtype: torch.dtype) -> Tensor:
        """Returns the ``[positions, size]`` matrix whose row i is ``1/(high - low)`` inside ``[low, high)`` and 0 outside."""
        assert self.axes is not None
        low, high = self.axes[axis]
        places = torch.arange(size, device=low.device)
        inside = (places >= low[:, None]) & (places < high[:, None])
        return inside.to(dtype) / (high - low)[:, None].to(dtype)


WHOLE = Field(None)


def receptive_fields(assignment: Assignment) -> dict[fx.Node, Field]:
    """Returns the field of every node that depends on the source.

    With several inputs, or inputs without spatial axes, every field is the whole input.
    """
    sources = assignment.sources
    shape = sources[0].meta["val"].shape
    if len(sources) != 1 or len(shape) < 3 or not all(isinstance(n, int) for n in shape[2:]):
        return dict.fromkeys(assignment.carried, WHOLE)
    points = tuple((torch.arange(n), torch.arange(1, n + 1)) for n in shape[2:])
    fields: dict[fx.Node, Field] = {sources[0]: Field(points)}
    for node in assignment.graph_module.graph.nodes:
        if node.op == "call_function" and node not in fields:
            found = _field(node, fields)
            if found is not None:
                fields[node] = found
    return fields | {node: WHOLE for node in assignment.carried if node not in fields}


def _field(node: fx.Node, fields: Mapping[fx.Node, Field]) -> Field | None:
    """The cells that a call's result can see; None if it does not depend on the source."""
    if not isinstance(node.target, OpOverload):  # getitem: the results of one operator see the same
        given = [fields[n] for n in node.all_input_nodes if n in fields]
        return given[0] if len(given) == 1 else WHOLE if given else None
    traits = traits_of(node.target)
    known = {name: fields[n] for name, n in operands_of(node).items() if n in fields and name not in traits.ignores}
    if not known:
        return None
    value, locality = first_result(node.meta["val"]), cells if traits.pointwise else traits.locality
    seen: dict[Operand, Axes] = {name: field.axes for name, field in known.items() if field.axes is not None}
    if locality is None or len(seen) < len(known) or not isinstance(value, Tensor):
        return WHOLE
    if any(value.dim() != len(axes) + 2 for axes in seen.values()) or not _has_sizes(value.shape[2:]):
        return WHOLE
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return Field(locality(bind(node.target, args, kwargs), seen, value.shape))


def _has_sizes(shape: Sequence[Any]) -> bool:
    """Says whether all sizes are numbers: an axis that holds samples has no fixed one."""
    return all(isinstance(n, int) for n in shape)
