"""A program as one plain function: what the graph computes, holding nothing longer than it is read."""

from __future__ import annotations

import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import frpc
from frpc.optimize.backends.bound import bound
from graphs import program, randn

aten = torch.ops.aten


def test_it_computes_what_the_graph_does() -> None:
    """Sizes, keywords, lists, element types and results in lists and tuples among what is written."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w = graph.placeholder("x"), constant("a.w".replace(".", "_"), randn(4))
        rows = graph.call_function(aten.sym_size.int, (x, 0))
        shaped = graph.call_function(aten.reshape.default, (x, [rows, 4]))
        single = graph.call_function(aten._to_copy.default, (shaped,), {"dtype": torch.float32})
        best = graph.call_function(aten.max.dim, (shaped, -1, True))
        clamped = graph.call_function(aten.clamp.default, (shaped, None, 0.5))
        return [graph.call_function(aten.mul.Tensor, (shaped, w)), (single, best), clamped, w]

    graph_module = program(build)
    for x in (randn(3, 2, 2), randn(1, 4)):
        got, expected = bound(graph_module)(x), graph_module(x)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2]) and got[3] is graph_module.a_w
        assert got[1][0].dtype == torch.float32 and torch.equal(got[1][0], expected[1][0])
        assert all(torch.equal(a, b) for a, b in zip(got[1][1], expected[1][1], strict=True))


def test_values_go_once_they_are_read() -> None:
    """A call sees nothing alive that no later call reads, its caller's tensors aside."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[int]] = []

    def step(x: Tensor) -> Tensor:
        alive.append([at for at, value in enumerate(made) if value() is not None])
        result = x + 1
        made.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(step, (x,))
    second = graph.call_function(step, (first,))
    graph.call_function(step, (second,))  # unread
    third = graph.call_function(step, (second,))
    graph.output((third,))
    bound(fx.GraphModule(nn.Module(), graph))(torch.zeros(2))
    assert alive == [[], [0], [1], [1]]


def test_names_in_a_graph_are_not_written() -> None:
    """Whatever a graph's nodes and tensors are called, the function is made of names of its own."""
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("__import__", torch.ones(2))
    x = graph.placeholder("import_os")
    graph.output((graph.call_function(aten.add.Tensor, (x, graph.create_node("get_attr", "__import__"))),))
    (got,) = bound(fx.GraphModule(root, graph))(torch.ones(2))
    assert got.tolist() == [2.0, 2.0]


def test_tracebacks_show_the_line() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        return (graph.call_function(aten.mm.default, (graph.placeholder("x"), constant("w", randn(4, 2)))),)

    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        bound(program(build))(randn(3, 3))
    assert "(v0, k0)" in traceback.format_exc() or any("(v0, " in (e.line or "") for e in traceback.extract_tb(error.tb))


def test_it_is_what_an_explainer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = frpc.compile(nn.Linear(3, 2).double(), (randn(1, 3),))
    found = explainer.compiled(randn(1, 3))
    monkeypatch.setitem(found.__dict__, "function", lambda *given: (torch.zeros(1, 2), torch.ones(1, 3), torch.zeros(1)))
    assert explainer(randn(1, 3), target=0).relevance.tolist() == [[1.0, 1.0, 1.0]]
