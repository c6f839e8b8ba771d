"""Pooling. Average pooling is linear; max pooling selects its winners (the first on ties, as PyTorch does)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.affine import Affine, Call, linear_op, rule
from frpc.maps import Select

aten = torch.ops.aten


@rule(aten.max_pool2d_with_indices.default, formula="the winning element", source="method §2: selection")
def max_pool2d(
    call: Call,
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Affine:
    indices = call.out[1]

    def native(v: Tensor) -> Tensor:
        return aten.max_pool2d_with_indices_backward(v, a, kernel, stride, padding, dilation, ceil_mode, indices)

    return Affine({"self": Select(indices, a.shape, native)})


@rule(
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    formula="the winning element",
    source="method §2: selection",
)
def max_pool(call: Call, a: Tensor, *arguments: object) -> Affine:
    return Affine({"self": Select(call.out[1], a.shape)})


for _op in (
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool3d.default,
):
    linear_op(_op, lambda call, a, *arguments: lambda u: call.op(u, *arguments), formula="average", pool=True)
