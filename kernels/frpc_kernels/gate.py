"""Activations with their coefficients in one pass.

``a = f(z)`` and ``c = (f(z) - f(0)) / z``: of a ReLU ``c`` is 0 or 1 and is kept as one bit, 32 channels to a word; of GELU it
is ``Phi(z)``, of SiLU ``sigmoid(z)``. The multiply ``V -> c V`` of a ReLU reads the bits.

Shapes: z, a ``[B, C, ...]`` of two to four dimensions; bits ``[B, ceil(C / 32), ...]`` int32, bit ``c % 32`` of word ``c // 32``
says that channel c is open. V ``[K B, C, ...]``: columns lie before samples, column n belongs to sample ``n % B``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.launch import Launch, cannot_compute, cdiv, image, strides, tuned

__all__ = [
    "ACTIVATIONS",
    "CONFIGS",
    "VALUE_CONFIGS",
    "gated",
    "gated_reference",
    "plan_gated",
    "plan_relu_gate",
    "plan_smooth_gate",
    "relu_gate",
    "relu_gate_reference",
    "smooth_gate",
    "smooth_gate_reference",
    "supports",
    "unpack",
]

CONFIGS = (  # positions a program takes, of 32 channels each
    triton.Config({"BLOCK": 32}, num_warps=4),
    triton.Config({"BLOCK": 128}, num_warps=4),
)
VALUE_CONFIGS = (  # elements a program takes
    triton.Config({"BLOCK": 1024}, num_warps=4),
    triton.Config({"BLOCK": 4096}, num_warps=8),
)
ACTIVATIONS = ("gelu", "silu")
_WORD = 32


@triton.jit
def _place(p, sh, sw, W, FLAT: tl.constexpr):
    """Offset of position p of an image: rows that follow one another without a gap need no division."""
    return p * sw if FLAT else (p // W) * sh + (p % W) * sw


@triton.jit
def relu_gate_kernel(
    z, a, bits, C, P, W, words,
    z_b, z_c, z_h, z_w, a_b, a_c, a_h, a_w, m_b, m_c, m_h, m_w,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(P, BLOCK)
    tile = pid % tiles
    word = (pid // tiles) % words
    b = (pid // tiles // words).to(tl.int64)
    p = tile * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    c = word * 32 + lane
    inside = (c < C)[:, None] & (p < P)[None, :]
    value = tl.load(z + b * z_b + c[:, None] * z_c + _place(p, z_h, z_w, W, FLAT)[None, :], mask=inside, other=0.0)
    shut = value <= 0  # not "open = value > 0": NaN passes, as through ReLU and its multiply in ATen
    zero = tl.zeros_like(value)
    there = a + b * a_b + c[:, None] * a_c + _place(p, a_h, a_w, W, FLAT)[None, :]
    tl.store(there, tl.where(shut, zero, value), mask=inside)
    one = tl.where(shut, 0, 1).to(tl.uint32) << lane.to(tl.uint32)[:, None]
    packed = tl.sum(one, axis=0).to(tl.int32, bitcast=True)
    tl.store(bits + b * m_b + word * m_c + _place(p, m_h, m_w, W, FLAT), packed, mask=p < P)


@triton.jit
def gated_kernel(
    v, bits, out, C, P, W, words, samples,
    v_n, v_c, v_h, v_w, m_b, m_c, m_h, m_w, o_n, o_c, o_h, o_w,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(P, BLOCK)
    tile = pid % tiles
    word = (pid // tiles) % words
    n = pid // tiles // words
    b = (n % samples).to(tl.int64)
    n = n.to(tl.int64)
    p = tile * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    c = word * 32 + lane
    inside = (c < C)[:, None] & (p < P)[None, :]
    packed = tl.load(bits + b * m_b + word * m_c + _place(p, m_h, m_w, W, FLAT), mask=p < P, other=0)
    is_open = ((packed[None, :] >> lane[:, None]) & 1) != 0
    value = tl.load(v + n * v_n + c[:, None] * v_c + _place(p, v_h, v_w, W, FLAT)[None, :], mask=inside & is_open, other=0.0)
    tl.store(out + n * o_n + c[:, None] * o_c + _place(p, o_h, o_w, W, FLAT)[None, :], value, mask=inside)


@triton.jit
def smooth_gate_kernel(z, a, c, count, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < count, other=0.0).to(tl.float32)
    coefficient = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) if GELU else 1.0 / (1.0 + tl.exp(-value))
    tl.store(a + at, (value * coefficient).to(a.dtype.element_ty), mask=at < count)
    tl.store(c + at, coefficient.to(c.dtype.element_ty), mask=at < count)


_RELU = tuned(relu_gate_kernel, CONFIGS, ("C", "P", "FLAT"))
_GATED = tuned(gated_kernel, CONFIGS, ("C", "P", "FLAT"))
_SMOOTH = tuned(smooth_gate_kernel, VALUE_CONFIGS, ("count", "GELU"))


def supports(z: Tensor) -> str | None:
    """Says why the kernels of this file cannot be used for values like z, or None if they can."""
    return cannot_compute(z, rank=(2, 3, 4))


def plan_relu_gate(z: Tensor, a: Tensor, bits: Tensor) -> Launch:
    """The launch that fills ``a`` and ``bits``."""
    return _plan(relu_gate_kernel, _RELU, {"z": z, "a": a, "bits": bits}, ("z", "a", "m"), {})


def plan_gated(v: Tensor, bits: Tensor, out: Tensor) -> Launch:
    """The launch that fills ``out``."""
    tensors = {"v": v, "bits": bits, "out": out}
    return _plan(gated_kernel, _GATED, tensors, ("v", "m", "o"), {"samples": int(bits.shape[0])})


def _plan(kernel: Any, tuner: Any, tensors: dict[str, Tensor], letters: tuple[str, ...], more: dict[str, int]) -> Launch:
    values = [x for x in tensors.values() if x.dtype != torch.int32]
    batch, channels, rows, columns = image(values[0])
    flat = all(strides(x)[2] == columns * strides(x)[3] for x in tensors.values()) or rows == 1
    words = cdiv(channels, _WORD)
    arguments: dict[str, Any] = {
        **tensors,
        "C": channels,
        "P": rows * columns,
        "W": columns,
        "words": words,
        **more,
        "FLAT": flat,
    }
    for letter, x in zip(letters, tensors.values(), strict=True):
        first = "n" if letter in "vo" else "b"
        for axis, step in zip((first, "c", "h", "w"), strides(x), strict=True):
            arguments[f"{letter}_{axis}"] = step

    def grid(meta: Any) -> tuple[int, ...]:
        return (batch * words * cdiv(rows * columns, meta["BLOCK"]),)

    return Launch(kernel, tuner, grid, arguments, CONFIGS)


def plan_smooth_gate(z: Tensor, a: Tensor, c: Tensor, kind: str) -> Launch:
    """The launch that fills ``a`` and ``c``; all three lie alike in memory, without gaps."""
    count = z.numel()
    arguments = {"z": z, "a": a, "c": c, "count": count, "GELU": kind == "gelu"}
    return Launch(smooth_gate_kernel, _SMOOTH, lambda meta: (cdiv(count, meta["BLOCK"]),), arguments, VALUE_CONFIGS)


def _bits_like(z: Tensor) -> Tensor:
    """Words for the bits of z, in the memory order of z."""
    order = sorted(range(z.dim()), key=lambda axis: (z.stride(axis), -axis), reverse=True)
    sizes = [z.shape[0], (z.shape[1] + _WORD - 1) // _WORD, *z.shape[2:]]
    words = torch.empty([sizes[axis] for axis in order], dtype=torch.int32, device=z.device)
    return words.permute([order.index(axis) for axis in range(z.dim())])


@torch.library.custom_op("frpc_kernels::relu_gate", mutates_args=())
def relu_gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """``a = max(z, 0)`` and the bits ``[z > 0]``. One launch."""
    a = torch.empty_like(z)
    bits = _bits_like(a)
    if z.numel():
        plan_relu_gate(z, a, bits).run()
    return a, bits


@relu_gate.register_fake
def _(z: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.empty_like(z)
    return a, _bits_like(a)


@torch.library.custom_op("frpc_kernels::gated", mutates_args=())
def gated(v: Tensor, bits: Tensor) -> Tensor:
    """``V`` where the bit is set, else 0, whatever V is there. One launch."""
    out = torch.empty_like(v)
    if v.numel():
        plan_gated(v, bits, out).run()
    return out


@gated.register_fake
def _(v: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("frpc_kernels::smooth_gate", mutates_args=())
def smooth_gate(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``a = z c`` and ``c``: ``Phi(z)`` for ``gelu``, ``sigmoid(z)`` for ``silu``. One launch.

    Raises:
        ValueError: names the activations there are.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"there is no kernel for the activation {kind!r}; there are {', '.join(ACTIVATIONS)}")
    a, c = torch.empty_like(z), torch.empty_like(z)
    if z.numel():
        dense = z if z.stride() == a.stride() else a.copy_(z)  # the copy is read before its place is written
        plan_smooth_gate(dense, a, c, kind).run()
    return a, c


@smooth_gate.register_fake
def _(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z)


def relu_gate_reference(z: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`relu_gate`, channel by channel."""
    is_open = ~(z <= 0)
    bits = torch.zeros([z.shape[0], cdiv(z.shape[1], _WORD), *z.shape[2:]], dtype=torch.int64, device=z.device)
    for channel in range(z.shape[1]):
        bits[:, channel // _WORD] |= is_open[:, channel].long() << (channel % _WORD)
    return torch.where(is_open, z, 0.0), torch.where(bits >= 2**31, bits - 2**32, bits).int()


def unpack(bits: Tensor, channels: int) -> Tensor:
    """The bits as booleans, ``[B, C, ...]``."""
    lanes = torch.arange(channels, device=bits.device)
    shape = [1, channels, *[1] * (bits.dim() - 2)]
    return (bits[:, lanes // _WORD] >> (lanes % _WORD).view(shape)) & 1 != 0


def gated_reference(v: Tensor, bits: Tensor) -> Tensor:
    """:func:`gated`."""
    is_open = unpack(bits, v.shape[1])
    return torch.where(is_open.repeat(v.shape[0] // bits.shape[0], *[1] * (v.dim() - 1)), v, 0.0)


def smooth_gate_reference(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """:func:`smooth_gate` in float64."""
    z = z.double()
    c = torch.special.ndtr(z) if kind == "gelu" else torch.sigmoid(z)
    return z * c, c
