"""Precision: a model in float64 is an audit, and is computed in float64 throughout.

Many norms cast to float32 inside, whatever the model's dtype. In a float32 model that is no cast at all; in the same model in
float64 it would round what is carried to float32, and its account with it.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.core.editor import Editor
from frpc.core.graph import bind, first_result, replace
from frpc.core.torch_compat import enable_python_dispatcher, pytree
from frpc.errors import OptionError

__all__ = [
    "computing_in",
    "keep_float64",
    "narrowed",
    "norms_in_one_type",
    "promote_explicitly",
    "rounding",
]

aten = torch.ops.aten

_CASTS = {aten._to_copy.default, aten.to.dtype}


def narrowed(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Returns the casts of a graph from float64 to float32."""
    found = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in _CASTS]
    return [n for n in found if n.meta["val"].dtype is torch.float32 and n.args[0].meta["val"].dtype is torch.float64]


def keep_float64(graph_module: fx.GraphModule) -> bool:
    """``to(x, float32) -> x`` where x is float64; what follows is computed in float64 too.

    What a model makes in float32 itself, a state of zeros say, is cast to float64 where the two meet: matrix products take
    operands of one dtype only.

    Exact when: values are read as numbers. A cast whose bits are read as another type stays.
    """
    casts = [n for n in narrowed(graph_module) if all(user.target is not aten.view.dtype for user in n.users)]
    stale: set[Any] = set()
    for node in casts:
        stale.update(node.users)
        replace(node, node.args[0])  # type: ignore[arg-type]
    for node in graph_module.graph.nodes:
        if node in stale and node.op == "call_function":
            _widen_others(graph_module, node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with enable_python_dispatcher():
                node.meta["val"] = node.target(*args, **kwargs)
            stale.update(node.users)
    return bool(casts)


_NORMS = {
    aten.layer_norm.default: ("weight", "bias"),
    aten.native_layer_norm.default: ("weight", "bias"),
    aten.group_norm.default: ("weight", "bias"),
    aten.native_group_norm.default: ("weight", "bias"),
    aten.instance_norm.default: ("weight", "bias", "running_mean", "running_var"),
    aten.batch_norm.default: ("weight", "bias", "running_mean", "running_var"),
    aten.rms_norm.default: ("weight",),
}


def norms_in_one_type(graph_module: fx.GraphModule) -> bool:
    """``norm(x, w, b) -> to(norm(to(x, wide), w, b), type)`` where the weights are of a wider type than x, as under autocast.

    Kernels compute such a norm in the wide type and round the result once, to the type it has.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in _NORMS:
            continue
        given = bind(node.target, node.args, node.kwargs)
        x = given["input"]
        weights = [given[name] for name in _NORMS[node.target] if given.get(name) is not None]
        own, result = x.meta["val"].dtype, first_result(node.meta["val"]).dtype
        wide = functools.reduce(torch.promote_types, (w.meta["val"].dtype for w in weights), own)
        if wide == own:
            continue
        edit = Editor(graph_module, node)
        given["input"] = edit.call(aten._to_copy.default, x, dtype=wide)
        for name in _NORMS[node.target]:
            if given.get(name) is not None and given[name].meta["val"].dtype != wide:
                given[name] = edit.call(aten._to_copy.default, given[name], dtype=wide)
        computed = edit.call(node.target, **given)
        if isinstance(node.meta["val"], tuple | list):
            for user in list(node.users):
                item = Editor(graph_module, user).call(operator.getitem, computed, user.args[1])
                replace(user, _as_type(graph_module, user, item, user.meta["val"].dtype))
            graph_module.graph.erase_node(node)
        else:
            replace(node, _as_type(graph_module, node, computed, result))
        changed = True
    return changed


def promote_explicitly(graph_module: fx.GraphModule) -> bool:
    """``f(x, y) -> f(to(x, type), y)`` where an operator takes floating-point types that differ, and promotes x to the other.

    What comes back through the operator is then cast where the value was. A tensor without dimensions promotes nothing and stays.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        example = node.meta.get("val")
        if node.op != "call_function" or not isinstance(example, Tensor) or node.target in _CASTS:
            continue
        types = {n: n.meta["val"].dtype for n in node.all_input_nodes if _takes_part(n.meta["val"])}
        if len(set(types.values())) < 2 or functools.reduce(torch.promote_types, types.values()) != example.dtype:
            continue
        for other, dtype in types.items():
            if dtype != example.dtype:
                node.replace_input_with(other, _as_type(graph_module, node, other, example.dtype))
                changed = True
    return changed


def _takes_part(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _as_type(graph_module: fx.GraphModule, before: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    if value.meta["val"].dtype == dtype:
        return value
    return Editor(graph_module, before).call(aten._to_copy.default, value, dtype=dtype)


def _widen_others(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Casts the float32 operands of a call to float64 if it also has operands in float64."""
    dtypes = {n: n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)}
    if torch.float64 in dtypes.values():
        for other in [n for n, dtype in dtypes.items() if dtype is torch.float32]:
            wide = Editor(graph_module, node).call(aten._to_copy.default, other, dtype=torch.float64)
            node.replace_input_with(other, wide)


def rounding(graph_module: fx.GraphModule, output: Tensor) -> float:
    """Returns the relative rounding of a captured model's output: that of the coarsest type it casts to."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in _CASTS]
    casts = [n.meta["val"].dtype for n in nodes if _is_inexact(n.args[0].meta["val"].dtype)]
    return max(torch.finfo(dtype).eps for dtype in (output.dtype, *casts) if _is_inexact(dtype))


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def computing_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes a module compute in another floating-point type; inputs and outputs keep the caller's type.

    The type is that of its parameters, so that ``.to(dtype)`` goes on meaning what it means.

    Args:
        model: changed in place: its parameters are converted, and its class becomes one that casts.
        dtype: a floating-point type.

    Raises:
        OptionError: for a type that is not floating-point.
    """
    if not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype} is not a floating-point type; use torch.bfloat16, torch.float64, ...")
    kind = type(model)
    if not issubclass(kind, _Casting):

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            tensors = itertools.chain(self.parameters(), self.buffers())
            inside = next((t.dtype for t in tensors if t.is_floating_point()), dtype)
            given = [x.dtype for x in pytree.tree_leaves((args, kwargs)) if _is_floating(x)]
            found = kind.forward(self, *_cast(args, inside), **_cast(kwargs, inside))
            return _cast(found, given[0] if given else torch.float32)

        casting = functools.wraps(kind.forward)(forward)
        model.__class__ = type(kind.__name__, (_Casting, kind), {"forward": casting, "__module__": kind.__module__})
    return model.to(dtype)


class _Casting:
    """Marks modules that cast already."""


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if _is_floating(x) else x, values)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
