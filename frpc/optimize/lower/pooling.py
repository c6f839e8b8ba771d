"""Max pooling in the backward pass: gates at the winners, columns by PyTorch's kernel, no activation kept for its shape."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.refusal import Refusal
from frpc.core.sizes import same_sizes
from frpc.optimize.lower.gates import RELUS
from frpc.rules.table import traits_of

__all__ = ["gates_before_pools", "pools_without_input", "scatter_columns"]

aten = torch.ops.aten
_POOL = aten.max_pool2d_with_indices.default
_BACK = aten.max_pool2d_with_indices_backward.default


def gates_before_pools(graph_module: fx.GraphModule) -> list[Refusal]:
    """``gate(scatter(v), r) -> scatter(gate(v, pool(r)))`` for ``r = relu(a)``: there are fewer winners than elements.

    A winner's value is that of its element, so both gates are open at the same places.

    Exact when: what is pooled is the very ReLU that gates, the indices are that pool's, nothing else reads what is scattered, and
    columns are scattered plane by plane, each into one of the pooled value's size.
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
        if len(found.shaped.users) != 1:
            continue
        winners = _winners(graph, found.indices, opened.args[0])
        if winners is None:
            continue
        with graph.inserting_before(found.added):  # behind the pool: what is scattered may come from before it
            mask = graph.call_function(aten.gt.Scalar, (winners, 0))
            mask.meta = {**opened.meta, "val": winners.meta["val"] > 0}
            gated = graph.call_function(aten.mul.Tensor, (found.v, mask))
            flat = graph.call_function(aten.reshape.default, (gated, found.flat.args[1]))
        gated.meta, flat.meta = dict(found.v.meta), dict(found.flat.meta)
        found.added.replace_input_with(found.flat, flat)
        graph.erase_node(found.flat)
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
        assert added is not None and flat is not None and index is not None
        alone = len(added.users) == len(flat.users) == 1
        pool: Any = indices.args[0] if indices.target is operator.getitem else None
        if not alone or pool is None or pool.target is not _POOL or indices.args[1] != 1:
            return None
        found = cls(shaped, added, flat, v, indices)
        return found if found._by_planes(index, pool.args[0]) else None

    def _by_planes(self, index: fx.Node, pooled: fx.Node) -> bool:
        """Says whether every plane of v is scattered by its own indices into one of the pooled value's size.

        ``v [K, B, C, H', W']`` lies as ``[K, B, C, H' W']``, the indices ``[B, C, H', W']`` likewise, seen once for each column.
        """
        nodes = (self.v, self.flat, index, self.added, self.shaped, self.indices, pooled)
        if any(not isinstance(n.meta.get("val"), Tensor) for n in nodes):
            return False
        v, flat, spread, added, shaped, winners, x = (tuple(n.meta["val"].shape) for n in nodes)
        if len(v) != 5 or len(winners) != 4 or not all(isinstance(n, int) for n in (*v[3:], *x[2:])):
            return False
        cells = math.prod(v[3:])
        return (
            self.added.args[1] in (-1, 3)
            and self.v.meta["val"].dtype == self.added.meta["val"].dtype
            and same_sizes(v[1:], winners)
            and same_sizes(flat, (*v[:3], cells))
            and same_sizes(spread, flat)
            and same_sizes(shaped, (*v[:3], *x[2:]))
            and same_sizes(added, (*v[:3], math.prod(x[2:])))
            and self._keeps_planes(index, (*winners[:2], cells))
        )

    @staticmethod
    def _keeps_planes(index: fx.Node, planes: tuple[Any, ...]) -> bool:
        laid: Any = index.args[0]
        shape = tuple(laid.meta["val"].shape)
        return same_sizes(shape, planes) or same_sizes(shape, (1, *planes))


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

    Exact when: columns are scattered plane by plane, as for :func:`gates_before_pools`.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        found = Scattered.behind(node)
        sizes: Any = node.args[1] if found is not None else ()  # K, B, C, H, W
        if found is None or -1 in sizes:  # how many columns and samples there are has to be said
            continue
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

    Exact when: a is a batch of images of fixed size on a CPU; the kernel there fills all it is given to write into.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        filling = _FILLING.get(node.target)
        if filling is None or node.kwargs or node.meta["val"].dim() != 4 or node.meta["val"].device.type != "cpu":
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
