"""Values computed in float64 and rounded once, so that what is equal in exact arithmetic is equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.torch_compat import pytree

__all__ = ["in_float64"]


def in_float64(
    graph: fx.Graph,
    constants: Mapping[str, Any],
    given: Mapping[fx.Node, Tensor],
    until: fx.Node | None = None,
    observe: Callable[[fx.Node, str], AbstractContextManager[Any]] = lambda node, phase: nullcontext(),
) -> dict[fx.Node, Any]:
    """Returns the value of every node, computed in float64 where the graph computes in float32, and rounded once.

    What is equal in exact arithmetic, such as the elements of a layer that sees the same everywhere, is then equal.

    Args:
        graph: a canonical graph.
        constants: value of each ``get_attr`` target.
        given: the value of every input, and of other nodes if need be.
        until: the last node wanted; all by default.
        observe: called around the work for each node.
    """
    wide: dict[fx.Node, Any] = {}
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        with observe(node, "value"):
            if node in given or node.op == "get_attr":
                found[node] = given[node] if node in given else constants[str(node.target)]
                wide[node] = pytree.tree_map(_widened, found[node])
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), wide.__getitem__)
                args, kwargs = pytree.tree_map(_widened, (args, kwargs))
                wide[node] = node.target(*args, **kwargs)
                found[node] = pytree.tree_map(_as, wide[node], node.meta["val"])
            else:
                wide[node], found[node] = wide[node.args[0]], found[node.args[0]]
        if node is until:
            break
    return found


def _widened(value: Any) -> Any:
    """Float32 in float64: a tensor, or a type among the arguments of a call."""
    if value is torch.float32:
        return torch.float64
    return value.to(torch.float64) if _is(value, torch.float32) else value


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype is dtype


def _as(value: Any, example: Any) -> Any:
    return value.to(example.dtype) if isinstance(value, Tensor) else value
