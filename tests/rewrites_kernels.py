"""Kernels: which patterns of a program they replace, and which only look alike."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from frpc.optimize.triton import lowering as kernel_lowering
from rewrites import Line, Rewrite

aten = torch.ops.aten
V, T, I = (4,), (3, 8), (8, 6, 5)  # noqa: E741 - a vector, tokens, an image
BACK = aten.max_pool2d_with_indices_backward.default
FILES = {
    "relu_gate": "gate", "gated": "gate", "smooth_gate": "gate", "conv_relevance": "conv_relevance",
    "conv_transposed_gate": "conv_transposed_gate", "pool_select": "pool_select", "pool_scatter": "pool_select",
    "norm_gate": "norm_gate", "norm_pull": "norm_gate",
}  # fmt: skip


class _References(fx.Interpreter):
    """Runs a program with the slow reference of every kernel in its place."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") != "frpc_kernels":
            return super().call_function(target, args, kwargs)
        name = str(target).split(".")[1]
        reference = getattr(importlib.import_module(f"frpc_kernels.{FILES[name]}"), f"{name}_reference")
        found = reference(*args[: len(inspect.signature(reference).parameters)])
        return pytree.tree_map(lambda x: x.float() if x.is_floating_point() else x, found)


def by_references(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [r for r in pytree.tree_leaves(_References(graph_module).run(*inputs)) if isinstance(r, Tensor)]


def use_kernels(program: fx.GraphModule) -> Any:
    return kernel_lowering.use_kernels(program)


def conv(c: Any, x: Any, *weight: int, transposed: bool = False, bias: Any = None, groups: int = 1) -> Any:
    return aten.convolution.default(x, c(*weight), bias, [1, 1], [1, 1], [1, 1], transposed, [0, 0], groups)


def pooled(x: Any) -> Any:
    return aten.max_pool2d_with_indices.default(x, [2, 2], [2, 2])


def back(v: Any, x: Any, pool: Any) -> Any:
    return BACK(v, x, [2, 2], [2, 2], [0, 0], [1, 1], False, pool[1])


def scale(x: Any, eps: float = 0.5, dims: Any = (-1,), **alpha: Any) -> Any:
    mean = aten.mean.dim(aten.mul.Tensor(x, x), list(dims), True)
    return aten.rsqrt.default(aten.add.Tensor(mean, eps, **alpha))


def cdf(z: Any, one: float = 1, half: float = 0.5, **alpha: Any) -> Any:
    wide = aten.erf.default(aten.mul.Scalar(z, 0.5**0.5))
    return aten.mul.Scalar(aten.add.Scalar(wide, one, **alpha), half)


def centred(v: Any) -> Any:
    return aten.sub.Tensor(v, aten.mean.dim(v, [-1], True))


def spread(x: Any, eps: float = 0.5, **given: Any) -> Any:
    options = {"correction": 0, "keepdim": True} | given
    return aten.rsqrt.default(aten.add.Tensor(aten.var.correction(x, [-1], **options), eps))


# fmt: off
REWRITES: tuple[Rewrite, ...] = (
    Rewrite(use_kernels, (
        Line("a gate", lambda c, x, v: aten.threshold_backward.default(v, aten.relu.default(x), 0), (I, I)),
        Line("a gate twice", lambda c, x, v: aten.threshold_backward.default(
            aten.threshold_backward.default(v, r := aten.relu.default(x), 0), r, 0), (I, I)),
        Line("a product with a gate", lambda c, x, v: aten.mul.Tensor(v, aten.gt.Scalar(aten.relu.default(x), 0)), (I, I)),
        Line("a pool and its transpose", lambda c, x, v: [(p := pooled(x))[0], back(v, x, p)], ((8, 6, 4), (8, 3, 2))),
        Line("a transposed convolution, gated", lambda c, x, v: aten.threshold_backward.default(
            conv(c, v, 8, 8, 3, 3, transposed=True), aten.relu.default(x), 0), (I, I)),
        Line("a transposed convolution times the input", lambda c, x, v: aten.mul.Tensor(
            x, conv(c, v, 8, 8, 3, 3, transposed=True)), (I, I)),
        Line("a convolution times a coefficient", lambda c, x, v: aten.mul.Tensor(conv(c, v, 8, 8, 3, 3), x), (I, I)),
        Line("GELU and its coefficient", lambda c, x: [aten.gelu.default(x), cdf(x)], (I,)),
        Line("SiLU and its coefficient", lambda c, x: [aten.silu.default(x), aten.sigmoid.default(x)], (I,)),
        Line("a layer norm and its coefficient", lambda c, x, v: [
            aten.native_layer_norm.default(x, [8], g := c(8), c(8), 0.5)[0], centred(aten.mul.Tensor(v, aten.mul.Tensor(
                spread(x), g)))], (T, T)),
        Line("an RMS norm", lambda c, x, v: [aten.mul.Tensor(aten.mul.Tensor(x, s := scale(x)), g := c(8)),
                                             aten.mul.Tensor(v, aten.mul.Tensor(s, g))], (T, T)),
        Line("an RMS norm of another", lambda c, x, v: [
            y := aten.mul.Tensor(aten.mul.Tensor(x, s := scale(x)), g := c(8)),
            aten.mul.Tensor(aten.mul.Tensor(y, t := scale(y, 0.25)), h := c(8)),
            aten.mul.Tensor(aten.mul.Tensor(v, aten.mul.Tensor(t, h)), aten.mul.Tensor(s, g))], (T, T)),
        Line("pulled back twice", lambda c, x, v: [
            aten.mul.Tensor(aten.mul.Tensor(x, s := scale(x)), g := c(8)),
            aten.mul.Tensor(aten.mul.Tensor(v, k := aten.mul.Tensor(s, g)), k)], (T, T)),
    ), (
        Line("a gate above another threshold",
             lambda c, x, v: aten.threshold_backward.default(v, aten.relu.default(x), 0.5), (I, I)),
        Line("a gate of what is no ReLU", lambda c, x, v: aten.threshold_backward.default(v, aten.sin.default(x), 0), (I, I)),
        Line("a ReLU as a factor", lambda c, x, v: aten.mul.Tensor(v, aten.relu.default(x)), (I, I)),
        Line("at least 0", lambda c, x, v: aten.mul.Tensor(v, aten.ge.Scalar(aten.relu.default(x), 0)), (I, I)),
        Line("winners nobody asks for", lambda c, x: pooled(x)[0], (I,)),
        Line("winners read as numbers", lambda c, x: aten.add.Tensor((p := pooled(x))[1], p[0]), (I,)),
        Line("a transpose into another image", lambda c, x, y, v: back(v, y, pooled(x)), ((8, 6, 4), (8, 6, 5), (8, 3, 2))),
        Line("scattered onto what is there", lambda c, x, v: aten.scatter_add.default(
            aten.reshape.default(x, [-1, 8, 24]), -1, aten.reshape.default(pooled(x)[1], [-1, 8, 6]),
            aten.reshape.default(v, [-1, 8, 6])), ((8, 6, 4), (8, 3, 2))),
        Line("scattered across channels", lambda c, x, v: aten.scatter_add.default(
            aten.new_zeros.default(x, [2, 192]), -1, aten.reshape.default(pooled(x)[1], [2, 48]),
            aten.reshape.default(v, [2, 48])), ((8, 6, 4), (8, 3, 2)), fixed=True),
        Line("a convolution read by another",
             lambda c, x, v: [y := conv(c, v, 8, 8, 3, 3, transposed=True), aten.mul.Tensor(x, y)], (I, I)),
        Line("a factor of other channels", lambda c, x, v: aten.mul.Tensor(
            aten.sum.dim_IntList(x, [1], True), conv(c, v, 8, 8, 3, 3, transposed=True)), (I, I)),
        Line("GELU by another formula", lambda c, x: [aten.gelu.default(x, approximate="tanh"), cdf(x)], (I,)),
        Line("a coefficient plus twice 1", lambda c, x: [aten.gelu.default(x), cdf(x, alpha=2)], (I,)),
        Line("a coefficient of another", lambda c, x, y: [aten.gelu.default(x), cdf(y)], (I, I)),
        Line("twice the coefficient", lambda c, x: [aten.gelu.default(x), cdf(x, half=1.0)], (I,)),
        Line("SiLU alone", lambda c, x: aten.silu.default(x), (I,)),
        Line("a layer norm's coefficient with another eps", lambda c, x: [
            aten.native_layer_norm.default(x, [8], c(8), c(8), 0.5)[0], spread(x, 0.25)], (T,)),
        Line("a layer norm's coefficient, corrected", lambda c, x: [
            aten.native_layer_norm.default(x, [8], c(8), c(8), 0.5)[0], spread(x, correction=1)], (T,)),
        Line("the coefficient of rows of another length", lambda c, x: [
            aten.native_layer_norm.default(x, [8], c(8), c(8), 0.5)[0], spread(aten.reshape.default(x, [-1, 2, 12]))], (T,)),
        Line("a norm of two dimensions",
             lambda c, x: [aten.native_layer_norm.default(x, [3, 8], None, None, 0.5)[0], spread(x)], (T,)),
        Line("a mean of squares over tokens", lambda c, x: aten.mul.Tensor(x, scale(x, dims=(1,))), (T,)),
        Line("twice eps", lambda c, x: aten.mul.Tensor(x, scale(x, alpha=2)), (T,)),
        Line("another's size", lambda c, x, v: aten.mul.Tensor(v, scale(x)), (T, T)),
    ), dtype=torch.float32, call=by_references),
)
# fmt: on
