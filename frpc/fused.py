"""Operators that do several things in one call, taken apart into calls that have rules."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from frpc.affine import bind
from frpc.editor import Editor
from frpc.graph import replace
from frpc.torch_compat import OpOverload

__all__ = ["expand_bounds", "expand_distances", "expand_moments", "expand_products_added", "expand_similarities", "unify_norms"]

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


def _calls(graph_module: fx.GraphModule, ops: Any) -> list[tuple[fx.Node, Editor, dict[str, Any]]]:
    """Returns the calls of some operators, each with an editor before it and its arguments by name."""
    found = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in ops]
    return [(n, Editor(graph_module, n), bind(n.target, n.args, n.kwargs)) for n in found]


def expand_products_added(graph_module: fx.GraphModule) -> bool:
    """``addcmul(x, a, b) -> x + a * b``, ``addcdiv(x, a, b) -> x + a / b``, ``lerp(a, b, w) -> a + w (b - a)``."""
    calls = _calls(graph_module, {*_PRODUCTS, aten.lerp.Tensor})
    for node, edit, given in calls:
        if node.target is aten.lerp.Tensor:
            difference = edit.call(aten.sub.Tensor, given["end"], given["self"])
            product, value = edit.call(aten.mul.Tensor, given["weight"], difference), 1
        else:
            product, value = edit.call(_PRODUCTS[node.target], given["tensor1"], given["tensor2"]), given["value"]
        replace(node, edit.call(aten.add.Tensor, given["self"], product, alpha=value))
    return bool(calls)


def expand_moments(graph_module: fx.GraphModule) -> bool:
    """``var_mean(x) -> var(x), mean(x)`` and ``std_mean(x) -> std(x), mean(x)``."""
    calls = _calls(graph_module, _MOMENTS)
    for node, _, given in calls:
        correction = given["correction"] if "correction" in given else int(given["unbiased"])
        for user in list(node.users):
            assert user.target is operator.getitem, "an operator with several results is read item by item"
            edit = Editor(graph_module, user)
            if user.args[1] == 0:
                new = edit.call(
                    _MOMENTS[node.target], given["self"], given["dim"], correction=correction, keepdim=given["keepdim"]
                )
            else:
                new = edit.call(aten.mean.dim, given["self"], given["dim"], given["keepdim"])
            replace(user, new)
        graph_module.graph.erase_node(node)
    return bool(calls)


def expand_bounds(graph_module: fx.GraphModule) -> bool:
    """``clamp(x, low, high) -> minimum(maximum(x, low), high)`` where the bounds are tensors."""
    calls = _calls(graph_module, _BOUNDS)
    for node, edit, given in calls:
        x = given["self"]
        for name in _BOUNDS[node.target]:
            if given[name] is not None:
                x = edit.call(_CHOICES[name], x, given[name])
        replace(node, x)
    return bool(calls)


def expand_distances(graph_module: fx.GraphModule) -> bool:
    """``cdist(a, b, p) -> |a_i - b_j|_p``."""
    calls = _calls(graph_module, {aten.cdist.default})
    for node, edit, given in calls:
        rows, columns = edit.call(aten.unsqueeze.default, given["x1"], -2), edit.call(aten.unsqueeze.default, given["x2"], -3)
        difference = edit.call(aten.sub.Tensor, rows, columns)
        replace(node, edit.call(aten.linalg_vector_norm.default, difference, given["p"], [-1]))
    return bool(calls)


def expand_similarities(graph_module: fx.GraphModule) -> bool:
    """``cosine_similarity(a, b) -> sum of a/max(|a|, eps) * b/max(|b|, eps)``."""
    calls = _calls(graph_module, {aten.cosine_similarity.default})
    for node, edit, given in calls:
        units = []
        for name in ("x1", "x2"):
            size = edit.call(aten.linalg_vector_norm.default, given[name], 2, [given["dim"]], True)
            size = edit.call(aten.clamp_min.default, size, given["eps"])
            units.append(edit.call(aten.div.Tensor, given[name], size))
        replace(node, edit.call(aten.sum.dim_IntList, edit.call(aten.mul.Tensor, *units), [given["dim"]]))
    return bool(calls)


def unify_norms(graph_module: fx.GraphModule) -> bool:
    """``norm(x, p, dims) -> linalg_vector_norm(x, p, dims)``, the newer name of the same."""
    calls = _calls(graph_module, {aten.norm.ScalarOpt_dim})
    for node, edit, given in calls:
        order = 2 if given["p"] is None else given["p"]
        replace(node, edit.call(aten.linalg_vector_norm.default, given["self"], order, given["dim"], given["keepdim"]))
    return bool(calls)
