"""Resizing: interpolation, sampling on a grid, windows laid out and added up. ``M`` is the operator itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import Operand, if_all
from frpc.errors import RuleDeclinedError
from frpc.maps import LinearOp
from frpc.rules.locality_windows import pixels_shuffled, pixels_unshuffled, resized
from frpc.rules.table import Affine, Call, linear_op, rule

aten = torch.ops.aten


def _itself(call: Call, a: Tensor, *arguments: object) -> Callable[[Tensor], Tensor]:
    return lambda u: call.op(u, *arguments)


NEAREST: dict[str, Any] = {"picks": True, "locality": resized("nearest")}
EXACT: dict[str, Any] = {"picks": True, "locality": resized("nearest-exact")}
LINEAR: dict[str, Any] = {"passes_gates": True, "nonnegative": if_all("input"), "locality": resized("linear")}
for _op, _traits in (
    (aten.upsample_nearest1d.vec, NEAREST),
    (aten.upsample_nearest2d.vec, NEAREST),
    (aten.upsample_nearest3d.vec, NEAREST),
    (aten._upsample_nearest_exact1d.vec, EXACT),
    (aten._upsample_nearest_exact2d.vec, EXACT),
    (aten._upsample_nearest_exact3d.vec, EXACT),
    (aten.upsample_linear1d.vec, LINEAR),
    (aten.upsample_bilinear2d.vec, LINEAR),
    (aten.upsample_trilinear3d.vec, LINEAR),
    (aten.upsample_bicubic2d.vec, {"locality": resized("cubic")}),  # overshoots: of values above 0 it makes some below
    (aten._upsample_bilinear2d_aa.vec, {"nonnegative": if_all("input")}),
    (aten.pixel_shuffle.default, {"rearranges": True, "locality": pixels_shuffled, "in_file": "constants"}),
    (aten.pixel_unshuffle.default, {"rearranges": True, "locality": pixels_unshuffled, "in_file": "constants"}),
):
    linear_op(_op, _itself, formula="a, resized", pool=True, **_traits)

for _op in (aten.im2col.default, aten.col2im.default):  # what im2col reads beside the image is 0
    linear_op(_op, _itself, formula="the operator itself", pool=True, nonnegative=if_all("self"), in_file="constants")


def _by_axis(call: Call, a: Tensor, *arguments: object) -> Callable[[Tensor], Tensor]:
    """Interpolation axis by axis, as two matrix products: the operator's own transpose fixes the batch when traced."""
    height, width = call.value.shape[-2:]
    align, factors = arguments[1], arguments[2] if isinstance(arguments[2], Sequence) else (None, None)
    rows = _resized_units(a, -2, [height, a.shape[-2]], align, factors[0], None)
    columns = _resized_units(a, -1, [a.shape[-1], width], align, None, factors[1])
    return lambda u: rows @ (u @ columns)


def _resized_units(a: Tensor, axis: int, size: Sequence[int], *options: object) -> Tensor:
    """Returns the matrix of interpolation along one axis: what the operator makes of the unit matrix as an image.

    Unit vectors as channels would be shorter, but on images one cell wide PyTorch 2.15 mistakes their memory order.
    """
    units = torch.eye(a.shape[axis], dtype=a.dtype, device=a.device)
    resized: Tensor = aten._upsample_bicubic2d_aa.default(units[None, None], size, *options)
    return resized[0, 0]


linear_op(aten._upsample_bicubic2d_aa.vec, _by_axis, formula="a, resized")


def _sampled_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """Bilinear and nearest samples lie between those of the image and 0, cubic ones may not."""
    return "input" in positive and arguments["interpolation_mode"] in (0, 1)


@rule(
    aten.grid_sampler_2d.default,
    aten.grid_sampler_3d.default,
    carries=("input", "grid"),
    formula="a, interpolated at the grid's points; a carried grid is a coefficient",
    source="method §2: linear",
    linear=True,
    nonnegative=_sampled_sign,
    in_file="programs",
)
def grid_sampler(call: Call, a: Tensor, grid: Tensor, *options: object) -> Affine:
    if not call.carries("input"):
        raise RuleDeclinedError("only the positions at which it reads a constant come from the input")

    def sample(u: Tensor) -> Tensor:  # samples have their own grids, channels do not: columns count as channels
        lead = u.shape[: u.dim() - a.dim()]
        channels = u.movedim(-a.dim(), 0).flatten(1, len(lead) + 1) if lead else u
        z = call.op(channels, grid, *options)
        return z.unflatten(1, [*lead, a.shape[1]]).movedim(0, len(lead)) if lead else z

    return Affine({"input": LinearOp(sample, a.shape, call.value.shape)})
