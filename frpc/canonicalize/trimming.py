"""Parts of a captured graph that are not computation: copies, assertions, random numbers, and constants to compute now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import bind, fetch, origin_of, replace
from frpc.core.sizes import size_hint
from frpc.core.stopped import stopped_by
from frpc.core.torch_compat import OpOverload, schema_of
from frpc.errors import TrainingModeError
from frpc.rules.effects import is_pure

__all__ = ["fold_constants", "refuse_random", "remove_assertions", "remove_copies"]

aten = torch.ops.aten

_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}
_COPIES = {aten.contiguous.default, aten.alias.default, aten._to_copy.default, aten.to.dtype}
_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}


def refuse_random(graph_module: fx.GraphModule) -> bool:
    """Raises an error for operators that draw random numbers: their result cannot be explained.

    Dropout and its like draw in training alone, and not with probability 0; so does attention with dropout.
    """
    for node in graph_module.graph.nodes:
        if _draws(node):
            origin = origin_of(node)
            raise TrainingModeError(
                f"{node.target} draws random numbers in evaluation mode\n    {origin.module}   {origin.where}   {origin.source}\n"
                "  Pass training=self.training to functional dropout, or remove the noise from forward."
            )
    return False


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = bind(node.target, node.args, node.kwargs)
    return given.get("train") is not False and given.get("training") is not False and given.get("dropout_p") != 0


def remove_copies(graph_module: fx.GraphModule) -> bool:
    """``dropout(x) -> x``, ``contiguous(x) -> x``, ``detach(x) -> x``, ``to(x, its own dtype) -> x``, ``x[:] -> x``.

    ``x + 0`` stays: values are not looked at. A ``detach`` at which gradients stop stays too; see :mod:`frpc.core.stopped`.

    Exact when: dropout is not training; what is copied keeps its type and device, and its order in memory, which views rely on.
    Slices start at 0, step by 1 and reach past any end.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_DROPOUTS, *_COPIES, aten.detach.default, aten.slice.Tensor):
        x = given["self"] if "self" in given else given["input"]
        if node.target is aten.slice.Tensor:
            same = given["start"] in (0, None) and given["end"] in (None, 2**63 - 1) and given["step"] == 1
        elif node.target in _DROPOUTS:
            same = given["train"] is False or given["p"] == 0
        elif node.target is aten.detach.default:
            same = stopped_by(node) is None
        else:
            same = _alike(x.meta["val"], node.meta["val"])
        if same:
            replace(node, x)
            changed = True
        elif node.target is aten.contiguous.default:
            replace(node, edit.call(aten.clone.default, x, memory_format=given["memory_format"]))
            changed = True
    return changed


def _alike(x: Tensor, copy: Tensor) -> bool:
    """Says whether a copy has the same dtype, device and memory order as the original."""
    strides = [[size_hint(s) for s in t.stride()] for t in (x, copy)]
    return x.dtype == copy.dtype and x.device == copy.device and x.layout == copy.layout and strides[0] == strides[1]


def remove_assertions(graph_module: fx.GraphModule) -> bool:
    """Drops run-time assertions: the explainer checks its inputs before the program runs.

    Only those of PyTorch that nothing reads; an assertion gives no value.
    """
    nodes = [n for n in graph_module.graph.nodes if isinstance(n.target, OpOverload) and schema_of(n.target).name in _ASSERTIONS]
    unread = [n for n in nodes if not n.users]
    for node in unread:
        graph_module.graph.erase_node(node)
    return bool(unread)


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """``f(parameters) -> tensor``: what no input reaches (weight norm, standardised weights) is computed now.

    Exact when: f writes into nothing and draws no random numbers, else every run would give another result. Calls that take a
    size of the input stay, as does what has several results.
    """
    changed = False
    for node in list(graph_module.graph.nodes):
        arguments = node.all_input_nodes
        if node.op != "call_function" or not arguments or any(n.op != "get_attr" for n in arguments) or not is_pure(node.target):
            continue
        real: Any = fx.map_arg((node.args, node.kwargs), lambda n: fetch(graph_module, str(n.target)))
        value = node.target(*real[0], **real[1])
        if isinstance(value, Tensor):
            replace(node, Editor(graph_module, node).constant(node.name, value, node.meta["val"]))
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed
