"""Layer norm and RMS norm with their coefficient in one pass, and relevance pulled back through them.

``y = (x - m) s gamma + beta`` with ``s = 1 / sqrt(var + eps)``; RMS norm leaves the mean m out, there and in var. The coefficient
of the rule is ``s gamma``; relevance goes back as ``G' = G s gamma - mean(G s gamma)``, without the mean for RMS norm.

Shapes: x, y ``[B, ..., D]``, normalized over D; gamma, beta ``[D]``; s ``[B, ..., 1]``; G ``[K B, ..., D]``, columns before
samples.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frpc_kernels.launch import Launch, cannot_compute, cdiv, tuned

__all__ = [
    "CONFIGS",
    "norm_gate",
    "norm_gate_reference",
    "norm_pull",
    "norm_pull_reference",
    "plan_norm_gate",
    "plan_norm_pull",
    "supports",
]

CONFIGS = (  # rows a program takes
    triton.Config({"ROWS": 1}, num_warps=4),
    triton.Config({"ROWS": 4}, num_warps=8),
)
_WIDEST = 8192  # elements of a row that registers hold


@triton.jit
def norm_gate_kernel(
    x, gamma, beta, y, scale, rows, D, eps,
    CENTRED: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - (tl.sum(value, axis=1) / D)[:, None], 0.0)
    s = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + eps)
    value = value * s[:, None]
    if HAS_GAMMA:
        value *= tl.load(gamma + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BETA:
        value += tl.load(beta + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    tl.store(scale + row, s.to(scale.dtype.element_ty), mask=row < rows)


@triton.jit
def norm_pull_kernel(
    g, gamma, scale, out, rows, D, samples,
    CENTRED: tl.constexpr, HAS_GAMMA: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + row % samples, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if HAS_GAMMA:
        value *= tl.load(gamma + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        value -= (tl.sum(value, axis=1) / D)[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


_GATE = tuned(norm_gate_kernel, CONFIGS, ("rows", "D"))
_PULL = tuned(norm_pull_kernel, CONFIGS, ("rows", "D"))


def supports(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> str | None:
    """Says why the kernels of this file cannot be used, or None if they accept the operands."""
    reason = cannot_compute(x, gamma, beta, rank=range(2, 9))
    if reason is None and int(x.shape[-1]) > _WIDEST:
        reason = f"rows of {int(x.shape[-1])} elements: registers hold {_WIDEST}"
    return reason


def plan_norm_gate(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, y: Tensor, scale: Tensor, eps: float, centred: bool
) -> Launch:
    """The launch that fills ``y`` and ``scale``; x is contiguous."""
    arguments: dict[str, Any] = {"x": x, "gamma": x if gamma is None else gamma, "beta": x if beta is None else beta}
    arguments |= {"y": y, "scale": scale, "eps": float(eps), "CENTRED": centred}
    arguments |= {"HAS_GAMMA": gamma is not None, "HAS_BETA": beta is not None}
    return _plan(norm_gate_kernel, _GATE, x, arguments)


def plan_norm_pull(g: Tensor, gamma: Tensor | None, scale: Tensor, out: Tensor, centred: bool) -> Launch:
    """The launch that fills ``out``; G is contiguous."""
    arguments: dict[str, Any] = {"g": g, "gamma": g if gamma is None else gamma, "scale": scale, "out": out}
    arguments |= {"samples": scale.numel(), "CENTRED": centred, "HAS_GAMMA": gamma is not None}
    return _plan(norm_pull_kernel, _PULL, g, arguments)


def _plan(kernel: Any, tuner: Any, x: Tensor, arguments: dict[str, Any]) -> Launch:
    width = int(x.shape[-1])
    rows = x.numel() // width
    arguments |= {"rows": rows, "D": width, "BLOCK": triton.next_power_of_2(width)}
    return Launch(kernel, tuner, lambda meta: (cdiv(rows, meta["ROWS"]),), arguments, CONFIGS)


@torch.library.custom_op("frpc_kernels::norm_gate", mutates_args=())
def norm_gate(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """``y`` and ``s``; ``centred`` for layer norm, else RMS norm. One launch, and a copy where x has gaps or another order."""
    y, scale = _normalized(x)
    if x.numel():
        plan_norm_gate(x.contiguous(), gamma, beta, y, scale, eps, centred).run()
    return y, scale


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty([*x.shape[:-1], 1])


@norm_gate.register_fake
def _(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    return _normalized(x)


@torch.library.custom_op("frpc_kernels::norm_pull", mutates_args=())
def norm_pull(g: Tensor, gamma: Tensor | None, scale: Tensor, centred: bool) -> Tensor:
    """``G s gamma``, less its mean if ``centred``. One launch, and a copy where G has gaps or another order."""
    out = g.new_empty(g.shape)
    if g.numel():
        plan_norm_pull(g.contiguous(), gamma, scale.contiguous(), out, centred).run()
    return out


@norm_pull.register_fake
def _(g: Tensor, gamma: Tensor | None, scale: Tensor, centred: bool) -> Tensor:
    return g.new_empty(g.shape)


def norm_gate_reference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """:func:`norm_gate` in float64."""
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x * scale * (1.0 if gamma is None else gamma.double())
    return y if beta is None else y + beta.double(), scale


def norm_pull_reference(g: Tensor, gamma: Tensor | None, scale: Tensor, centred: bool) -> Tensor:
    """:func:`norm_pull` in float64."""
    scale = scale.double().repeat(g.shape[0] // scale.shape[0], *[1] * (g.dim() - 1))
    g = g.double() * scale * (1.0 if gamma is None else gamma.double())
    return g - g.mean(-1, keepdim=True) if centred else g
