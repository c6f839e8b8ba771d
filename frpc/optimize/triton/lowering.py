"""Lowering onto hand-written kernels: patterns of an optimized program become single launches of :mod:`frpc_kernels`.

The bits of a ReLU are made in its own pass and read by the transposed convolution, the pooling or the multiply that they gate;
the last transposed convolution multiplies by the input. Every place that could have a kernel and has none says why.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import fx

from frpc.core.refusal import Refusal
from frpc.core.torch_compat import OpOverload
from frpc.errors import OptionError
from frpc.optimize.lower.memory import free_views
from frpc.optimize.triton.rewriting import Rewriting
from frpc_kernels import KERNELS, NAMESPACE, why_missing

__all__ = ["count_launches", "operators", "use_kernels", "why_not"]


def why_not(device: torch.device) -> str | None:
    """Says why programs on this device do not use kernels, or None if they do."""
    if device.type != "cuda":
        return f"the model is on {device.type}; kernels are for CUDA devices"
    return why_missing()


def operators() -> tuple[OpOverload, ...]:
    """The operators that :func:`use_kernels` puts into programs.

    Raises:
        OptionError: if Triton is not available.
    """
    _load()
    names = ("relu_gate", "gated", "smooth_gate", "conv_relevance", "conv_transposed_gate", "pool_select", "pool_scatter")
    return tuple(getattr(torch.ops.frpc_kernels, name).default for name in (*names, "norm_gate", "norm_pull"))


def count_launches(program: fx.GraphModule) -> dict[str, int]:
    """How often a run of the program launches each kernel; every operator of ours is one launch."""
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "") == NAMESPACE:
            name = str(node.target).split(".")[1]
            counts[name] = counts.get(name, 0) + 1
    return counts


def use_kernels(program: fx.GraphModule, precision: str = "tf32x3") -> list[Refusal]:
    """Replaces patterns of an optimized program by kernels, and returns what it did not replace, with reasons.

    Views become reshapes: what kernels of convolutions give is channels-last.

    Args:
        program: as it comes from optimization; changed in place.
        precision: of products in float32: ``tf32x3``, about as exact as float32, or ``tf32``.

    Raises:
        OptionError: if Triton is not available.
    """
    parts = _load()
    rewriting = Rewriting(program, parts, precision)
    rewriting.sizes()
    rewriting.poolings()
    rewriting.gates()
    rewriting.products()
    rewriting.activations()
    rewriting.norms()
    rewriting.square_norms()
    rewriting.left_over()
    program.graph.eliminate_dead_code()
    free_views(program)
    program.recompile()
    return rewriting.refused


def _load() -> dict[str, Any]:
    """Imports the kernels, which registers their operators."""
    reason = why_missing()
    if reason:
        raise OptionError(f'backend="triton" is not available: {reason}')
    return {name: importlib.import_module(f"{NAMESPACE}.{name}") for name in KERNELS}
