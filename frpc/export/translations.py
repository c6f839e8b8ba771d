"""Operators that ONNX has in a better form than PyTorch's exporter writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns how operators are written in place of the exporter's own way; needs onnxscript."""
    from onnxscript import opset18 as op

    def max_pool2d_with_indices(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        ceil_mode: bool = False,
    ) -> tuple[Any, Any]:
        """One pool, the winners counted within their own plane: ONNX counts through the whole tensor.

        The exporter's own way runs a second pool to learn where each plane begins.
        """
        pair = [list(values) * 2 if len(values) == 1 else list(values) for values in (kernel_size, stride, padding, dilation)]
        kernel, step, border, spread = pair
        values, winners = op.MaxPool(
            x, ceil_mode=int(ceil_mode), dilations=spread, kernel_shape=kernel, pads=border * 2, strides=step or kernel
        )
        plane = int(x.shape[-2]) * int(x.shape[-1])
        return values, op.Mod(winners, op.Constant(value_ints=[plane]))

    return {torch.ops.aten.max_pool2d_with_indices.default: max_pool2d_with_indices}
