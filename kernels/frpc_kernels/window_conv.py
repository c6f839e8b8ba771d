"""Convolution of receptive-field windows: each tap's product over channels, laid at a shifted place of the window (method 3).

``U'[o, i, j, p, q] = sum over c, a, b of K[o, c, a, b] U[c, i t + a d - p0, j t + b d - p0, p - a d s, q - b d s]`` with jump s,
stride t, padding p0, dilation d. An implicit matrix product for each cell (p, q) of the window: rows are positions, columns are
channels of the result, and only the taps whose window covers the cell are visited. No operand is gathered in memory, every cell
is written once, and no product is spent on cells that a tap does not reach.

Shapes: U ``[B, C, h, w, Rh, Rw]``; K ``[O, C/G, kh, kw]``; the result ``[B, O, h', w', Rh', Rw']`` with
``R' = R + (k - 1) d s``, channels innermost in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.launch import PRECISIONS, Launch, cannot_compute, cdiv, tuned

__all__ = ["CONFIGS", "EXACT_CONFIGS", "plan_window_conv", "supports", "window_conv", "window_conv_reference"]

_REGISTERS = 168  # else ptxas spills a few bytes to fit one more block on a processor
CONFIGS = (
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=4, maxnreg=_REGISTERS),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
)
EXACT_CONFIGS = (  # tf32x3 holds both halves of both operands in registers
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=8, num_stages=3),
)
_NARROW = 8  # channels of a group below which most of a 16-wide product would be padding


@triton.jit
def window_conv_kernel(
    u, weight, out,
    M, C, O, HI, WI, HO, WO, RH, RW, OW, cells, shift_h, shift_w, origin_h, origin_w,
    u_b, u_c, u_i, u_j, u_h, u_w, w_o, w_c, w_a, w_b, o_b, o_c, o_i, o_j, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(O, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    cell = (pid // tiles) % cells  # cells of the same positions follow one another: their operands overlap
    m = (pid // tiles // cells) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = cell // OW
    q = cell % OW
    first_a = tl.maximum(0, (p - RH + shift_h) // tl.maximum(shift_h, 1))  # of the taps with 0 <= p - a shift < RH
    last_a = tl.minimum(KH, p // tl.maximum(shift_h, 1) + 1)
    first_b = tl.maximum(0, (q - RW + shift_w) // tl.maximum(shift_w, 1))
    last_b = tl.minimum(KW, q // tl.maximum(shift_w, 1) + 1)
    if shift_h == 0:
        first_a = 0
        last_a = KH
    if shift_w == 0:
        first_b = 0
        last_b = KW
    across = tl.maximum(0, last_b - first_b)
    taps = tl.maximum(0, last_a - first_a) * across
    b = m // (HO * WO)
    i = (m // WO) % HO
    j = m % WO
    rows = u + b.to(tl.int64) * u_b + group * C * u_c
    columns = weight + (group * O + o) * w_o
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(taps * blocks):
        tap = step // blocks
        c = (step % blocks) * BLOCK_K + k
        down = first_a + tap // across
        right = first_b + tap % across
        hi = i * TH - origin_h + down * DH
        wi = j * TW - origin_w + right * DW
        inside = (m < M) & (hi >= 0) & (hi < HI) & (wi >= 0) & (wi < WI)
        seen = (p - down * shift_h) * u_h + (q - right * shift_w) * u_w
        place = (rows + hi * u_i + wi * u_j)[:, None] + (seen + c * u_c)[None, :]
        part = tl.load(place, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        at = columns[None, :] + (down * w_a + right * w_b + c * w_c)[:, None]
        kernel = tl.load(at, mask=(c < C)[:, None] & (o < O)[None, :], other=0.0)
        acc = tl.dot(part, kernel, acc, input_precision=PRECISION)
    channel = group * O + o
    there = out + (b.to(tl.int64) * o_b + i * o_i + j * o_j)[:, None] + (p * o_h + q * o_w + channel * o_c)[None, :]
    tl.store(there, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (o < O)[None, :])


_KEY = ("M", "cells", "C", "O", "KH", "KW")
_TUNED = {"tf32": tuned(window_conv_kernel, CONFIGS, _KEY), "tf32x3": tuned(window_conv_kernel, EXACT_CONFIGS, _KEY)}


def supports(u: Tensor, weight: Tensor, groups: int) -> str | None:
    """Says why the kernel cannot be used, or None if it accepts the operands."""
    reason = cannot_compute(u, weight, rank=(6,))
    if reason is None and groups > 1 and min(int(weight.shape[1]), int(weight.shape[0]) // groups) < _NARROW:
        reason = f"{groups} groups of {int(weight.shape[1])} channels: most of a matrix product would be padding"
    return reason


def plan_window_conv(
    u: Tensor,
    weight: Tensor,
    out: Tensor,
    jump: list[int],
    stride: list[int],
    origin: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Launch:
    """The launch that fills ``out``."""
    channels, outputs = int(weight.shape[1]), int(weight.shape[0]) // groups
    batch, _, ho, wo, height, width = out.shape
    positions, cells = batch * ho * wo, height * width
    arguments: dict[str, Any] = {"u": u, "weight": weight, "out": out, "M": positions, "C": channels, "O": outputs}
    arguments |= dict(zip(("HI", "WI", "RH", "RW"), u.shape[2:], strict=True))
    arguments |= {"HO": ho, "WO": wo, "OW": width, "cells": cells}
    arguments |= {f"shift_{axis}": d * s for axis, d, s in zip("hw", dilation, jump, strict=True)}
    arguments |= {"origin_h": origin[0], "origin_w": origin[1]}
    arguments |= {f"u_{axis}": step for axis, step in zip("bcijhw", u.stride(), strict=True)}
    arguments |= {f"w_{axis}": step for axis, step in zip("ocab", weight.stride(), strict=True)}
    arguments |= {f"o_{axis}": step for axis, step in zip("bcijhw", out.stride(), strict=True)}
    arguments |= {"KH": weight.shape[2], "KW": weight.shape[3], "TH": stride[0], "TW": stride[1]}
    arguments |= {"DH": dilation[0], "DW": dilation[1], "PRECISION": precision}

    def grid(meta: Any) -> tuple[int, ...]:
        return cdiv(positions, meta["BLOCK_M"]) * cells * cdiv(outputs, meta["BLOCK_N"]), groups

    exact = precision == "tf32x3" and u.dtype == torch.float32
    configs = EXACT_CONFIGS if exact else CONFIGS
    return Launch(window_conv_kernel, _TUNED["tf32x3" if exact else "tf32"], grid, arguments, configs)


@torch.library.custom_op("frpc_kernels::window_conv", mutates_args=())
def window_conv(
    u: Tensor,
    weight: Tensor,
    size: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    """The windows after a convolution. One launch.

    Args:
        size: rows and columns of the positions wanted.
        jump: input cells between neighbouring positions of the operand; 0 where all positions share one window.
        origin: tap 0 of the first position wanted lies at ``-origin`` in the operand at hand: the padding, if all of it is.
        precision: of products in float32: ``tf32x3``, about as exact as float32, or ``tf32``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    out = _result(u, weight, size, jump, dilation)
    if out.numel():
        plan_window_conv(u, weight, out, jump, stride, origin, dilation, groups, precision).run()
    return out


def _result(u: Tensor, weight: Tensor, size: list[int], jump: list[int], dilation: list[int]) -> Tensor:
    sides = [u.shape[4 + i] + (weight.shape[2 + i] - 1) * dilation[i] * jump[i] for i in (0, 1)]
    return u.new_empty([u.shape[0], *size, *sides, weight.shape[0]]).permute(0, 5, 1, 2, 3, 4)


@window_conv.register_fake
def _(
    u: Tensor,
    weight: Tensor,
    size: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    return _result(u, weight, size, jump, dilation)


def window_conv_reference(
    u: Tensor,
    weight: Tensor,
    size: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """:func:`window_conv` in float64, position by position and tap by tap."""
    u, weight = u.double(), weight.double()
    out = torch.zeros_like(_result(u, weight, size, jump, dilation))
    parts = u.unflatten(1, (groups, -1))
    for i in range(size[0]):
        for j in range(size[1]):
            for a in range(weight.shape[2]):
                for b in range(weight.shape[3]):
                    h = i * stride[0] - origin[0] + a * dilation[0]
                    w = j * stride[1] - origin[1] + b * dilation[1]
                    if not (0 <= h < u.shape[2] and 0 <= w < u.shape[3]):
                        continue
                    top, left = a * dilation[0] * jump[0], b * dilation[1] * jump[1]
                    kernel = weight[:, :, a, b].view(groups, -1, weight.shape[1])
                    product = torch.einsum("bgcpq,goc->bgopq", parts[:, :, :, h, w], kernel).flatten(1, 2)
                    out[:, :, i, j, top : top + u.shape[4], left : left + u.shape[5]] += product
    return out
