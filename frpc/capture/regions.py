"""Regions of a captured graph, code under ``torch.autocast`` or ``torch.no_grad()``, on their way into one plain graph.

``torch.export`` keeps such a region as a graph of its own and runs it when the whole becomes functional. It runs node by node
here, so that what comes out knows its module and line, and operators made of others are taken apart where autocast casts inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.torch_compat import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    called_apart,
    has_autocast_kernel,
    has_composite_kernel,
    hint_of,
    outside_the_trace,
    pytree,
)

__all__ = ["enter_regions"]


def enter_regions(graph_module: fx.GraphModule) -> None:
    """Lets the regions of an exported graph run node by node."""
    for part in graph_module.modules():
        if isinstance(part, fx.GraphModule) and part is not graph_module:
            part.forward = _Region(part).run


class _Region(fx.Interpreter):
    """Runs a region in its context (autocast or no_grad)."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, OpOverload) and _casts_inside(n):
            with fx.traceback.set_current_meta(n):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                result = called_apart(n.target, args, kwargs)
            if not _fits(result, n.meta["val"]):
                raise RuntimeError(
                    f"autocast casts inside {n.target}, which is therefore decomposed, and the result is fixed to one batch "
                    "size; to avoid this, put torch.autocast(..., enabled=False) around the call"
                )
            return result
        return super().run_node(n)


def _fits(result: Any, example: Any) -> bool:
    """Says whether results have the sizes they ought to have, symbols included."""
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(example), strict=True)
    return all(str(list(a.shape)) == str(list(b.shape)) for a, b in pairs if isinstance(a, Tensor))


def _casts_inside(node: fx.Node) -> bool:
    """Says whether autocast casts inside a composite operator; the cast would be lost if it were not decomposed."""
    op: Any = node.target
    device = next((v.device.type for v in _examples(node) if isinstance(v, Tensor)), None)
    if device is None or not torch.is_autocast_enabled(device):
        return False
    if not has_composite_kernel(op) or has_autocast_kernel(op, device):
        return False
    counts = []
    for enabled in (True, False):
        with outside_the_trace(), FakeTensorMode(), torch.autocast(device, enabled=enabled), _Casts() as casts:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: pytree.tree_map(_with_numbers, n.meta["val"]))
            try:
                called_apart(op, args, kwargs)
            except RuntimeError:  # operands of different types, which only casts make one
                return True
        counts.append(casts.count)
    return counts[0] != counts[1]


def _examples(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves([n.meta.get("val") for n in node.all_input_nodes])


def _with_numbers(example: Any) -> Any:
    """An example value with numbers for sizes: trying something out with it says nothing about the batch."""
    if isinstance(example, torch.SymInt):
        return hint_of(example)
    if not isinstance(example, Tensor):
        return example
    return torch.empty([int(_with_numbers(n)) for n in example.shape], dtype=example.dtype, device=example.device)


class _Casts(TorchDispatchMode):
    """Counts casts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))
