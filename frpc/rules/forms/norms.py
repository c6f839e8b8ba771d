"""Normalization, moments and softmax: the subtraction is linear, the divisor is a coefficient.

Layer, group, instance and RMS norm: ``z = gamma (a - mean(a)) / std + beta`` with ``gamma / std`` as the coefficient. A softmax
whose result is a factor of a product is a gate and its rule is not asked; here is what it does with a relevance of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.sizes import Shape
from frpc.core.torch_compat import schema_of
from frpc.core.traits import always, if_all
from frpc.errors import RuleDeclinedError
from frpc.maps import Center, Compose, LinearMap, LinearOp, Scale
from frpc.rules.forms.linear import batch_norm_affine, per_channel
from frpc.rules.forms.selection import gathered
from frpc.rules.functions.arithmetic import Number, back, from_end, refuse_batch
from frpc.rules.functions.quotients import expm1_over, over
from frpc.rules.locality import along, trailing
from frpc.rules.table import TABLE, Affine, Call, rule

aten = torch.ops.aten
Vector = Tensor | None


# Norms of layers --------------------------------------------------------------------------------------------------------


def _inverse_deviation(a: Tensor, blocks: Shape, eps: float) -> Tensor:
    """Returns ``1 / sqrt(var + eps)`` of every block, ``[*blocks[:-1], 1]``."""
    return torch.rsqrt(a.reshape(blocks).var(-1, correction=0, keepdim=True) + eps)


def _standardized(a: Tensor, blocks: Shape, scale: Tensor, weight: Vector, bias: Vector) -> Affine:
    """Builds ``(a - mean) scale weight + bias``."""
    factor = scale if weight is None else scale * weight
    return Affine({"input": Compose(Center(a.shape, blocks), Scale(factor, a.shape))}, bias)


@rule(
    aten.layer_norm.default,
    formula="gamma / std on a - mean(a), c = beta",
    source="method §2: norms",
    locality=trailing("normalized_shape"),
    spelled_out=True,
)
@rule(
    aten.native_layer_norm.default,
    formula="gamma / std on a - mean(a), c = beta",
    source="method §2: norms",
    locality=trailing("normalized_shape"),
    spelled_out=True,
    in_file="programs",
)
def layer_norm(
    call: Call, a: Tensor, shape: Sequence[int], weight: Vector = None, bias: Vector = None, eps: float = 1e-5, *rest: object
) -> Affine:
    kept = a.shape[: a.dim() - len(shape)]
    blocks = [*kept, math.prod(shape)]
    scale = _inverse_deviation(a, blocks, eps).reshape([*kept, *[1] * len(shape)])
    return _standardized(a, blocks, scale, weight, bias)


def _grouped(a: Tensor, groups: int, weight: Vector, bias: Vector, eps: float) -> Affine:
    """Builds the norm of ``[B, C, *spatial]`` over groups of channels."""
    batch, channels, rank = a.shape[0], a.shape[1], a.dim()
    blocks = [batch, groups, math.prod(a.shape[1:]) // groups]
    scale = _inverse_deviation(a, blocks, eps).expand(batch, groups, channels // groups)
    scale = scale.reshape([batch, channels, *[1] * (rank - 2)])
    weight, bias = (None if v is None else per_channel(v, rank) for v in (weight, bias))
    return _standardized(a, blocks, scale, weight, bias)


@rule(aten.group_norm.default, formula="gamma / std on a - mean(a), c = beta", source="method §2: norms", spelled_out=True)
def group_norm(
    call: Call, a: Tensor, groups: int, weight: Vector = None, bias: Vector = None, eps: float = 1e-5, *rest: object
) -> Affine:
    return _grouped(a, groups, weight, bias, eps)


@rule(
    aten.native_group_norm.default,
    formula="gamma / std on a - mean(a), c = beta",
    source="method §2: norms",
    spelled_out=True,
    in_file="programs",
)
def native_group_norm(
    call: Call, a: Tensor, weight: Vector, bias: Vector, samples: int, channels: int, cells: int, groups: int, eps: float
) -> Affine:
    return _grouped(a, groups, weight, bias, eps)


@rule(
    aten.instance_norm.default,
    formula="gamma / std on a - mean(a), c = beta; with running statistics as batch norm",
    source="method §2: norms",
    spelled_out=True,
)
def instance_norm(
    call: Call,
    a: Tensor,
    weight: Vector,
    bias: Vector,
    mean: Vector,
    variance: Vector,
    own_statistics: bool,
    momentum: float,
    eps: float,
    *rest: object,
) -> Affine:
    if own_statistics:
        return _grouped(a, a.shape[1], weight, bias, eps)
    assert mean is not None
    assert variance is not None
    scale, shift = batch_norm_affine(weight, bias, mean, variance, eps)
    return Affine({"input": Scale(per_channel(scale, a.dim()), a.shape)}, per_channel(shift, a.dim()))


@rule(
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
    formula="gamma / sqrt(mean(a^2) + eps)",
    source="method §2: norms",
    locality=trailing("normalized_shape"),
    spelled_out=True,
)
def rms_norm(call: Call, a: Tensor, shape: Sequence[int], weight: Vector = None, eps: float | None = None) -> Affine:
    smallest = torch.finfo(a.dtype).eps if eps is None else eps
    scale = torch.rsqrt((a * a).mean(list(range(-len(shape), 0)), keepdim=True) + smallest)
    return Affine({"input": Scale(scale if weight is None else scale * weight, a.shape)})


TABLE.refused[aten._native_batch_norm_legit.no_stats] = (
    "it normalizes by the statistics of the batch: the result mixes samples. Keep running statistics "
    "(track_running_stats=True), or use InstanceNorm or GroupNorm"
)


# Moments and norms of vectors -------------------------------------------------------------------------------------------


def weighed_sum(call: Call, coefficient: Tensor, dims: Sequence[int], keepdim: bool) -> LinearMap:
    """Returns ``a -> sum(coefficient * a)`` over dimensions counted from the end."""
    a = coefficient.shape
    return Compose(Scale(coefficient, a), LinearOp(lambda u: u.sum(list(dims), keepdim=keepdim), a, call.value.shape))


def _kept(value: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """Gives a reduced value its reduced dimensions back, with size 1."""
    if not keepdim:
        rank = value.dim() + len(dims)
        for dim in sorted(d + rank for d in dims):
            value = value.unsqueeze(dim)
    return value


def _deviation(a: Tensor, dims: Sequence[int], correction: Number | None) -> Tensor:
    """Returns ``(a - mean(a)) / (n - correction)``."""
    count = math.prod(a.shape[d] for d in dims)
    return (a - a.mean(list(dims), keepdim=True)) / (count - (1 if correction is None else correction))


MOMENT: dict[str, Any] = {"nonnegative": always, "locality": along("dim"), "in_file": "constants"}


@rule(aten.var.correction, formula="(a - mean(a)) / (n - correction), summed", source="method §2: norms", **MOMENT)
def var(call: Call, a: Tensor, dim: Sequence[int] | None, correction: Number | None, keepdim: bool) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    # sum (a - mean)^2 = sum (a - mean) a: deviations sum to 0.
    return Affine({"self": weighed_sum(call, _deviation(a, dims, correction), dims, keepdim)})


@rule(
    aten.std.correction,
    formula="(a - mean(a)) / ((n - correction) std), summed; 0 at std = 0",
    source="method §2: norms",
    spelled_out=True,
    **MOMENT,
)
def std(call: Call, a: Tensor, dim: Sequence[int] | None, correction: Number | None, keepdim: bool) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    coefficient = over(_deviation(a, dims, correction), _kept(call.value, dims, keepdim))
    return Affine({"self": weighed_sum(call, coefficient, dims, keepdim)})


@rule(
    aten.linalg_vector_norm.default,
    formula="sgn(a) (|a| / |a|_p)^(p-1), summed; 0 at a = 0",
    source="method §2: norms",
    gate=True,
    spelled_out=True,
    **MOMENT,
)
def vector_norm(
    call: Call, a: Tensor, order: Number = 2, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: object = None
) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    if not 1 <= order < math.inf:
        raise RuleDeclinedError(
            f"a norm of order {order} is not supported: write it with other operators, e.g. x.abs().amax(dim) for order inf"
        )
    part = over(a, _kept(call.value, dims, keepdim))  # Euler: |a|_p = sum_i a_i d|a|_p/da_i
    coefficient = part if order == 2 else part.sgn() * part.abs() ** (order - 1)
    return Affine({"self": weighed_sum(call, coefficient, dims, keepdim)})


# Softmax ----------------------------------------------------------------------------------------------------------------


def _winner(a: Tensor, dim: int) -> tuple[int, Tensor]:
    """Returns the dimension counted from the end, and where the largest element along it is."""
    along = back(dim, a.dim())
    refuse_batch(a, [along])
    return along, a.argmax(along, keepdim=True)


def _above_winner(a: Tensor, dim: int, index: Tensor) -> LinearMap:
    """Returns ``a -> a - a[winner]``."""
    return LinearOp(lambda u: u - gathered(index, dim)(u), a.shape, a.shape)


@rule(
    aten._softmax.default,
    aten._safe_softmax.default,
    formula="(e^z - 1)/(z Z) on z = a - a_max, c = 1/Z; M = c = 0 where the softmax is 0",
    source="method §2: secant through 0, from the largest element",
    gate=True,
    nonnegative=always,
    locality=along("dim"),
    in_file="constants",
)
def softmax(call: Call, a: Tensor, dim: int, *rest: object) -> Affine:
    along, winner = _winner(a, dim)
    inverse = gathered(winner, along)(call.value)  # 1/Z: the largest element's e^z is 1
    left_out = call.value == 0  # masked, or far below the largest
    z = torch.where(left_out, 0.0, a - gathered(winner, along)(a))
    secant = torch.where(left_out, 0.0, expm1_over(z) * inverse)
    m = Compose(_above_winner(a, along, winner), Scale(secant, a.shape))
    return Affine({str(schema_of(call.op).arguments[0].name): m}, torch.where(left_out, 0.0, inverse))


@rule(
    aten._log_softmax.default,
    formula="1 on a - a_max, c = -log Z",
    source="method §2: from the largest element",
    locality=along("dim"),
    in_file="constants",
)
def log_softmax(call: Call, a: Tensor, dim: int, *rest: object) -> Affine:
    along, winner = _winner(a, dim)
    return Affine({"self": _above_winner(a, along, winner)}, gathered(winner, along)(call.value))


@rule(
    aten.logsumexp.default,
    formula="1 on a_max, c = log Z",
    source="method §2: from the largest element",
    nonnegative=if_all("self"),
    locality=along("dim"),
    in_file="constants",
)
def logsumexp(call: Call, a: Tensor, dims: Sequence[int], keepdim: bool = False) -> Affine:
    if len(dims) != 1:
        raise RuleDeclinedError("it sums over several dimensions: flatten them first")
    along, winner = _winner(a, dims[0])

    def largest(u: Tensor) -> Tensor:
        picked = gathered(winner, along)(u)
        return picked if keepdim else picked.squeeze(along)

    top = largest(a)
    return Affine({"self": LinearOp(largest, a.shape, call.value.shape)}, torch.where(top == -math.inf, 0.0, call.value - top))
