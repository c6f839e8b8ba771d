"""Operators that were decomposed but that rules need as one: found again in their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import replace
from frpc.core.sizes import same_size, same_sizes
from frpc.core.torch_compat import SubgraphMatcher

__all__ = ["recover_shrinks", "unify_shuffles"]

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def unify_shuffles(graph_module: fx.GraphModule) -> bool:
    """``view(transpose(view(x, [B, g, C/g, ...]), 1, 2), [B, C, ...]) -> channel_shuffle(x, g)``.

    Exact when: the inner view leaves the first dimension and all behind the channels as they are, the outer view gives x's own
    shape, and there is something behind the channels: PyTorch shuffles none of vectors.
    """
    changed = False
    for node, edit, given in calls(graph_module, *_VIEWS):
        swapped: Any = given["self"]
        while swapped.target is aten.clone.default:
            swapped = swapped.args[0]
        dealt = swapped.args[0] if swapped.target is aten.transpose.int else None
        if not isinstance(dealt, fx.Node) or dealt.target not in _VIEWS:
            continue
        x: Any = dealt.args[0]
        inner, rank = dealt.meta["val"].shape, x.meta["val"].dim()
        if {d % len(inner) for d in swapped.args[1:]} != {1, 2} or not _deals(x.meta["val"].shape, inner):
            continue
        if rank > 2 and same_sizes(node.meta["val"].shape, x.meta["val"].shape):
            replace(node, edit.call(aten.channel_shuffle.default, x, inner[1]))
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


def _deals(shape: Any, dealt: Any) -> bool:
    """Says whether ``[B, C, ...]`` is viewed as ``[B, g, C/g, ...]``: only groups are split."""
    if len(dealt) != len(shape) + 1 or not all(isinstance(n, int) for n in dealt[1:3]):
        return False
    return same_size(dealt[0], shape[0]) and same_sizes(dealt[3:], shape[2:]) and same_size(dealt[1] * dealt[2], shape[1])


def _softshrink(x: Any, bound: Any) -> Any:
    shrunk = aten.sub.Tensor(x, aten.mul.Tensor(aten.sign.default(x), bound))
    return aten.where.self(aten.gt.Scalar(aten.abs.default(x), bound), shrunk, aten.mul.Tensor(x, 0))


def _hardshrink(x: Any, bound: Any) -> Any:
    return aten.where.ScalarSelf(aten.le.Scalar(aten.abs.default(x), bound), 0, x)


_SPELLED_OUT: dict[Callable[..., Any], Any] = {_softshrink: aten.softshrink.default, _hardshrink: aten.hardshrink.default}


def recover_shrinks(graph_module: fx.GraphModule) -> bool:
    """``where(|x| > l, x - l sgn(x), 0 x) -> softshrink(x, l)`` and ``where(|x| <= l, 0, x) -> hardshrink(x, l)``.

    Making a graph functional spells these two out; their secants need them whole.

    Exact when: x is floating-point, l is one number, the same at both places and not negative, and the other branch is what is
    written here: ``where(|x| > l, x - l sgn(x), x)`` is another function, and has rules of its own.
    """
    changed = False
    for pattern, whole in _SPELLED_OUT.items():
        for node, x, bound in _found(graph_module, pattern):
            number = isinstance(bound, int | float) and not isinstance(bound, bool) and bound >= 0
            if number and isinstance(x, fx.Node) and _is_floating(x) and _is_floating(node):
                replace(node, Editor(graph_module, node).call(whole, x, bound))
                changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


def _found(graph_module: fx.GraphModule, pattern: Callable[..., Any]) -> Iterator[tuple[Any, ...]]:
    """Yields where a graph computes a function, spelled out as written: the node of the result, and the function's arguments.

    What is computed in between is read by nobody else. The graph is searched again after each, which may have changed it.
    """
    matcher, seen = SubgraphMatcher(_graph_of(pattern)), set[fx.Node]()
    while fresh := [m for m in matcher.match(graph_module.graph) if m.returning_nodes[0] not in seen]:
        seen.add(fresh[0].returning_nodes[0])
        yield fresh[0].returning_nodes[0], *fresh[0].placeholder_nodes


@functools.cache
def _graph_of(pattern: Callable[..., Any]) -> fx.Graph:
    return fx.symbolic_trace(pattern).graph


def _is_floating(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()
