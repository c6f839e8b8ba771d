"""Convolutions of oneDNN with weights in its own blocked order, and what follows a convolution done by it.

``aten.convolution`` brings the weights into that order at every call, which for the late layers of a net costs as much as the
convolution itself. These are the operators that Inductor's freezing emits; they exist on CPUs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.graph import describe, fetch, free_name
from frpc.core.refusal import Refusal
from frpc.core.sizes import same_sizes
from frpc.optimize.lower.memory import Memory

__all__ = ["OPERATORS", "fuse_into_convolutions", "prepack", "sum_samples"]

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
WHAT = "weights in oneDNN's own order"
SEVERAL = 16  # samples
_DONE: tuple[Any, ...] = ("none", [], "")  # nothing follows

CONVOLUTION = mkldnn._convolution_pointwise.default
OPERATORS = (
    CONVOLUTION,
    mkldnn._convolution_pointwise.binary,
    mkldnn._convolution_pointwise_.binary,
    mkldnn._convolution_transpose_pointwise.default,
)
"""What lowered programs may contain in addition to ATen operators."""


def prepack(graph_module: fx.GraphModule) -> list[Refusal]:
    """``convolution(x, w, b) -> mkldnn._convolution_pointwise(x, packed w, b)``, transposed ones likewise.

    Some 1x1 kernels have one best order for a single sample and another for several; in the wrong one they run ten times slower.
    Their weights stay as they are.

    Exact when: the weights are constant and float32; the sums are the same, in another order.
    """
    refused: list[Refusal] = []
    names: dict[str, str] = {}
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.convolution.default:
            continue
        reason = _cannot_pack(node)
        if reason:
            refused.append(Refusal(WHAT, node.name, reason))
            continue
        given: Any = node.args
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = given
        geometry = (padding, output_padding, stride, dilation, groups) if transposed else (padding, stride, dilation, groups)
        sizes = [int(n) for n in x.meta["val"].shape[1:]]
        key = _name(str(weight.target), bool(transposed), geometry, sizes)
        if key not in names:
            packed = _packed(fetch(graph_module, str(weight.target)), bool(transposed), geometry, sizes)
            if packed is None:
                refused.append(Refusal(WHAT, node.name, "its best order depends on the number of samples"))
            else:
                names[key] = free_name(graph_module, key)
                graph_module.register_buffer(names[key], packed, persistent=False)
        if bias is not None and not (shift := fetch(graph_module, str(bias.target))).is_contiguous():
            graph_module.register_buffer(str(bias.target), shift.contiguous())  # oneDNN reads it as if it were
        with graph.inserting_before(node):
            read = graph.get_attr(names.get(key, str(weight.target)))
            read.meta = dict(weight.meta)
            operator = mkldnn._convolution_transpose_pointwise.default if transposed else CONVOLUTION
            result = graph.call_function(operator, (x, read, bias, *geometry, *_DONE))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return refused


def _cannot_pack(node: fx.Node) -> str | None:
    given: Any = node.args
    x, weight, bias = given[:3]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is not constant"
    value = weight.meta["val"]
    if value.device.type != "cpu":
        return f"its weight is on {value.device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if value.dim() != 4 or value.dtype is not torch.float32:
        return describe(value)
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return "its bias is not constant"
    if not all(isinstance(n, int) for n in x.meta["val"].shape[1:]):
        return "its input is of no fixed size"
    return None


def _name(weight: str, transposed: bool, *numbers: Sequence[Any]) -> str:
    flat = "_".join(str(n) for group in numbers for part in group for n in (part if isinstance(part, list | tuple) else [part]))
    return f"{weight}_{'transposed' if transposed else 'packed'}_{flat}"


def _packed(weight: Tensor, transposed: bool, geometry: Sequence[Any], sizes: Sequence[int]) -> Tensor | None:
    """The weights in the order that oneDNN takes for one sample and for several, or None where these differ."""
    reorder = mkldnn._reorder_convolution_transpose_weight if transposed else mkldnn._reorder_convolution_weight
    one, several = (reorder(weight, *geometry, [samples, *sizes]) for samples in (1, SEVERAL))
    orders = [mkldnn._get_mkldnn_serialized_md(packed) for packed in (one, several)]
    assert isinstance(one, Tensor)
    return one if torch.equal(*orders) else None


def sum_samples(graph_module: fx.GraphModule) -> list[Refusal]:
    """``y + reshape(conv(x)) -> reshape(reshape(y) + conv(x))``: columns are summed as the samples they are convolved as.

    Exact when: y is of the reshaped result's shape and type, ``alpha`` is 1, and nothing else reads the convolution.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for at in (1, 0):
            given: Any = node.args
            shaped, other = given[at], given[1 - at]
            folded: Any = shaped.args[0] if _alone(shaped, aten.reshape.default) else None
            if folded is None or not _alone(folded, CONVOLUTION) or not isinstance(other, fx.Node) or not _like(other, shaped):
                continue
            source = folded.args[0]
            if source.target is not aten.reshape.default:
                continue
            count, sizes = source.args[1][0], [int(n) for n in folded.meta["val"].shape[1:]]
            with graph.inserting_before(node):
                flat = graph.call_function(aten.reshape.default, (other, [count, *sizes]))
                total = graph.call_function(aten.add.Tensor, (flat, folded))
                result = graph.call_function(aten.reshape.default, (total, shaped.args[1]))
            flat.meta, total.meta, result.meta = ({**node.meta, "val": folded.meta["val"]} for _ in range(3))
            result.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            graph.erase_node(shaped)
            break
    return []


def fuse_into_convolutions(graph_module: fx.GraphModule) -> list[Refusal]:
    """``relu(conv(x)) -> conv_relu(x)``, ``conv(x) + y -> conv_add(x, y)``, in y's memory where nobody reads y later.

    Exact when: nothing else reads the convolution, nothing follows in it yet, y is of its shape and type, ``alpha`` is 1, and
    values are finite: oneDNN's ReLU need not let NaN through.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and not node.kwargs:
            _fuse_sum(graph, node)
    for node in list(graph.nodes):
        if node.target is aten.relu.default:
            _fuse_relu(graph, node)
    _write_into_summands(graph)
    return []


def _alone(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is target and len(value.users) == 1


def _fuse_sum(graph: fx.Graph, node: fx.Node) -> None:
    for at in (1, 0):  # the later summand is the usual one that nobody has read yet
        given: Any = node.args
        convolved, other = given[at], given[1 - at]
        if not _alone(convolved, CONVOLUTION) or tuple(convolved.args[-3:]) != _DONE:
            continue
        if not isinstance(other, fx.Node) or not _like(other, convolved) or other is convolved:
            continue
        x, *rest = convolved.args[:-3]
        with graph.inserting_before(node):
            fused = graph.call_function(mkldnn._convolution_pointwise.binary, (x, other, *rest, "add", None, None, [], None))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(convolved)
        return


def _like(a: fx.Node, b: fx.Node) -> bool:
    one, two = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.dtype != two.dtype:
        return False
    return same_sizes(one.shape, two.shape)


def _fuse_relu(graph: fx.Graph, node: fx.Node) -> None:
    before: Any = node.args[0]
    if _alone(before, CONVOLUTION) and tuple(before.args[-3:]) == _DONE:
        before.args = (*before.args[:-3], "relu", [], "")
    elif _alone(before, mkldnn._convolution_pointwise.binary) and before.args[-3] is None:
        before.args = (*before.args[:-3], "relu", [], None)
    else:
        return
    before.meta = dict(node.meta)
    node.replace_all_uses_with(before)
    graph.erase_node(node)


def _write_into_summands(graph: fx.Graph) -> None:
    order = {node: position for position, node in enumerate(graph.nodes)}
    memory = Memory(graph)
    for node in graph.nodes:
        if node.target is not mkldnn._convolution_pointwise.binary:
            continue
        x, other, *rest = node.args
        if memory.ends_at(other, node, order):
            node.target, node.args = mkldnn._convolution_pointwise_.binary, (other, x, *rest)
            memory.merge(node, other)
