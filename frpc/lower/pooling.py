"""Max pooling on the way back: gates among the winners, columns by PyTorch's own kernel, no activation kept for its shape."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from frpc.affine import traits_of
from frpc.lower.gates import RELUS
from frpc.lower.refusal import Refusal

__all__ = ["gates_before_pools", "pools_without_input", "scatter_columns"]

aten = torch.ops.aten
_POOL = aten.max_pool2d_with_indices.default
_BACK = aten.max_pool2d_with_indices_backward.default


def gates_before_pools(graph_module: fx.GraphModule) -> list[Refusal]:
    """``gate(scatter(v), r) -> scatter(gate(v, pool(r)))`` for ``r = relu(a)``: there are fewer winners than elements.

    A winner's value is that of its element, so both gates are open at the same places.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.threshold_backward.default and node.args[2] == 0:
            _single(graph, node)
        elif node.target is aten.mul.Tensor:
            _columns(graph, node)
    graph.eliminate_dead_code()
    return []


def _single(graph: fx.Graph, node: fx.Node) -> None:
    scattered, rectified = node.args[0], node.args[1]
    if not isinstance(scattered, fx.Node) or scattered.target is not _BACK or len(scattered.users) != 1:
        return
    v, indices = scattered.args[0], scattered.args[-1]
    winners = _winners(graph, indices, rectified)
    if winners is None:
        return
    with graph.inserting_before(scattered):
        gated = graph.call_function(aten.threshold_backward.default, (v, winners, 0))
    gated.meta = dict(v.meta)  # type: ignore[union-attr]
    scattered.update_arg(0, gated)
    node.replace_all_uses_with(scattered)
    graph.erase_node(node)


def _columns(graph: fx.Graph, node: fx.Node) -> None:
    for at in (0, 1):
        found, opened = Scattered.behind(node.args[at]), node.args[1 - at]
        if found is None or not isinstance(opened, fx.Node) or opened.target is not aten.gt.Scalar or opened.args[1] != 0:
            continue
        winners = _winners(graph, found.indices, opened.args[0])
        if winners is None or len(found.shaped.users) != 1:
            continue
        with graph.inserting_before(found.flat):
            mask = graph.call_function(aten.gt.Scalar, (winners, 0))
            mask.meta = {**opened.meta, "val": winners.meta["val"] > 0} if "val" in winners.meta else dict(opened.meta)
            gated = graph.call_function(aten.mul.Tensor, (found.v, mask))
        gated.meta = dict(found.v.meta)
        found.flat.update_arg(0, gated)
        node.replace_all_uses_with(found.shaped)
        graph.erase_node(node)
        return


def _winners(graph: fx.Graph, indices: Any, rectified: Any) -> fx.Node | None:
    """The results of the pooling that gave ``indices``, if what it pools is the ReLU ``rectified``."""
    if not isinstance(rectified, fx.Node) or rectified.target not in RELUS:
        return None
    if not isinstance(indices, fx.Node) or indices.target is not operator.getitem:
        return None
    pool: Any = indices.args[0]
    if pool.target is not _POOL or pool.args[0] is not rectified:
        return None
    for user in pool.users:
        if user.target is operator.getitem and user.args[1] == 0:
            return user
    with graph.inserting_after(pool):
        values = graph.call_function(operator.getitem, (pool, 0))
    values.meta = {**pool.meta, "val": pool.meta["val"][0]} if "val" in pool.meta else {}
    return values


class Scattered:
    """``reshape(scatter_add(zeros, -1, expand(reshape(indices)), reshape(v)))``: columns carried back to winners.

    Attributes:
        shaped: the result, ``[K, B, C, H, W]``.
        added: the call of ``scatter_add``.
        flat: ``v`` as it is scattered.
        v: ``[K, B, C, H', W']``.
        indices: ``[B, C, H', W']``, of the pooling.
    """

    def __init__(self, shaped: fx.Node, added: fx.Node, flat: fx.Node, v: fx.Node, indices: fx.Node) -> None:
        self.shaped, self.added, self.flat, self.v, self.indices = shaped, added, flat, v, indices

    @classmethod
    def behind(cls, shaped: Any) -> Scattered | None:
        added = _reshaped(shaped)
        zeros, index, flat = (_argument(added, (aten.scatter_add.default,), k) for k in (0, 2, 3))
        indices = _reshaped(_argument(index, (aten.expand.default,), 0))
        v = _reshaped(flat)
        if zeros is None or zeros.target is not aten.new_zeros.default or indices is None or v is None:
            return None
        assert added is not None and flat is not None
        alone = len(added.users) == len(flat.users) == 1
        pool: Any = indices.args[0] if indices.target is operator.getitem else None
        if not alone or pool is None or pool.target is not _POOL or indices.args[1] != 1:
            return None
        return cls(shaped, added, flat, v, indices)


def _reshaped(node: Any) -> fx.Node | None:
    """What a value is a reshape of."""
    found = node.args[0] if isinstance(node, fx.Node) and traits_of(node.target).reshapes else None
    return found if isinstance(found, fx.Node) else None


def _argument(node: Any, targets: tuple[Any, ...], at: int) -> fx.Node | None:
    found = node.args[at] if isinstance(node, fx.Node) and node.target in targets else None
    return found if isinstance(found, fx.Node) else None


def scatter_columns(graph_module: fx.GraphModule) -> list[Refusal]:
    """``scatter_add(0, indices of K columns, v) -> max_pool2d_with_indices_backward`` of all columns as samples.

    That kernel knows channels-last order; scattering along one axis costs two copies of all columns into another order. The
    indices are laid out once for each column, in the order of memory.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        found = Scattered.behind(node)
        if found is None or len(found.indices.meta["val"].shape) != 4:
            continue
        sizes: Any = node.args[1]  # K, B, C, H, W
        pooled = [int(n) for n in found.indices.meta["val"].shape[1:]]
        lead, channels = list(sizes[:2]), int(sizes[2])
        pool: Any = found.indices.args[0]
        window: list[Any] = [*list(pool.args[1:]), *_DEFAULTS[len(pool.args) - 2 :]]
        kernel, stride, padding, dilation, ceil = window
        with graph.inserting_before(node):
            call, value, winners = functools.partial(_call, graph, node), node.meta["val"], found.indices.meta["val"]
            flat, turned = value.flatten(0, 1), winners.permute(0, 2, 3, 1)
            repeated = turned.expand(*value.shape[:2], *turned.shape[1:])
            samples = call(None, operator.mul, *lead)
            rows = call(turned, aten.permute.default, found.indices, [0, 2, 3, 1])
            spread = call(repeated, aten.expand.default, rows, [*lead, *pooled[1:], channels])
            each = call(repeated.flatten(0, 1), aten.reshape.default, spread, [samples, *pooled[1:], channels])
            indices = call(repeated.flatten(0, 1).permute(0, 3, 1, 2), aten.permute.default, each, [0, 3, 1, 2])
            v = call(found.v.meta["val"].flatten(0, 1), aten.reshape.default, found.v, [samples, *pooled])
            room = _room(graph, [samples, *sizes[2:]], flat)
            arguments = (v, room, kernel, stride or kernel, padding, dilation, ceil, indices)
            back = graph.call_function(aten.max_pool2d_with_indices_backward.grad_input, arguments, {"grad_input": room})
            back.meta = {**node.meta, "val": flat}
        node.update_arg(0, back)
    graph.eliminate_dead_code()
    return []


def _call(graph: fx.Graph, like: fx.Node, value: Tensor | None, target: Any, *arguments: Any) -> fx.Node:
    made = graph.call_function(target, arguments)
    made.meta = {k: v for k, v in like.meta.items() if k != "val"} | ({} if value is None else {"val": value})
    return made


_DEFAULTS: tuple[Any, ...] = ([], [0, 0], [1, 1], False)  # stride, padding, dilation, ceil_mode


def _room(graph: fx.Graph, sizes: list[Any], like: Tensor) -> fx.Node:
    """Memory without values, in channels-last order; pooling's transpose reads its shape and fills it."""
    options: dict[str, Any] = {"dtype": like.dtype, "layout": torch.strided, "device": like.device, "pin_memory": False}
    made = graph.call_function(aten.empty.memory_format, (sizes,), {**options, "memory_format": torch.channels_last})
    made.meta = {"phase": "pull", "val": like}
    return made


_FILLING: dict[Any, Any] = {
    aten.max_pool2d_with_indices_backward.default: aten.max_pool2d_with_indices_backward.grad_input,
    aten.avg_pool2d_backward.default: aten.avg_pool2d_backward.grad_input,
}


def pools_without_input(graph_module: fx.GraphModule) -> list[Refusal]:
    """``max_pool_backward(v, a, ...) -> max_pool_backward(v, room, ..., out=room)``: of a it takes the shape alone.

    So that a, the largest activation of many nets, need not be kept for the way back; average pooling would lay out zeros for it.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        filling = _FILLING.get(node.target)
        if filling is None or node.meta["val"].dim() != 4 or node.meta["val"].device.type != "cpu":
            continue
        v, _, *rest = node.args
        value = node.meta["val"]
        sizes: list[Any] = list(value.shape)
        if not all(isinstance(n, int) for n in sizes[1:]):
            continue
        with graph.inserting_before(node):
            if not isinstance(sizes[0], int):
                sizes[0] = graph.call_function(aten.sym_size.int, (v, 0))
                sizes[0].meta = {"val": value.shape[0]}
            room = _room(graph, sizes, value)
        node.target = filling
        node.args, node.kwargs = (v, room, *rest), {"grad_input": room}
    graph.eliminate_dead_code()
    return []
