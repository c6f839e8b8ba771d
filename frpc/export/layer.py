"""All neurons of a layer as one module of tensors in, tensors out, at one size."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from frpc.assign.assignment import Assignment
from frpc.errors import OptionError
from frpc.layers.context import LayerContext, layer_context
from frpc.windows import Rows, stream
from frpc.windows.run import producers

__all__ = ["LayerAnswer"]


class LayerAnswer(nn.Module):
    """Takes the input and returns every neuron's value, its window of the input, and its constants' share.

    Windows that do not count are computed as well: which those are depends on the input, and a fixed program cannot.

    Shapes: ``values [B, C, H, W]``, ``windows [B, C, H, W, Rh, Rw]``, ``bias [B, C, H, W]``.

    Raises:
        OptionError: if windows end before the layer; says where.
    """

    def __init__(self, assignment: Assignment, name: str, layer: fx.Node) -> None:
        super().__init__()
        self.assignment, self.name, self.layer = assignment, name, layer

    def window(self, x: Tensor) -> tuple[tuple[int, int, int], ...]:
        """``(jump, offset, side)`` of windows along rows and columns: that of position i begins at ``i jump + offset``."""
        with torch.no_grad():
            context = layer_context(self.assignment, self.layer, (x,))
        grids = self._rows(context).grids
        return tuple((grid.jump, grid.offset, grid.side) for grid in grids)

    def _rows(self, context: LayerContext) -> Rows:
        if context.rows is None:
            raise OptionError(f"layer={self.name!r} cannot be exported: windows end at {context.ended}.")
        return context.rows

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            context = layer_context(self.assignment, self.layer, (x,))
            rows = self._rows(context)
            order = producers(rows)
            bands = [band for _, band in stream(rows, order, (0, rows.size[2]), (0, rows.size[1]))]
            return context.values, torch.cat(bands, 2), context.bias
