"""Inserting nodes into a graph with example values and origins, as every canonicalization does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from frpc.core.graph import bind, free_name, origin_of
from frpc.core.torch_compat import OpOverload, enable_python_dispatcher, fake_mode_of

__all__ = ["Editor", "calls"]


class Editor:
    """Inserts nodes before one node, with example values and that node's origin."""

    def __init__(self, graph_module: fx.GraphModule, before: fx.Node) -> None:
        self.module, self.node = graph_module, before

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call; its example value is computed in the mode of the other examples."""
        with self.module.graph.inserting_before(self.node):
            new = self.module.graph.call_function(op, args, kwargs)
        new.meta["origin"] = origin_of(self.node)
        examples = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with enable_python_dispatcher():  # else an operator written in C++ may fix the symbolic batch at its example size
            new.meta["val"] = op(*examples[0], **examples[1])
        return new

    def constant(self, name: str, value: Tensor, like: Any) -> fx.Node:
        """Adds a tensor to the module, under a free name, and a node that reads it.

        Args:
            name: preferred name.
            value: the tensor.
            like: any example value, whose fake mode the new example lives in.
        """
        free = free_name(self.module, name)
        self.module.register_buffer(free, value)
        with self.module.graph.inserting_before(self.node):
            new = self.module.graph.get_attr(free)
        new.meta["origin"] = origin_of(self.node)
        new.meta["val"] = fake_mode_of(like).from_tensor(value, static_shapes=True)
        return new


def calls(graph_module: fx.GraphModule, *ops: Any) -> Iterator[tuple[fx.Node, Editor, dict[str, Any]]]:
    """Yields the calls of some operators in order, each with an editor before it and its arguments by name.

    The arguments are read when a call's turn comes, so that they name what has replaced earlier calls.
    """
    wanted = {*ops}
    for node in [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in wanted]:
        assert isinstance(node.target, OpOverload)
        yield node, Editor(graph_module, node), bind(node.target, node.args, node.kwargs)
