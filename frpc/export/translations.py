"""Operators that ONNX has in a better form than PyTorch's exporter writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns replacements for the exporter's own translations of operators; needs onnxscript."""
    from onnxscript import ir
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

        The exporter's own translation runs a second pool to find where each plane begins.
        """
        pair = [list(values) * 2 if len(values) == 1 else list(values) for values in (kernel_size, stride, padding, dilation)]
        kernel, step, border, spread = pair
        values, winners = op.MaxPool(
            x, ceil_mode=int(ceil_mode), dilations=spread, kernel_shape=kernel, pads=border * 2, strides=step or kernel
        )
        plane = int(x.shape[-2]) * int(x.shape[-1])
        return values, op.Mod(winners, op.Constant(value_ints=[plane]))

    def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
        """Bounds that are constants, which a runtime can take into the convolution before it; the exporter casts them first."""
        low, high = (op.Constant(value=ir.tensor(bound, dtype=x.dtype)) for bound in (min_val, max_val))
        return op.Clip(x, low, high)

    by_channel: dict[int, tuple[Any, Any, int]] = {}  # what was shuffled, what came of it, groups; held, so that ids stay its own

    def channel_shuffle(x: Any, groups: int) -> Any:
        channels, *spatial = (int(n) for n in x.shape[1:])
        grouped = op.Reshape(x, op.Constant(value_ints=[-1, groups, channels // groups, math.prod(spatial)]))
        turned = op.Transpose(grouped, perm=[0, 2, 1, 3])
        shuffled = op.Reshape(turned, op.Constant(value_ints=[-1, channels, *spatial]))
        by_channel[id(shuffled)] = (x, shuffled, groups)
        return shuffled

    def pixel_shuffle(x: Any, upscale_factor: int) -> Any:
        """One operator, also where neighbours lie side by side before each channel: PyTorch moves those first."""
        if len(x.shape) == 4:
            before, _, groups = by_channel.get(id(x), (x, x, 1))
            joined = groups == upscale_factor**2
            return op.DepthToSpace(before if joined else x, blocksize=upscale_factor, mode="DCR" if joined else "CRD")
        channels, height, width = (int(n) for n in x.shape[-3:])
        pictures = op.Reshape(x, op.Constant(value_ints=[-1, channels, height, width]))
        shuffled = op.DepthToSpace(pictures, blocksize=upscale_factor, mode="CRD")
        sides = [channels // upscale_factor**2, height * upscale_factor, width * upscale_factor]
        lead = op.Shape(x, start=0, end=-3)
        return op.Reshape(shuffled, op.Concat(lead, op.Constant(value_ints=sides), axis=0))

    def hypot(a: Any, b: Any) -> Any:
        """The length of a pair, by its larger side, so that no square leaves the range of the type."""
        smallest = op.Constant(value=ir.tensor(torch.finfo(torch.float32).tiny, dtype=a.dtype))
        side = op.Max(op.Abs(a), op.Abs(b), smallest)
        first, second = op.Div(a, side), op.Div(b, side)
        return op.Mul(side, op.Sqrt(op.Add(op.Mul(first, first), op.Mul(second, second))))

    aten = torch.ops.aten
    return {
        aten.hypot.default: hypot,
        aten.max_pool2d_with_indices.default: max_pool2d_with_indices,
        aten.hardtanh.default: hardtanh,
        aten.channel_shuffle.default: channel_shuffle,
        aten.pixel_shuffle.default: pixel_shuffle,
    }
