"""Transposed convolution of relevance with what follows it in the same pass: the gate of the activation below, or the input.

``G'[n] = (conv_transposed(G[n], K) + D[n]) * [bit] * f[n mod B]``: a step of the transposed pass from layer to layer adds what
comes down a residual connection, reads the ReLU's bits (:mod:`frpc_kernels.gate`), and multiplies by a coefficient; the last one
multiplies by the input ``f = x``. Positions of one residue modulo the stride meet
the same taps, so they share a program and no product is spent on taps that fall between positions.

Shapes: G ``[K B, O, H', W']``, columns before samples; K ``[O, C/G, kh, kw]``; bits ``[B, ceil(C / 32), H, W]``; f
``[B, C, H, W]``; D ``[K B, C, H, W]``; the result, of the same size, is channels-last whatever the operands are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.gate import unpack
from frpc_kernels.launch import PRECISIONS, Launch, cannot_compute, cdiv, tuned

__all__ = [
    "CONFIGS",
    "EXACT_CONFIGS",
    "HALF_CONFIGS",
    "conv_transposed_gate",
    "conv_transposed_gate_reference",
    "plan_conv_transposed_gate",
    "supports",
]

_REGISTERS = 168  # else ptxas spills a few bytes to fit one more block on a processor
_MOST = 248
CONFIGS = (
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32}, num_warps=4, num_stages=3),  # down to three colours
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=4, maxnreg=_REGISTERS),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=3, maxnreg=_MOST),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3, maxnreg=_MOST),
)
HALF_CONFIGS = (  # operands of two bytes leave registers for a larger tile beside everything the epilogue reads
    *CONFIGS[:-1],
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3, maxnreg=_MOST),
)
EXACT_CONFIGS = (  # tf32x3 holds both halves of both operands in registers
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 16}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}, num_warps=8, num_stages=3),
)
_NARROW = 8  # channels of a group below which most of a 16-wide product would be padding


@triton.jit
def _first_tap(phase, K: tl.constexpr, T: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """The first tap a that positions of this residue meet: ``(phase + P - a D) % T == 0``; K where there is none."""
    found = K + phase * 0
    for a in tl.static_range(K):
        found = tl.where(((phase + P - (K - 1 - a) * D) % T) == 0, K - 1 - a, found)
    return found


@triton.jit
def conv_transposed_gate_kernel(
    g, weight, addend, bits, factor, out,
    M, C, O, H, W, HI, WI, HP, WP, samples,
    g_n, g_c, g_h, g_w, w_o, w_c, w_a, w_b, d_n, d_c, d_h, d_w, m_b, m_c, m_h, m_w, f_b, f_c, f_h, f_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    HAS_ADDEND: tl.constexpr, HAS_BITS: tl.constexpr, HAS_FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0)
    phase_h = tl.program_id(1) // TW
    phase_w = tl.program_id(1) % TW
    group = tl.program_id(2)
    m = (pid // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = m // (HP * WP)
    h = ((m // WP) % HP) * TH + phase_h
    w = (m % WP) * TW + phase_w
    present = (m < M) & (h < H) & (w < W)
    first_a = _first_tap(phase_h, KH, TH, PH, DH)
    first_b = _first_tap(phase_w, KW, TW, PW, DW)
    across = (KW - first_b + STEP_W - 1) // STEP_W
    taps = ((KH - first_a + STEP_H - 1) // STEP_H) * across
    rows = g + n.to(tl.int64) * g_n + group * O * g_c
    columns = weight + group * O * w_o + c * w_c
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(O, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(taps * blocks):
        tap = step // blocks
        o = (step % blocks) * BLOCK_K + k
        a = first_a + (tap // across) * STEP_H
        b = first_b + (tap % across) * STEP_W
        hi = (h + PH - a * DH) // TH  # exact, or outside
        wi = (w + PW - b * DW) // TW
        inside = present & (h + PH >= a * DH) & (hi < HI) & (w + PW >= b * DW) & (wi < WI)
        place = (rows + hi * g_h + wi * g_w)[:, None] + (o * g_c)[None, :]
        part = tl.load(place, mask=inside[:, None] & (o < O)[None, :], other=0.0)
        at = columns[None, :] + (a * w_a + b * w_b + o * w_o)[:, None]
        kernel = tl.load(at, mask=(o < O)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(part, kernel, acc, input_precision=PRECISION)
    channel = group * C + c
    inside = present[:, None] & (c < C)[None, :]
    b64 = (n % samples).to(tl.int64)
    if HAS_ADDEND:
        at = addend + (n.to(tl.int64) * d_n + h * d_h + w * d_w)[:, None] + (channel * d_c)[None, :]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BITS:
        at = bits + (b64 * m_b + h * m_h + w * m_w)[:, None] + ((channel // 32) * m_c)[None, :]
        packed = tl.load(at, mask=inside, other=0)
        acc = tl.where(((packed >> (channel % 32)[None, :]) & 1) != 0, acc, 0.0)
    if HAS_FACTOR:
        at = factor + (b64 * f_b + h * f_h + w * f_w)[:, None] + (channel * f_c)[None, :]
        acc *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    there = out + (n.to(tl.int64) * o_n + h * o_h + w * o_w)[:, None] + (channel * o_c)[None, :]
    tl.store(there, acc.to(out.dtype.element_ty), mask=inside)


_KEY = ("M", "C", "O", "KH", "KW", "TH", "TW")
_TABLES = {"half": HALF_CONFIGS, "tf32": CONFIGS, "tf32x3": EXACT_CONFIGS}
_TUNED = {name: tuned(conv_transposed_gate_kernel, configs, _KEY) for name, configs in _TABLES.items()}


def supports(g: Tensor, weight: Tensor, addend: Tensor | None, factor: Tensor | None, groups: int) -> str | None:
    """Says why the kernel cannot be used, or None if it accepts the operands."""
    reason = cannot_compute(g, weight, addend, factor, rank=(4,))
    if reason is None and groups > 1 and min(int(weight.shape[1]), int(weight.shape[0]) // groups) < _NARROW:
        reason = f"{groups} groups of {int(weight.shape[1])} channels: most of a matrix product would be padding"
    return reason


def plan_conv_transposed_gate(
    g: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    bits: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Launch:
    """The launch that fills ``out``."""
    outputs, channels = int(weight.shape[0]) // groups, int(weight.shape[1])
    count, _, height, width = out.shape
    hp, wp = cdiv(height, stride[0]), cdiv(width, stride[1])
    mask = torch.empty([1, 1, 1, 1], dtype=torch.int32, device=g.device) if bits is None else bits
    times = g if factor is None else factor
    more = g if addend is None else addend
    samples = {int(x.shape[0]) for x in (bits, factor) if x is not None}
    if len(samples) > 1:
        raise ValueError(
            f"bits and factor are of {' and '.join(map(str, sorted(samples)))} samples; both belong to the same ones"
        )
    arguments: dict[str, Any] = {"g": g, "weight": weight, "addend": more, "bits": mask, "factor": times, "out": out}
    arguments |= {"M": count * hp * wp, "C": channels, "O": outputs, "H": height, "W": width}
    arguments |= {"HI": g.shape[2], "WI": g.shape[3], "HP": hp, "WP": wp, "samples": samples.pop() if samples else count}
    arguments |= dict(zip(("g_n", "g_c", "g_h", "g_w"), g.stride(), strict=True))
    arguments |= dict(zip(("w_o", "w_c", "w_a", "w_b"), weight.stride(), strict=True))
    arguments |= dict(zip(("d_n", "d_c", "d_h", "d_w"), more.stride(), strict=True))
    arguments |= dict(zip(("m_b", "m_c", "m_h", "m_w"), mask.stride(), strict=True))
    arguments |= dict(zip(("f_b", "f_c", "f_h", "f_w"), times.stride(), strict=True))
    arguments |= dict(zip(("o_n", "o_c", "o_h", "o_w"), out.stride(), strict=True))
    arguments |= {"KH": weight.shape[2], "KW": weight.shape[3], "TH": stride[0], "TW": stride[1]}
    arguments |= {"PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1]}
    arguments |= {f"STEP_{axis}": t // math.gcd(t, d) for axis, t, d in zip("HW", stride, dilation, strict=True)}
    arguments |= {
        "HAS_ADDEND": addend is not None,
        "HAS_BITS": bits is not None,
        "HAS_FACTOR": factor is not None,
        "PRECISION": precision,
    }

    def grid(meta: Any) -> tuple[int, ...]:
        return cdiv(count * hp * wp, meta["BLOCK_M"]) * cdiv(channels, meta["BLOCK_N"]), stride[0] * stride[1], groups

    table = precision if g.dtype == torch.float32 else "half"
    return Launch(conv_transposed_gate_kernel, _TUNED[table], grid, arguments, _TABLES[table])


@torch.library.custom_op("frpc_kernels::conv_transposed_gate", mutates_args=())
def conv_transposed_gate(
    g: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    bits: Tensor | None,
    factor: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    """``(conv_transposed(G, K) + D) * [bit] * f``. One launch.

    Args:
        precision: of products in float32: ``tf32x3``, about as exact as float32, or ``tf32``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    out = _result(g, weight, stride, padding, output_padding, dilation, groups)
    if out.numel():
        plan_conv_transposed_gate(g, weight, addend, bits, factor, out, stride, padding, dilation, groups, precision).run()
    return out


def _result(
    g: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sizes = [
        (g.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + output_padding[i] + 1
        for i in (0, 1)
    ]
    shape = [g.shape[0], weight.shape[1] * groups, *sizes]
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)


@conv_transposed_gate.register_fake
def _(
    g: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    bits: Tensor | None,
    factor: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str,
) -> Tensor:
    return _result(g, weight, stride, padding, output_padding, dilation, groups)


def conv_transposed_gate_reference(
    g: Tensor,
    weight: Tensor,
    addend: Tensor | None,
    bits: Tensor | None,
    factor: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """:func:`conv_transposed_gate` in float64, tap by tap: each adds its product at the places it reaches."""
    g, weight = g.double(), weight.double()
    shape = _result(g, weight, stride, padding, output_padding, dilation, groups).shape
    count, channels, height, width = shape
    frame = g.new_zeros([count, channels, height + 2 * padding[0], width + 2 * padding[1]])
    for a in range(weight.shape[2]):
        for b in range(weight.shape[3]):
            kernel = weight[:, :, a, b].view(groups, -1, channels // groups)
            part = torch.einsum("ngohw,goc->ngchw", g.unflatten(1, (groups, -1)), kernel).flatten(1, 2)
            for i in range(g.shape[2]):
                row = i * stride[0] + a * dilation[0]
                left = b * dilation[1]
                if row < frame.shape[2]:
                    places = frame[:, :, row, left : left + (g.shape[3] - 1) * stride[1] + 1 : stride[1]]
                    places += part[:, :, i, : places.shape[-1]]
    out = frame[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    out = out if addend is None else out + addend.double()
    if bits is not None:
        out = torch.where(unpack(bits, channels).repeat(count // int(bits.shape[0]), 1, 1, 1), out, 0.0)
    return out if factor is None else out * factor.double().repeat(count // int(factor.shape[0]), 1, 1, 1)
