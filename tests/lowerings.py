"""Runs one pass of lowering on a program, and programs of one convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from frpc.core.refusal import Refusal
from frpc.core.stages import copy_graph
from graphs import program, randn

__all__ = ["convolution", "lowered", "needs_onednn", "single"]

aten = torch.ops.aten


def lowered(
    one_pass: Callable[[fx.GraphModule], list[Refusal]], before: fx.GraphModule, *inputs: Tensor
) -> tuple[fx.GraphModule, list[Refusal]]:
    """Runs a pass twice: the same function, and the second time the same graph and the same refusals."""
    after, expected = copy_graph(before), before(*inputs)
    refusals = one_pass(after)
    after.graph.lint()
    after.recompile()
    bound = 1e-12 if inputs[0].dtype is torch.float64 else 1e-5
    largest = max([1.0, *(float(x.abs().max()) for x in pytree.tree_leaves(expected))])  # sums are as exact as their terms
    torch.testing.assert_close(after(*inputs), expected, rtol=bound, atol=bound * largest)
    code, copied = after.code, copy_graph(after)
    assert [r for r in one_pass(copied) if r not in refusals] == []
    copied.recompile()
    assert copied.code == code
    return after, refusals


def single(*shape: int) -> Tensor:
    return randn(*shape).float()


def convolution(weight: Tensor, **given: Any) -> fx.GraphModule:
    """One call of `aten.convolution` on `v`; the options are those of a transposed one where nothing is said."""
    spatial = weight.dim() - 2
    options = {"stride": 1, "padding": 0, "dilation": 1, "transposed": True, "output_padding": 0, "groups": 1} | given
    numbers = [[v] * spatial if type(v) is int and k != "groups" else v for k, v in options.items()]

    def build(graph: fx.Graph, constant: Any) -> Any:
        v, w = graph.placeholder("v"), constant("weight", weight)
        return graph.call_function(aten.convolution.default, (v, w, None, *numbers))

    return program(build)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
