"""Pooling. Average pooling is linear; max pooling selects its winners (the first on ties, as PyTorch does)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import size_hint
from frpc.core.traits import Operand, if_all
from frpc.maps import LinearPool, Pool, Select
from frpc.rules.locality_windows import windows_of_adaptive_pool, windows_of_pool
from frpc.rules.table import Affine, Call, rule

aten = torch.ops.aten


@rule(
    aten.max_pool2d_with_indices.default,
    formula="the winning element",
    source="method §2: selection",
    picks=True,
    locality=windows_of_pool,
    in_file="programs",
)
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

    lines = zip(_each(kernel, 2), _each(stride, 2) or _each(kernel, 2), _each(padding, 2), _each(dilation, 2), strict=True)
    return Affine({"self": Select(indices, a.shape, native, list(lines))})


@rule(
    aten.max_pool3d_with_indices.default,
    formula="the winning element",
    source="method §2: selection",
    picks=True,
    locality=windows_of_pool,
    in_file="programs",
)
@rule(
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    formula="the winning element",
    source="method §2: selection",
    picks=True,
    locality=windows_of_adaptive_pool,
    in_file="programs",
)
def max_pool(call: Call, a: Tensor, *arguments: object) -> Affine:
    return Affine({"self": Select(call.out[1], a.shape)})


def _each(value: Sequence[int] | int, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _average_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    divisor = arguments.get("divisor_override")
    return "self" in positive and (divisor is None or divisor > 0)


@rule(
    aten.avg_pool1d.default,
    formula="average",
    source="method §2: linear",
    linear=True,
    nonnegative=_average_sign,
    locality=windows_of_pool,
)
@rule(
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    formula="average",
    source="method §2: linear",
    linear=True,
    nonnegative=_average_sign,
    locality=windows_of_pool,
    in_file="programs",
)
def avg_pool(
    call: Call,
    a: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Affine:
    arguments = [value for name, value in call.args.items() if name != "self"]
    count = a.dim() - 2
    steps = _each(stride, count) or _each(kernel, count)
    window = list(zip(_each(kernel, count), steps, _each(padding, count), [1] * count, strict=True))

    def pool(u: Tensor) -> Tensor:
        return call.op(u, *arguments)

    return Affine({"self": LinearPool(pool, a.shape, call.value.shape, window, count_include_pad, divisor_override)})


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    formula="average",
    source="method §2: linear",
    linear=True,
    nonnegative=if_all("self"),
    locality=windows_of_adaptive_pool,
)
@rule(
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    formula="average",
    source="method §2: linear",
    linear=True,
    nonnegative=if_all("self"),
    locality=windows_of_adaptive_pool,
    in_file="programs",
)
def adaptive_avg_pool(call: Call, a: Tensor, size: Sequence[int]) -> Affine:
    def pool(u: Tensor) -> Tensor:
        return call.op(u, size)

    sizes = [(size_hint(n), size_hint(m)) for n, m in zip(a.shape[2:], call.value.shape[2:], strict=True)]
    if any(n % m for n, m in sizes):  # windows of uneven width
        return Affine({"self": Pool(pool, a.shape, call.value.shape)})
    return Affine({"self": LinearPool(pool, a.shape, call.value.shape, [(n // m, n // m, 0, 1) for n, m in sizes])})
