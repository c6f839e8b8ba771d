"""Convolution over a batch of relevance columns, with its constants and the activation's coefficient in the epilogue.

``V'[n] = (conv(V[n], K) + b share) * c[n mod B]`` (T 3.8, 4.10): ``share = 1/N`` spreads the bias over N cells, ``c`` is the
coefficient of the activation that follows, the same for all columns of a sample. An implicit matrix product: rows are positions,
columns are channels of the result, and every tap of the kernel adds one product over channels, accumulated in float32.

Shapes: V ``[K B, C, H, W]``, columns before samples; K ``[O, C/G, kh, kw]``; b ``[O]``; c ``[B, O, H', W']``; the result is
channels-last whatever the operands are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.launch import PRECISIONS, Launch, cannot_compute, cdiv, tuned

__all__ = [
    "CONFIGS",
    "EXACT_CONFIGS",
    "conv_relevance",
    "conv_relevance_reference",
    "plan_conv_relevance",
    "result_size",
    "supports",
]

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
def conv_relevance_kernel(
    v, weight, bias, coefficient, out,
    M, C, O, H, W, HO, WO, samples, share,
    v_n, v_c, v_h, v_w, w_o, w_c, w_a, w_b, c_b, c_c, c_h, c_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COEFFICIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(O, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    m = (pid // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # tiles of one position follow one another: they share its operand
    o = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = m // (HO * WO)
    ho = (m // WO) % HO
    wo = m % WO
    h0 = ho * TH - PH
    w0 = wo * TW - PW
    rows = v + n.to(tl.int64) * v_n + h0 * v_h + w0 * v_w + group * C * v_c
    columns = weight + (group * O + o) * w_o
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(C, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(KH * KW * blocks):
        tap = step // blocks
        c = (step % blocks) * BLOCK_K + k
        down = (tap // KW) * DH
        right = (tap % KW) * DW
        inside = (m < M) & (h0 + down >= 0) & (h0 + down < H) & (w0 + right >= 0) & (w0 + right < W)
        place = rows[:, None] + (down * v_h + right * v_w + c * v_c)[None, :]
        part = tl.load(place, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        at = columns[None, :] + ((tap // KW) * w_a + (tap % KW) * w_b + c * w_c)[:, None]
        kernel = tl.load(at, mask=(c < C)[:, None] & (o < O)[None, :], other=0.0)
        acc = tl.dot(part, kernel, acc, input_precision=PRECISION)
    channel = group * O + o
    inside = (m < M)[:, None] & (o < O)[None, :]
    if HAS_BIAS:
        acc += (tl.load(bias + channel, mask=o < O, other=0.0).to(tl.float32) * share)[None, :]
    if HAS_COEFFICIENT:
        at = coefficient + ((n % samples).to(tl.int64) * c_b + ho * c_h + wo * c_w)[:, None] + (channel * c_c)[None, :]
        acc *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    there = out + (n.to(tl.int64) * o_n + ho * o_h + wo * o_w)[:, None] + (channel * o_c)[None, :]
    tl.store(there, acc.to(out.dtype.element_ty), mask=inside)


_KEY = ("M", "C", "O", "KH", "KW")
_TUNED = {"tf32": tuned(conv_relevance_kernel, CONFIGS, _KEY), "tf32x3": tuned(conv_relevance_kernel, EXACT_CONFIGS, _KEY)}


def supports(v: Tensor, weight: Tensor, bias: Tensor | None, coefficient: Tensor | None, groups: int) -> str | None:
    """Says why the kernel cannot be used, or None if it accepts the operands."""
    reason = cannot_compute(v, weight, bias, coefficient, rank=(4,))
    if reason is None and groups > 1 and min(int(weight.shape[1]), int(weight.shape[0]) // groups) < _NARROW:
        reason = f"{groups} groups of {int(weight.shape[1])} channels: most of a matrix product would be padding"
    return reason


def result_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of a sliding kernel along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def plan_conv_relevance(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor | None,
    out: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    share: float,
    precision: str,
) -> Launch:
    """The launch that fills ``out``."""
    channels, outputs = int(weight.shape[1]), int(weight.shape[0]) // groups
    count, _, ho, wo = out.shape
    gate = out if coefficient is None else coefficient
    arguments: dict[str, Any] = {"v": v, "weight": weight, "bias": weight if bias is None else bias}
    arguments |= {"coefficient": gate, "out": out, "M": count * ho * wo, "C": channels, "O": outputs}
    arguments |= {"H": v.shape[2], "W": v.shape[3], "HO": ho, "WO": wo, "samples": gate.shape[0], "share": float(share)}
    arguments |= dict(zip(("v_n", "v_c", "v_h", "v_w"), v.stride(), strict=True))
    arguments |= dict(zip(("w_o", "w_c", "w_a", "w_b"), weight.stride(), strict=True))
    arguments |= dict(zip(("c_b", "c_c", "c_h", "c_w"), gate.stride(), strict=True))
    arguments |= dict(zip(("o_n", "o_c", "o_h", "o_w"), out.stride(), strict=True))
    arguments |= {"KH": weight.shape[2], "KW": weight.shape[3], "TH": stride[0], "TW": stride[1]}
    arguments |= {"PH": padding[0], "PW": padding[1], "DH": dilation[0], "DW": dilation[1]}
    arguments |= {"HAS_BIAS": bias is not None, "HAS_COEFFICIENT": coefficient is not None, "PRECISION": precision}

    def grid(meta: Any) -> tuple[int, ...]:
        return cdiv(count * ho * wo, meta["BLOCK_M"]) * cdiv(outputs, meta["BLOCK_N"]), groups

    exact = precision == "tf32x3" and v.dtype == torch.float32
    configs = EXACT_CONFIGS if exact else CONFIGS
    return Launch(conv_relevance_kernel, _TUNED["tf32x3" if exact else "tf32"], grid, arguments, configs)


@torch.library.custom_op("frpc_kernels::conv_relevance", mutates_args=())
def conv_relevance(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    share: float,
    precision: str,
) -> Tensor:
    """``(conv(V, K) + b share) * c``. One launch.

    Args:
        precision: of products in float32: ``tf32x3``, about as exact as float32, or ``tf32``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    out = _result(v, weight, stride, padding, dilation)
    if out.numel():
        plan_conv_relevance(v, weight, bias, coefficient, out, stride, padding, dilation, groups, share, precision).run()
    return out


def _result(v: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    sizes = [result_size(v.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    return torch.empty([v.shape[0], weight.shape[0], *sizes], dtype=v.dtype, device=v.device, memory_format=torch.channels_last)


@conv_relevance.register_fake
def _(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    share: float,
    precision: str,
) -> Tensor:
    return _result(v, weight, stride, padding, dilation)


def conv_relevance_reference(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficient: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    share: float,
) -> Tensor:
    """:func:`conv_relevance` in float64, tap by tap."""
    v, weight = v.double(), weight.double()
    count, (outputs, inner, kh, kw) = int(v.shape[0]), weight.shape
    ho, wo = (result_size(v.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    padded = torch.nn.functional.pad(v, [padding[1]] * 2 + [padding[0]] * 2)
    out = v.new_zeros([count, groups, outputs // groups, ho, wo])
    for a in range(kh):
        for b in range(kw):
            top, left = a * dilation[0], b * dilation[1]
            part = padded[
                :, :, top : top + (ho - 1) * stride[0] + 1 : stride[0], left : left + (wo - 1) * stride[1] + 1 : stride[1]
            ]
            kernel = weight[:, :, a, b].view(groups, -1, inner)
            out += torch.einsum("ngchw,goc->ngohw", part.unflatten(1, (groups, inner)), kernel)
    result = out.flatten(1, 2)
    if bias is not None:
        result = result + bias.double().view(1, -1, 1, 1) * share
    return result if coefficient is None else result * coefficient.double().repeat(count // int(coefficient.shape[0]), 1, 1, 1)
