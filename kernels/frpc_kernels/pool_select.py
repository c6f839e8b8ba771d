"""Max pooling by its winners: values select them, relevance goes where they are.

``y[i] = x[winner(i)]`` forward (the first place on ties, NaN before all else, as PyTorch). Back, every cell of the operand adds
up what the windows it won bring: ``G'[h] = sum of G[i] over windows i with winner(i) = h``, a sum in fixed order without atomic
additions, so it is the same bits each time.

Shapes: x ``[B, C, H, W]``; y, winner ``[B, C, H', W']``, the winner as place ``h W + w``; G ``[K B, C, H', W']``, columns before
samples; bits ``[B, ceil(C / 32), H, W]`` of :mod:`frpc_kernels.gate`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.gate import unpack
from frpc_kernels.launch import Launch, cannot_compute, per_sample, tuned

__all__ = [
    "CONFIGS",
    "plan_pool_scatter",
    "plan_pool_select",
    "pool_scatter",
    "pool_scatter_reference",
    "pool_select",
    "pool_select_reference",
    "supports",
]

CONFIGS = (  # elements a program takes
    triton.Config({"BLOCK": 256}, num_warps=4),
    triton.Config({"BLOCK": 1024}, num_warps=8),
)


@triton.jit
def _split(at, D2, D3):
    """The three positions of an element counted along (D1, D2, D3), the last one fastest."""
    return at // (D2 * D3), (at // D3) % D2, at % D3


@triton.jit
def pool_select_kernel(
    x, y, winner, count, C, H, W, HO, WO,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, i_b, i_c, i_h, i_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, CHANNELS_INNERMOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(count, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    present = at < count
    if CHANNELS_INNERMOST:
        i, j, c = _split(at, WO, C)
    else:
        c, i, j = _split(at, HO, WO)
    source = x + b * x_b + c * x_c
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], -1, tl.int32)
    for a in range(KH):
        for d in range(KW):
            h = i * TH - PH + a * DH
            w = j * TW - PW + d * DW
            inside = present & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            value = tl.load(source + h * x_h + w * x_w, mask=inside, other=float("-inf")).to(tl.float32)
            wins = inside & ((place < 0) | (value > best) | ((value != value) & (best == best)))
            best = tl.where(wins, value, best)
            place = tl.where(wins, h * W + w, place)
    tl.store(y + b * y_b + c * y_c + i * y_h + j * y_w, best.to(y.dtype.element_ty), mask=present)
    tl.store(winner + b * i_b + c * i_c + i * i_h + j * i_w, place, mask=present)


@triton.jit
def pool_scatter_kernel(
    g, winner, bits, out, count, C, H, W, HO, WO, samples,
    g_n, g_c, g_h, g_w, i_b, i_c, i_h, i_w, m_b, m_c, m_h, m_w, o_n, o_c, o_h, o_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, HAS_BITS: tl.constexpr, CHANNELS_INNERMOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(count, BLOCK)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    present = at < count
    if CHANNELS_INNERMOST:
        h, w, c = _split(at, W, C)
    else:
        c, h, w = _split(at, H, W)
    b = n % samples
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for a in range(KH):
        for d in range(KW):
            top = h + PH - a * DH
            left = w + PW - d * DW
            i = top // TH
            j = left // TW
            inside = present & (top >= 0) & (top % TH == 0) & (i < HO) & (left >= 0) & (left % TW == 0) & (j < WO)
            won = tl.load(winner + b * i_b + c * i_c + i * i_h + j * i_w, mask=inside, other=-1)
            mine = inside & (won == h * W + w)
            total += tl.load(g + n * g_n + c * g_c + i * g_h + j * g_w, mask=mine, other=0.0).to(tl.float32)
    if HAS_BITS:
        packed = tl.load(bits + b * m_b + (c // 32) * m_c + h * m_h + w * m_w, mask=present, other=0)
        total = tl.where(((packed >> (c % 32)) & 1) != 0, total, 0.0)
    tl.store(out + n * o_n + c * o_c + h * o_h + w * o_w, total.to(out.dtype.element_ty), mask=present)


_SELECT = tuned(pool_select_kernel, CONFIGS, ("count", "KH", "KW"))
_SCATTER = tuned(pool_scatter_kernel, CONFIGS, ("count", "KH", "KW"))


def supports(x: Tensor) -> str | None:
    """Says why the kernels of this file cannot be used for values like x, or None if they can."""
    return cannot_compute(x, rank=(4,))


def _channels_innermost(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _geometry(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, int]:
    pairs = {"K": kernel, "T": stride, "P": padding, "D": dilation}
    return {f"{letter}{axis}": value for letter, both in pairs.items() for axis, value in zip("HW", both, strict=True)}


def plan_pool_select(
    x: Tensor, y: Tensor, winner: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Launch:
    """The launch that fills ``y`` and ``winner``."""
    arguments: dict[str, Any] = {"x": x, "y": y, "winner": winner, "C": x.shape[1], "H": x.shape[2], "W": x.shape[3]}
    arguments |= {"HO": y.shape[2], "WO": y.shape[3], **_geometry(kernel, stride, padding, dilation)}
    arguments |= {"CHANNELS_INNERMOST": _channels_innermost(x)}
    return per_sample(pool_select_kernel, _SELECT, y, CONFIGS, arguments, {"x bchw": x, "y bchw": y, "i bchw": winner})


def plan_pool_scatter(
    g: Tensor,
    winner: Tensor,
    bits: Tensor | None,
    out: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Launch:
    """The launch that fills ``out``."""
    mask = winner if bits is None else bits
    arguments: dict[str, Any] = {"g": g, "winner": winner, "bits": mask, "out": out, "C": out.shape[1]}
    arguments |= {"H": out.shape[2], "W": out.shape[3], "HO": g.shape[2], "WO": g.shape[3], "samples": winner.shape[0]}
    arguments |= _geometry(kernel, stride, padding, dilation)
    arguments |= {"HAS_BITS": bits is not None, "CHANNELS_INNERMOST": _channels_innermost(out)}
    steps = {"g nchw": g, "i bchw": winner, "m bchw": mask, "o nchw": out}
    return per_sample(pool_scatter_kernel, _SCATTER, out, CONFIGS, arguments, steps)


def _like(x: Tensor, sizes: list[Any], dtype: torch.dtype) -> Tensor:
    """New memory of these sizes, with channels innermost where those of x are."""
    if _channels_innermost(x):
        return torch.empty(sizes, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty(sizes, dtype=dtype, device=x.device)


def _pooled(size: Any, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Any:
    """Positions of a pooling window along one axis; in ceil mode none begins in the padding on the far side."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


@torch.library.custom_op("frpc_kernels::pool_select", mutates_args=())
def pool_select(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Max pooling and the place of each winner, int32. One launch."""
    y, winner = _selected(x, kernel, stride, padding, dilation, ceil_mode)
    if y.numel():
        plan_pool_select(x, y, winner, kernel, stride, padding, dilation).run()
    return y, winner


def _selected(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    sizes = [_pooled(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    shape = [x.shape[0], x.shape[1], *sizes]
    return _like(x, shape, x.dtype), _like(x, shape, torch.int32)


@pool_select.register_fake
def _(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    return _selected(x, kernel, stride, padding, dilation, ceil_mode)


@torch.library.custom_op("frpc_kernels::pool_scatter", mutates_args=())
def pool_scatter(
    g: Tensor,
    winner: Tensor,
    bits: Tensor | None,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Relevance at the winners, ``size`` being ``(H, W)``; where there are bits, nothing passes a closed one. One launch."""
    out = _like(g, [g.shape[0], g.shape[1], *size], g.dtype)
    if out.numel():
        plan_pool_scatter(g, winner, bits, out, kernel, stride, padding, dilation).run()
    return out


@pool_scatter.register_fake
def _(
    g: Tensor,
    winner: Tensor,
    bits: Tensor | None,
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return _like(g, [g.shape[0], g.shape[1], *size], g.dtype)


def pool_select_reference(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """:func:`pool_select`, window by window."""
    y, winner = _selected(x, kernel, stride, padding, dilation, ceil_mode)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            places = [
                (h, w)
                for h in (i * stride[0] - padding[0] + a * dilation[0] for a in range(kernel[0]))
                for w in (j * stride[1] - padding[1] + b * dilation[1] for b in range(kernel[1]))
                if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
            ]
            values = torch.stack([x[:, :, h, w] for h, w in places])
            first = torch.where(values.isnan().any(0), values.isnan().int().argmax(0), values.nan_to_num(-torch.inf).argmax(0))
            y[:, :, i, j] = values.gather(0, first[None])[0]
            winner[:, :, i, j] = torch.tensor([h * x.shape[3] + w for h, w in places], device=x.device)[first].int()
    return y, winner


def pool_scatter_reference(g: Tensor, winner: Tensor, bits: Tensor | None, size: list[int]) -> Tensor:
    """:func:`pool_scatter` in float64."""
    repeats = int(g.shape[0]) // int(winner.shape[0])
    places = winner.long().repeat(repeats, 1, 1, 1).flatten(2)
    out = g.new_zeros([*g.shape[:2], size[0] * size[1]], dtype=torch.float64)
    out = out.scatter_add(2, places, g.double().flatten(2)).unflatten(2, size)
    return out if bits is None else torch.where(unpack(bits, g.shape[1]).repeat(repeats, 1, 1, 1), out, 0.0)
