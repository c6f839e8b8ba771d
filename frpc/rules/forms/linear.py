"""Layers with weights: convolution, batch norm. ``M`` is the layer without its constants, ``c`` is its bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.maps import Conv, Scale
from frpc.rules.locality import cells
from frpc.rules.locality_windows import windows_of_convolution
from frpc.rules.table import Affine, Call, rule

aten = torch.ops.aten


def per_channel(vector: Tensor, rank: int) -> Tensor:
    """Shapes a ``[C]`` vector so that it broadcasts over ``[B, C, *spatial]``."""
    return vector.reshape([-1] + [1] * (rank - 2))


@rule(
    aten.convolution.default,
    carries="input",
    formula="K * a, c = b",
    source="T 4.10, 4.11, algorithm 1",
    linear=True,
    weighted=True,
    locality=windows_of_convolution,
    in_file="programs",
)
def convolution(
    call: Call,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Affine:
    result = call.value.shape
    m = Conv(weight, stride, padding, dilation, transposed, output_padding, groups, a.shape, result)
    return Affine({"input": m}, None if bias is None else per_channel(bias, a.dim()))


@rule(
    aten._native_batch_norm_legit_no_training.default,
    carries="input",
    formula="gamma / sqrt(var + eps) per channel, c = beta - mean gamma / sqrt(var + eps)",
    source="method §2: batch norm in evaluation",
    linear=True,
    locality=cells,
    in_file="programs",
)
def batch_norm(
    call: Call,
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> Affine:
    scale, shift = batch_norm_affine(weight, bias, mean, variance, eps)
    return Affine({"input": Scale(per_channel(scale, a.dim()), a.shape)}, per_channel(shift, a.dim()))


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the ``[C]`` scale and shift that batch norm in evaluation mode applies."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
