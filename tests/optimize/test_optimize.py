"""Every optimization: the graph before and after it, the same function, nothing left to change."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from frpc.core.stages import copy_graph
from frpc.optimize import passes as optimize
from graphs import calls, program, randn, with_examples

aten = torch.ops.aten


def optimized(one_pass: Callable[[fx.GraphModule], bool], before: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """Runs a pass twice; it changes the graph once, and never its function."""
    after, expected = copy_graph(before), before(*inputs)
    assert one_pass(after) is True
    after.graph.lint()
    after.recompile()
    torch.testing.assert_close(after(*inputs), expected, rtol=1e-14, atol=1e-14)
    assert one_pass(after) is False
    return after


def test_remove_dead() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        graph.call_function(aten.relu.default, (graph.call_function(aten.neg.default, (x,)),))
        return graph.call_function(aten.tanh.default, (x,))

    before = program(build)
    assert calls(before) == ["neg", "relu", "tanh"]
    assert calls(optimized(optimize.remove_dead, before, randn(2))) == ["tanh"]


def test_merge_common() -> None:
    """The same operator on the same arguments; 1, 1.0 and True are not the same."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        twice = [graph.call_function(aten.add.Tensor, (graph.call_function(aten.neg.default, (x,)), 1)) for _ in range(2)]
        other = graph.call_function(aten.add.Tensor, (x, 1.0))
        keyed = [graph.call_function(aten.sum.dim_IntList, (x, [0]), {"keepdim": k}) for k in (True, True, False)]
        return (*twice, other, *keyed, graph.call_function(aten.add.Tensor, (x, 1)))

    before = program(build)
    after = optimized(optimize.merge_common, before, randn(3))
    assert calls(before) == [*["neg", "add.Tensor"] * 2, "add.Tensor", *["sum.dim_IntList"] * 3, "add.Tensor"]
    assert calls(after) == ["neg", "add.Tensor", "add.Tensor", *["sum.dim_IntList"] * 2, "add.Tensor"]
    first, second, *_ = after.graph.output_node().args[0]
    assert first is second


def test_merge_common_keeps_writes() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        copy = graph.call_function(aten.clone.default, (x,))
        return [graph.call_function(aten.add_.Tensor, (copy, 1)) for _ in range(2)]

    before = program(build)
    assert optimize.merge_common(before) is False


def test_overwrite_nothing() -> None:
    """Whoever read a value after it was overwritten reads the result, also twice; what is seen through a view stays."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        copy = graph.call_function(aten.exp.default, (x,))
        early = graph.call_function(aten.neg.default, (copy,))
        first = graph.call_function(aten.add_.Scalar, (copy, 1))
        second = graph.call_function(aten.mul_.Tensor, (copy, x))
        return (early, first, second, graph.call_function(aten.tanh.default, (copy,)))

    x = randn(3)
    before = with_examples(program(build), x)
    after, expected = copy_graph(before), [-x.exp(), (x.exp() + 1) * x, (x.exp() + 1) * x, ((x.exp() + 1) * x).tanh()]
    assert optimize.overwrite_nothing(after) is True
    after.recompile()
    assert calls(after) == ["exp", "neg", "add.Scalar", "mul.Tensor", "tanh"]
    torch.testing.assert_close(list(after(x)), expected)
    assert optimize.overwrite_nothing(after) is False

    def viewed(graph: fx.Graph, constant: Any) -> Any:
        copy = graph.call_function(aten.exp.default, (graph.placeholder("x"),))
        seen = graph.call_function(aten.view.default, (copy, [-1]))
        graph.call_function(aten.add_.Scalar, (copy, 1))
        return seen

    assert optimize.overwrite_nothing(with_examples(program(viewed), x)) is False


def test_fold_constants() -> None:
    """What only constants feed is computed once, but for views of a parameter."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w = graph.placeholder("x"), constant("w", randn(3, 3))
        root = graph.call_function(aten.sqrt.default, (graph.call_function(aten.abs.default, (w,)),))
        turned = graph.call_function(aten.t.default, (w,))
        return graph.call_function(aten.mm.default, (graph.call_function(aten.mm.default, (x, root)), turned))

    before = program(build)
    assert calls(before) == ["abs", "sqrt", "t", "mm", "mm"]
    assert calls(optimized(optimize.fold_constants, before, randn(2, 3))) == ["t", "mm", "mm"]


def test_fold_constants_of_several_results() -> None:
    """The winners of a constant image are known, and with them what is read at their places."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w = graph.placeholder("x"), constant("w", randn(1, 1, 4, 4))
        pooled = graph.call_function(aten.max_pool2d_with_indices.default, (w, [2, 2]))
        largest, places = (graph.call_function(operator.getitem, (pooled, k)) for k in (0, 1))
        return graph.call_function(aten.add.Tensor, (x, largest)), places

    before = program(build)
    after = copy_graph(before)
    assert optimize.fold_constants(after)
    optimize.remove_dead(after)
    after.recompile()
    assert calls(after) == ["add.Tensor"]
    for got, expected in zip(after(randn(1, 1, 2, 2)), before(randn(1, 1, 2, 2)), strict=True):
        assert torch.equal(got, expected)


def test_fold_added_bias() -> None:
    """One constant a channel goes into the convolution; one a position, or a sum that others read from, does not."""

    def convolve(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        return graph.call_function(aten.convolution.default, (x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1))

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w = graph.placeholder("x"), constant("w", randn(4, 3, 2, 2))
        channel, position = constant("c", randn(4, 1, 1)), constant("p", randn(4, 4, 4))
        folded = graph.call_function(aten.add.Tensor, (convolve(graph, x, w), channel))
        kept = graph.call_function(aten.add.Tensor, (convolve(graph, x, w), position))
        shared = convolve(graph, x, w)
        return folded, kept, shared, graph.call_function(aten.add.Tensor, (shared, channel))

    x = randn(2, 3, 5, 5)
    before = with_examples(program(build), x)
    after = copy_graph(before)
    assert optimize.fold_added_bias(after)
    after.graph.lint()
    after.recompile()
    assert calls(before) == ["convolution", "add.Tensor", "convolution", "add.Tensor", "convolution", "add.Tensor"]
    assert calls(after) == ["convolution", "convolution", "add.Tensor", "convolution", "add.Tensor"]
    for got, expected in zip(after(x), before(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert optimize.fold_added_bias(after) is False


def test_drop_covered_gates() -> None:
    """A gate is left out where the factor beside it is 0 whenever the gate is shut, and nowhere else."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, v = graph.placeholder("x"), graph.placeholder("v")
        r = graph.call_function(aten.relu.default, (x,))
        gate = graph.call_function(aten.threshold_backward.default, (v, r, 0))
        covered = graph.call_function(aten.div.Tensor, (r, graph.call_function(aten.add.Tensor, (r, 0.5))))
        bare = graph.call_function(aten.div.Tensor, (x, graph.call_function(aten.exp.default, (x,))))
        return [graph.call_function(aten.mul.Tensor, pair) for pair in ((gate, covered), (covered, gate), (gate, bare))]

    before = program(build)
    x, v = randn(3, 5), randn(3, 5, seed=1)
    x[0, 0], x[0, 1] = 0.0, -0.0
    after = optimized(optimize.drop_covered_gates, before, x, v)
    optimize.remove_dead(after)
    after.recompile()
    assert calls(after).count("threshold_backward") == 1
    first, second, third = after.graph.output_node().args[0]
    assert [n.args[at].name for n, at in ((first, 0), (second, 1))] == ["v", "v"]
    assert third.args[0].target is aten.threshold_backward.default


def test_drop_unread() -> None:
    """A tensor that no node reads any more takes no memory."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        constant("unread", randn(3))
        return graph.call_function(aten.mul.Tensor, (x, constant("read", randn(3))))

    graph_module = program(build)
    expected = graph_module(randn(3))
    optimize.remove_dead(graph_module)
    assert {name for name, _ in graph_module.named_buffers()} == {"read", "unread"}
    assert optimize.drop_unread(graph_module)
    assert {name for name, _ in graph_module.named_buffers()} == {"read"}
    graph_module.recompile()
    assert torch.equal(graph_module(randn(3)), expected)
    assert optimize.drop_unread(graph_module) is False


def test_merge_scales() -> None:
    """Two factors in a row become one, which then folds; not where the value in between is used."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, s, t, u = graph.placeholder("x"), constant("s", randn(3)), constant("t", randn(3, seed=1)), constant("u", randn(2, 3))
        merged = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mul.Tensor, (x, s)), t))
        kept = graph.call_function(aten.mul.Tensor, (x, t))
        other = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mul.Tensor, (x, s)), u))
        return merged, kept, graph.call_function(aten.mul.Tensor, (kept, s)), other

    before = program(build)
    assert calls(before) == ["mul.Tensor"] * 6
    after = optimized(optimize.merge_scales, before, randn(2, 3))
    small = copy_graph(after)
    for one_pass in (optimize.fold_constants, optimize.remove_dead):
        one_pass(small)
    small.recompile()
    assert calls(small) == ["mul.Tensor"] * 5
    x = randn(2, 3, seed=5)
    torch.testing.assert_close(small(x), before(x))


def test_every_optimization_has_a_test() -> None:
    tested = {
        optimize.overwrite_nothing,
        optimize.remove_dead,
        optimize.merge_common,
        optimize.merge_scales,
        optimize.fold_constants,
        optimize.drop_unread,
        optimize.fold_added_bias,
        optimize.drop_covered_gates,
    }
    assert set(optimize.PASSES) <= tested
