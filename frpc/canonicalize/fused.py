"""Fused operators, decomposed into calls that have rules."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import replace
from frpc.core.torch_compat import OpOverload

__all__ = [
    "expand_bounds",
    "expand_distances",
    "expand_gated_linear_units",
    "expand_moments",
    "expand_products_added",
    "expand_similarities",
    "unify_norms",
]

aten = torch.ops.aten

_PRODUCTS: dict[Any, OpOverload] = {aten.addcmul.default: aten.mul.Tensor, aten.addcdiv.default: aten.div.Tensor}
_MOMENTS: dict[Any, OpOverload] = {
    aten.var_mean.dim: aten.var.correction,
    aten.var_mean.correction: aten.var.correction,
    aten.std_mean.dim: aten.std.correction,
    aten.std_mean.correction: aten.std.correction,
}
_BOUNDS: dict[Any, tuple[str, ...]] = {
    aten.clamp.Tensor: ("min", "max"),
    aten.clamp_min.Tensor: ("min",),
    aten.clamp_max.Tensor: ("max",),
}
_CHOICES: dict[str, OpOverload] = {"min": aten.maximum.default, "max": aten.minimum.default}


def expand_products_added(graph_module: fx.GraphModule) -> bool:
    """``addcmul(x, a, b) -> x + a * b``, ``addcdiv(x, a, b) -> x + a / b``, ``lerp(a, b, w) -> a + w (b - a)``.

    ``value`` becomes the sum's ``alpha``. The same up to rounding.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_PRODUCTS, aten.lerp.Tensor):
        if node.target is aten.lerp.Tensor:
            difference = edit.call(aten.sub.Tensor, given["end"], given["self"])
            product, value = edit.call(aten.mul.Tensor, given["weight"], difference), 1
        else:
            product, value = edit.call(_PRODUCTS[node.target], given["tensor1"], given["tensor2"]), given["value"]
        replace(node, edit.call(aten.add.Tensor, given["self"], product, alpha=value))
        changed = True
    return changed


def expand_moments(graph_module: fx.GraphModule) -> bool:
    """``var_mean(x) -> var(x), mean(x)`` and ``std_mean(x) -> std(x), mean(x)``, which are read one by one."""
    changed = False
    for node, _, given in calls(graph_module, *_MOMENTS):
        correction = given["correction"] if "correction" in given else int(given["unbiased"])
        if any(user.target is not operator.getitem for user in node.users):
            continue
        for user in list(node.users):
            edit = Editor(graph_module, user)
            if user.args[1] in (0, -2):
                op, options = _MOMENTS[node.target], {"correction": correction, "keepdim": given["keepdim"]}
                new = edit.call(op, given["self"], given["dim"], **options)
            else:
                new = edit.call(aten.mean.dim, given["self"], given["dim"], given["keepdim"])
            replace(user, new)
        graph_module.graph.erase_node(node)
        changed = True
    return changed


def expand_bounds(graph_module: fx.GraphModule) -> bool:
    """``clamp(x, low, high) -> minimum(maximum(x, low), high)`` where the bounds are tensors.

    In this order: where the lower bound is above the upper one, both give the upper one.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_BOUNDS):
        x = given["self"]
        for name in _BOUNDS[node.target]:
            if given[name] is not None:
                x = edit.call(_CHOICES[name], x, given[name])
        replace(node, x)
        changed = True
    return changed


def expand_distances(graph_module: fx.GraphModule) -> bool:
    """``cdist(a, b, p) -> |a_i - b_j|_p``, however PyTorch computes it."""
    changed = False
    for node, edit, given in calls(graph_module, aten.cdist.default):
        rows, columns = edit.call(aten.unsqueeze.default, given["x1"], -2), edit.call(aten.unsqueeze.default, given["x2"], -3)
        difference = edit.call(aten.sub.Tensor, rows, columns)
        replace(node, edit.call(aten.linalg_vector_norm.default, difference, given["p"], [-1]))
        changed = True
    return changed


def expand_similarities(graph_module: fx.GraphModule) -> bool:
    """``cosine_similarity(a, b) -> sum of a/max(|a|, eps) * b/max(|b|, eps)``, along a dimension that both have in full.

    The dimension is one of the shape that a and b are broadcast to, so an operand of size 1 there is repeated first.

    Exact when: both are of the result's type, and the dimension has a fixed size.
    """
    changed = False
    for node, edit, given in calls(graph_module, aten.cosine_similarity.default):
        examples = [given[name].meta["val"] for name in ("x1", "x2")]
        rank = max(x.dim() for x in examples)
        dim = given["dim"] % rank - rank  # counted from the end it is the same in both
        sizes = [x.shape[dim] if x.dim() >= -dim else 1 for x in examples]
        if any(x.dtype != node.meta["val"].dtype for x in examples) or not all(isinstance(n, int) for n in sizes):
            continue
        units = []
        for operand, own in zip((given["x1"], given["x2"]), sizes, strict=True):
            x = operand
            while x.meta["val"].dim() < -dim:
                x = edit.call(aten.unsqueeze.default, x, 0)
            if own != max(sizes):
                x = edit.call(aten.expand.default, x, [max(sizes) if d == dim else -1 for d in range(-x.meta["val"].dim(), 0)])
            size = edit.call(aten.linalg_vector_norm.default, x, 2, [dim], True)
            size = edit.call(aten.clamp_min.default, size, given["eps"])
            units.append(edit.call(aten.div.Tensor, x, size))
        replace(node, edit.call(aten.sum.dim_IntList, edit.call(aten.mul.Tensor, *units), [dim]))
        changed = True
    return changed


def expand_gated_linear_units(graph_module: fx.GraphModule) -> bool:
    """``glu(x) -> x[:half] * sigmoid(x[half:])`` along a dimension of fixed size."""
    changed = False
    for node, edit, given in calls(graph_module, aten.glu.default):
        x, dim = given["self"], given["dim"]
        half = node.meta["val"].shape[dim]
        if not isinstance(half, int):
            continue
        first = edit.call(aten.slice.Tensor, x, dim, 0, half)
        second = edit.call(aten.sigmoid.default, edit.call(aten.slice.Tensor, x, dim, half, 2 * half))
        replace(node, edit.call(aten.mul.Tensor, first, second))
        changed = True
    return changed


def unify_norms(graph_module: fx.GraphModule) -> bool:
    """``norm(x, p, dims) -> linalg_vector_norm(x, p, dims)``, the newer name of the same; no p means 2."""
    changed = False
    for node, edit, given in calls(graph_module, aten.norm.ScalarOpt_dim):
        order = 2 if given["p"] is None else given["p"]
        replace(node, edit.call(aten.linalg_vector_norm.default, given["self"], order, given["dim"], given["keepdim"]))
        changed = True
    return changed
