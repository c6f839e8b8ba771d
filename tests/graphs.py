"""Graphs written by hand for the tests of passes, and what is asked of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calls(graph_module: fx.GraphModule) -> list[str]:
    """The operators in order, in short."""
    return [
        "getitem" if n.target is operator.getitem else str(n.target).removeprefix("aten.").removesuffix(".default")
        for n in graph_module.graph.nodes
        if n.op == "call_function"
    ]


def program(build: Callable[[fx.Graph, Callable[[str, Tensor], fx.Node]], Any]) -> fx.GraphModule:
    """A graph written by hand; `build` gets the graph and a function that adds a constant."""
    root, graph = nn.Module(), fx.Graph()

    def constant(name: str, value: Tensor) -> fx.Node:
        root.register_buffer(name, value)
        node = graph.create_node("get_attr", name)
        node.meta["val"] = value
        return node

    graph.output(build(graph, constant))
    return fx.GraphModule(root, graph)


def with_examples(graph_module: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """Notes on every node the value it has at some inputs, as tracing does."""

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Noting(graph_module).run(*inputs)
    return graph_module
