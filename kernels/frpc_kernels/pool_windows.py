"""Receptive-field windows through max pooling: the winner's window, moved to the place of the winning tap.

``U'[c, i, j, p, q] = U[c, h, w, p - (h - (i t - p0)) s, q - (w - (j t - p0)) s]`` where (h, w) won position (i, j); s is the
jump, t the stride, p0 the padding (method 3). One read and one write for every cell of the result.

Shapes: U ``[B, C, h, w, Rh, Rw]``; winner ``[B, C, h', w']``, as place ``h W + w`` of the whole operand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.launch import Launch, cannot_compute, per_sample, tuned

__all__ = ["CONFIGS", "plan_pool_windows", "pool_windows", "pool_windows_reference", "supports"]

CONFIGS = (  # elements a program takes
    triton.Config({"BLOCK": 256}, num_warps=4),
    triton.Config({"BLOCK": 1024}, num_warps=8),
)


@triton.jit
def pool_windows_kernel(
    u, winner, out, count, C, W, HO, WO, RH, RW, OH, OW, jump_h, jump_w, origin_h, origin_w, low_h, low_w,
    u_b, u_c, u_i, u_j, u_h, u_w, i_b, i_c, i_h, i_w, o_b, o_c, o_i, o_j, o_h, o_w,
    TH: tl.constexpr, TW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(count, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    present = at < count
    c = at % C
    q, p, j, i = (at // C) % OW, (at // C // OW) % OH, (at // C // OW // OH) % WO, at // C // OW // OH // WO
    won = tl.load(winner + b * i_b + c * i_c + i * i_h + j * i_w, mask=present, other=0).to(tl.int32)
    h, w = won // W, won % W
    cell_h = p - (h - (i * TH - origin_h)) * jump_h
    cell_w = q - (w - (j * TW - origin_w)) * jump_w
    inside = present & (cell_h >= 0) & (cell_h < RH) & (cell_w >= 0) & (cell_w < RW)
    source = u + b * u_b + c * u_c + (h - low_h) * u_i + (w - low_w) * u_j + cell_h * u_h + cell_w * u_w
    value = tl.load(source, mask=inside, other=0.0)
    tl.store(out + b * o_b + c * o_c + i * o_i + j * o_j + p * o_h + q * o_w, value, mask=present)


_WINDOWS = tuned(pool_windows_kernel, CONFIGS, ("count",))


def supports(u: Tensor) -> str | None:
    """Says why the kernel cannot be used for windows like u, or None if it can."""
    return cannot_compute(u, rank=(6,))


def plan_pool_windows(
    u: Tensor, winner: Tensor, out: Tensor, columns: int, jump: list[int], stride: list[int], origin: list[int], low: list[int]
) -> Launch:
    """The launch that fills ``out``."""
    arguments: dict[str, Any] = {"u": u, "winner": winner, "out": out, "C": u.shape[1], "W": columns}
    arguments |= {"HO": out.shape[2], "WO": out.shape[3], "RH": u.shape[4], "RW": u.shape[5]}
    arguments |= {"OH": out.shape[4], "OW": out.shape[5], "TH": stride[0], "TW": stride[1]}
    pairs = {"jump": jump, "origin": origin, "low": low}
    arguments |= {f"{name}_{axis}": value for name, both in pairs.items() for axis, value in zip("hw", both, strict=True)}
    steps = {"u bcijhw": u, "i bchw": winner, "o bcijhw": out}
    return per_sample(pool_windows_kernel, _WINDOWS, out, CONFIGS, arguments, steps)


@torch.library.custom_op("frpc_kernels::pool_windows", mutates_args=())
def pool_windows(
    u: Tensor,
    winner: Tensor,
    columns: int,
    side: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    low: list[int],
) -> Tensor:
    """The winner's window, moved to the place of the winning tap, ``[B, C, h, w, *side]``. One launch.

    Args:
        winner: of the positions at hand, ``[B, C, h, w]``, as place ``row * columns + column`` of the whole operand.
        columns: of the whole operand.
        side: of the result's windows.
        jump: input cells between neighbouring positions of the operand.
        origin: tap 0 of the first position at hand lies at ``-origin`` in the operand.
        low: the operand's position that ``u`` begins with.
    """
    out = _windows(u, winner, side)
    if out.numel():
        plan_pool_windows(u, winner, out, columns, jump, stride, origin, low).run()
    return out


def _windows(u: Tensor, winner: Tensor, side: list[int]) -> Tensor:
    batch, channels, rows, columns = winner.shape
    return u.new_empty([batch, rows, columns, *side, channels]).permute(0, 5, 1, 2, 3, 4)


@pool_windows.register_fake
def _(
    u: Tensor,
    winner: Tensor,
    columns: int,
    side: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    low: list[int],
) -> Tensor:
    return _windows(u, winner, side)


def pool_windows_reference(
    u: Tensor,
    winner: Tensor,
    columns: int,
    side: list[int],
    jump: list[int],
    stride: list[int],
    origin: list[int],
    low: list[int],
) -> Tensor:
    """:func:`pool_windows`, window by window."""
    out = torch.zeros_like(_windows(u, winner, side))
    for b, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in winner.shape)).tolist():
        h, w = divmod(int(winner[b, c, i, j]), columns)
        top, left = (h - (i * stride[0] - origin[0])) * jump[0], (w - (j * stride[1] - origin[1])) * jump[1]
        out[b, c, i, j, top : top + u.shape[4], left : left + u.shape[5]] = u[b, c, h - low[0], w - low[1]]
    return out
