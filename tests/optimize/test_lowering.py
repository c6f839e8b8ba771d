"""Every lowering: the form it makes, the same function, the reasons where it makes none."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from frpc.core.stages import copy_graph
from frpc.optimize import lower
from frpc.optimize.lower import convolutions, gates, memory, onednn, pooling, shares
from graphs import calls, program, randn, with_examples
from lowerings import convolution, lowered, needs_onednn, single

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("weight", "v", "options"),
    [
        (single(4, 3, 3, 3), (2, 4, 5, 7), {}),
        (single(4, 3, 3, 2), (2, 4, 5, 7), {"padding": [2, 1], "dilation": [1, 3]}),
        (single(4, 1, 3), (2, 4, 6), {"padding": [1]}),
        (single(4, 3, 1, 1), (2, 4, 5, 7), {}),
        (single(2, 3, 2, 1, 3), (2, 2, 4, 3, 5), {"padding": [1, 0, 0]}),
    ],
    ids=["2d", "2d, dilated", "1d", "1x1", "3d"],
)
def test_transposed_convolutions_are_flipped(weight: Tensor, v: tuple[int, ...], options: dict[str, Any]) -> None:
    after, refusals = lowered(convolutions.flip_transposed, convolution(weight, **options), single(*v))
    assert refusals == []
    (node,) = after.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert node.args[6] is False
    assert node.args[1].target == "weight_flipped"


@pytest.mark.parametrize(
    ("weight", "v", "options", "why"),
    [
        (single(4, 3, 3, 3), (2, 4, 5, 7), {"stride": [2, 1]}, "stride [2, 1]"),
        (single(4, 3, 3, 3), (2, 4, 5, 7), {"groups": 2}, "2 groups"),
        (single(4, 3, 2, 2), (2, 4, 5, 7), {"padding": 2}, "padding wider than the kernel"),
    ],
    ids=["stride", "groups", "padding"],
)
def test_refused_flips_say_why(weight: Tensor, v: tuple[int, ...], options: dict[str, Any], why: str) -> None:
    before = convolution(weight, **options)
    after, (refusal,) = lowered(convolutions.flip_transposed, before, single(*v))
    assert calls(after) == calls(before)
    assert str(refusal).startswith("stride-1 transposed convolution as a convolution not used at convolution_default: ")
    assert why in refusal.why


def test_a_weight_used_both_ways_is_kept_and_flipped_once() -> None:
    weight = single(4, 4, 3, 3)

    def build(graph: fx.Graph, constant: Any) -> Any:
        v, w = graph.placeholder("v"), constant("weight", weight)
        rest = ([1, 1], [1, 1], [1, 1])
        plain = graph.call_function(aten.convolution.default, (v, w, None, *rest, False, [0, 0], 1))
        for _ in range(2):
            plain = graph.call_function(aten.convolution.default, (plain, w, None, *rest, True, [0, 0], 1))
        return plain

    after, refusals = lowered(convolutions.flip_transposed, program(build), single(2, 4, 5, 6))
    names = [n.args[1].target for n in after.graph.find_nodes(op="call_function", target=aten.convolution.default)]
    assert names == ["weight", "weight_flipped", "weight_flipped"]
    assert refusals == []


def test_channels_last() -> None:
    """Weights of 2-d convolutions change their memory order and nothing else."""
    before = convolution(single(4, 3, 3, 3), transposed=False, padding=1)
    after, refusals = lowered(convolutions.channels_last, before, single(2, 3, 5, 7))
    assert refusals == []
    assert after.weight.is_contiguous(memory_format=torch.channels_last)
    assert before.weight.is_contiguous()
    _, (refusal,) = lowered(convolutions.channels_last, convolution(single(4, 3, 3), transposed=False), single(2, 3, 5))
    assert str(refusal) == "channels-last not used at convolution_default: f32[4, 3, 3] on cpu"


def test_float64_gets_no_second_copy_of_its_weights() -> None:
    before = convolution(randn(4, 3, 3, 3))
    for one in (convolutions.flip_transposed, convolutions.channels_last):
        after, (refusal,) = lowered(one, before, randn(2, 4, 5, 7))
        assert after.weight is before.weight
        assert refusal.why.startswith("oneDNN has no kernels for float64")


def test_free_views() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        y = graph.call_function(aten.view.default, (x, [2, -1]))
        return graph.call_function(aten._unsafe_view.default, (y, [3, 4]))

    before = program(build)
    after, refusals = lowered(memory.free_views, before, randn(3, 4))
    assert calls(before) == ["view", "_unsafe_view"]
    assert calls(after) == ["reshape", "reshape"]
    assert refusals == []
    assert torch.equal(after(randn(4, 3).t()), randn(4, 3).t())  # where a view fails


def test_reuse_memory() -> None:
    """What only the next operator reads is overwritten by it; inputs, constants, views, and what others read are not."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, c = graph.placeholder("x"), constant("c", randn(1, 4))
        first = graph.call_function(aten.mul.Tensor, (x, c))  # x is the caller's
        second = graph.call_function(aten.relu.default, (first,))  # in place
        third = graph.call_function(aten.add.Tensor, (c, second))  # in place, with the operands exchanged
        twice = graph.call_function(aten.abs.default, (third,))
        square = graph.call_function(aten.mul.Tensor, (twice, twice))  # in place would read what it has written
        view = graph.call_function(aten.reshape.default, (square, [4, 3]))  # neg writes through it
        mine = graph.call_function(aten.neg.default, (graph.call_function(aten.reshape.default, (x, [4, 3])),))
        return graph.call_function(aten.neg.default, (view,)), graph.call_function(aten.div.Tensor, (c, x)), third, mine

    x = randn(3, 4)
    before = with_examples(program(build), x)
    kept, constant = x.clone(), before.c.clone()
    after, refusals = lowered(memory.reuse_memory, before, x)
    assert calls(before)[:5] == ["mul.Tensor", "relu", "add.Tensor", "abs", "mul.Tensor"]
    assert calls(after)[:5] == ["mul.Tensor", "relu_", "add_.Tensor", "abs", "mul.Tensor"]
    assert calls(before)[5:] == ["reshape", "reshape", "neg", "neg", "div.Tensor"]
    assert calls(after)[5:] == ["reshape", "reshape", "neg", "neg_", "div.Tensor"]
    assert refusals == []
    assert torch.equal(x, kept) and torch.equal(after.c, constant)


def test_reuse_memory_waits_for_the_last_reader() -> None:
    """A value that two read is overwritten by the second; not while a view of it is still to be read."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        value = graph.call_function(aten.mul.Tensor, (x, 2))
        first, second = (graph.call_function(op, (value,)) for op in (aten.relu.default, aten.abs.default))
        seen = graph.call_function(aten.neg.default, (x,))
        view = graph.call_function(aten.reshape.default, (seen, [12]))
        return graph.call_function(aten.add.Tensor, (first, second)), graph.call_function(aten.abs.default, (seen,)), view

    x = randn(3, 4)
    after, _ = lowered(memory.reuse_memory, with_examples(program(build), x), x)
    assert calls(after) == ["mul.Tensor", "relu", "abs_", "neg", "reshape", "add_.Tensor", "abs"]


def test_reuse_memory_needs_the_same_size_and_type() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        small = graph.call_function(aten.abs.default, (x,))
        wide = graph.call_function(aten.add.Tensor, (small, constant("c", randn(2, 3, 4))))
        single = graph.call_function(aten.neg.default, (constant("s", randn(2, 3, 4).float()),))
        spread = graph.call_function(aten.expand.default, (small, [2, 3, 4]))  # an element is many
        return graph.call_function(aten.mul.Tensor, (single, wide)), graph.call_function(aten.neg.default, (spread,))

    x = randn(3, 4)
    after, _ = lowered(memory.reuse_memory, with_examples(program(build), x), x)
    assert calls(after) == ["abs", "add.Tensor", "neg", "expand", "mul_.Tensor", "neg"]
    assert after.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)[0].args[0].target is aten.add.Tensor


def test_reuse_memory_of_gates_and_of_distinct_results() -> None:
    """A gate writes over what it lets through; results of one operator are memory of their own, but nobody's to overwrite."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, r = graph.placeholder("x"), graph.placeholder("r")
        value = graph.call_function(aten.mul.Tensor, (x, 2))
        gated = graph.call_function(aten.threshold_backward.default, (value, r, 0))
        kept = graph.call_function(aten.threshold_backward.default, (x, r, 0))
        both = graph.call_function(aten.max.dim, (gated, 1, True))
        largest = graph.call_function(operator.getitem, (both, 0))
        return graph.call_function(aten.neg.default, (largest,)), kept

    x, r = randn(3, 4), torch.relu(randn(3, 4, seed=1))
    after, _ = lowered(memory.reuse_memory, with_examples(program(build), x, r), x, r)
    assert calls(after) == [
        "mul.Tensor", "threshold_backward.grad_input", "threshold_backward", "max.dim", "getitem", "neg",
    ]  # fmt: skip


def test_early_coefficients() -> None:
    """What a rule makes of values alone is made with them; what waits for the seed, or is a value, stays."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, seed = graph.placeholder("x"), graph.placeholder("seed")
        first = graph.call_function(aten.relu.default, (x,))
        second = graph.call_function(aten.exp.default, (first,))
        below = graph.call_function(aten.add.Tensor, (first, 0.5))
        share = graph.call_function(aten.div.Tensor, (first, below))
        pulled = graph.call_function(aten.mul.Tensor, (seed, share))
        late = graph.call_function(aten.neg.default, (pulled,))
        for node in (below, share, late):
            node.meta["phase"] = "rule"
        return second, late

    before = program(build)
    after, _ = lowered(memory.early_coefficients, before, randn(3, 4), randn(3, 4, seed=1))
    assert calls(before) == ["relu", "exp", "add.Tensor", "div.Tensor", "mul.Tensor", "neg"]
    assert calls(after) == ["relu", "add.Tensor", "div.Tensor", "exp", "mul.Tensor", "neg"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_byte_gates(dtype: torch.dtype) -> None:
    """Gates of a ReLU become one mask of bytes, made behind it; others stay."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, v, columns = (graph.placeholder(n) for n in ("x", "v", "columns"))
        r = graph.call_function(aten.relu.default, (x,))
        gated = graph.call_function(aten.threshold_backward.default, (v, r, 0))
        other = graph.call_function(aten.threshold_backward.default, (v, r, 0.5))
        plain = graph.call_function(aten.threshold_backward.default, (v, x, 0))
        opened = graph.call_function(aten.gt.Scalar, (r, 0))
        return gated, other, plain, graph.call_function(aten.mul.Tensor, (columns, opened))

    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, 1e-45, 5e-324, float("nan"), 3e38]], dtype=torch.float64).to(dtype)
    v, columns = randn(1, 8).to(dtype), randn(3, 1, 8, seed=1).to(dtype)
    before = program(build)
    for node, value in zip(before.graph.find_nodes(op="placeholder")[1:], (v, columns), strict=True):
        node.meta["val"] = value  # of the ReLU no size is known: as many elements as count
    after = copy_graph(before)
    assert gates.byte_gates(after) == gates.byte_masks(after) == []
    after.recompile()
    for got, expected in zip(after(x, v, columns), before(x, v, columns), strict=True):
        known = ~torch.isnan(x).expand_as(expected)
        assert got.dtype == dtype and torch.equal(got[known], expected[known])
    names = calls(after)
    assert names[:3] == ["relu", "_to_copy", "view.dtype"] and names.count("_to_copy") == 2  # each pass has its own
    assert names.count("threshold_backward") == 2 and "gt.Scalar" not in names


def test_middling_gates_alone_become_bytes() -> None:
    """By elements a sample: the smallest and the largest gates read their ReLU."""

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, v = graph.placeholder("x"), graph.placeholder("v")
        return graph.call_function(aten.threshold_backward.default, (v, graph.call_function(aten.relu.default, (x,)), 0))

    for elements, expected in ((2**16 - 1, False), (2**16, True), (2**20 - 1, True), (2**20, False)):
        x, v = randn(2, elements), randn(2, elements, seed=1)
        after, refusals = lowered(gates.byte_gates_of_middle_size, with_examples(program(build), x, v), x, v)
        assert refusals == []
        assert ("view.dtype" in calls(after)) is expected


def exampled(weight: Tensor, v: tuple[int, ...], **options: Any) -> fx.GraphModule:
    return with_examples(convolution(weight, **options), randn(*v).to(weight.dtype))


@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        ((3, 3), (6, 5), {"padding": 1}),
        ((3, 3), (6, 5), {}),
        ((2, 4), (5, 7), {"padding": [0, 1]}),
        ((1, 1), (5, 4), {}),
        ((7, 7), (6, 6), {"stride": 2, "padding": 3, "output_padding": 1}),
        ((3, 3), (5, 7), {"stride": 2}),
        ((2, 2), (5, 7), {"stride": 2, "padding": 1}),
        ((11, 11), (4, 3), {"stride": 4, "padding": 2, "output_padding": 1}),
        ((4, 4), (3, 3), {"stride": 4}),
        ((2, 3), (4, 4), {"stride": 3, "output_padding": 2}),
        ((5, 5), (3, 4), {"padding": 3}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels_are_painted_in_blocks(
    kernel: tuple[int, int], size: tuple[int, int], options: dict[str, Any], channels: int
) -> None:
    """A transposed convolution into an image: pixels of a block are channels of a plain convolution."""
    before = exampled(randn(4, channels, *kernel), (2, 4, *size), **options)
    after, refusals = lowered(convolutions.transposed_to_pixel_shuffle, before, randn(2, 4, *size))
    assert refusals == []
    (node,) = after.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert node.args[6] is False
    assert "pixel_shuffle" in calls(after)
    expected = after.graph.output_node().args[0].meta["val"].shape
    assert list(expected) == list(before(randn(2, 4, *size)).shape)


@pytest.mark.parametrize(
    ("weight", "options", "why"),
    [
        (randn(4, 1, 3, 3), {"groups": 2}, "2 groups, dilation [1, 1]"),
        (randn(4, 3, 3, 3), {"dilation": 2}, "1 groups, dilation [2, 2]"),
        (randn(4, 3, 3, 3), {"stride": [2, 1]}, "stride [2, 1]"),
        (randn(4, 3, 3), {}, "f64[4, 3, 3] on cpu"),
    ],
)
def test_blocks_that_are_not_painted(weight: Tensor, options: dict[str, Any], why: str) -> None:
    size = (2, 4, 6, 5)[: weight.dim()]
    before = exampled(weight, size, **options)
    after, (refusal,) = lowered(convolutions.transposed_to_pixel_shuffle, before, randn(*size))
    assert str(refusal) == f"blocks of pixels as channels not used at convolution_default: {why}"
    assert calls(after) == calls(before)


def test_many_channels_are_not_painted() -> None:
    """They fill a vector, so nothing is refused."""
    before = exampled(randn(4, 5, 3, 3), (2, 4, 6, 5))
    after, refusals = lowered(convolutions.transposed_to_pixel_shuffle, before, randn(2, 4, 6, 5))
    assert refusals == [] and calls(after) == calls(before)


# oneDNN -----------------------------------------------------------------------------------------------------------------


def off(got: Tensor, twin: Tensor) -> float:
    return float((got.double() - twin).abs().sum() / twin.abs().sum())


@needs_onednn
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("weight", "size", "options"),
    [
        (randn(8, 4, 3, 3), (2, 4, 7, 6), {"transposed": False, "padding": 1}),
        (randn(8, 2, 3, 2), (2, 4, 7, 6), {"transposed": False, "stride": [2, 1], "dilation": [1, 2], "groups": 2}),
        (randn(4, 6, 3, 3), (3, 4, 7, 6), {"padding": 1}),
        (randn(4, 6, 1, 1), (1, 4, 7, 6), {}),
        (randn(4, 3, 3, 3), (2, 4, 5, 6), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
        (randn(4, 1, 3, 3), (2, 4, 5, 6), {"padding": 1, "groups": 4}),
    ],
    ids=["plain", "grouped", "transposed", "1x1", "transposed, strided, grouped", "transposed, depthwise"],
)
def test_prepacked_convolutions(weight: Tensor, size: tuple[int, ...], options: dict[str, Any], last: bool) -> None:
    """As near to float64 as PyTorch's own convolution is."""
    before = exampled(weight.float(), size, **options)
    after = copy_graph(before)
    assert onednn.prepack(after) == []
    after.recompile()
    (node,) = [n for n in after.graph.nodes if n.target in lower.OPERATORS]
    assert getattr(after, node.args[1].target).is_mkldnn
    x = randn(*size, seed=3).float().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    twin = convolution(weight.float().double(), **options)(x.double())
    assert after(x).shape == twin.shape
    assert off(after(x), twin) <= 2 * off(before(x), twin) + 1e-6
    assert onednn.prepack(after) == []


@needs_onednn
@pytest.mark.parametrize(
    ("weight", "size", "options", "why"),
    [
        (randn(8, 4, 3, 3), (2, 4, 7, 6), {"transposed": False}, "f64[8, 4, 3, 3]"),
        (randn(8, 4, 3).float(), (2, 4, 7), {"transposed": False}, "f32[8, 4, 3]"),
    ],
)
def test_weights_that_are_not_packed(weight: Tensor, size: tuple[int, ...], options: dict[str, Any], why: str) -> None:
    before = exampled(weight, size, **options)
    after = copy_graph(before)
    (refusal,) = onednn.prepack(after)
    assert str(refusal) == f"weights in oneDNN's own order not used at convolution_default: {why}"
    assert calls(after) == calls(before)


def residual(weight: Tensor) -> Callable[[fx.Graph, Any], Any]:
    """``relu(conv(x) + y)`` with y the caller's, read later, what is convolved, and memory of its own."""
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def build(graph: fx.Graph, constant: Any) -> Any:
        x, w, b = (
            graph.placeholder("x"),
            constant("w", weight),
            constant("b", weight[:, 0, 0, 0]),
        )  # of a stride that oneDNN does not know
        y = graph.call_function(aten.relu.default, (graph.call_function(aten.convolution.default, (x, w, b, *rest)),))
        last = y
        for which in ("caller's", "read later", "convolved", "own"):
            own = graph.call_function(aten.neg.default, (last,)) if which == "own" else last
            summand = {"caller's": x, "read later": y}.get(which, own)
            convolved = graph.call_function(aten.convolution.default, (last, w, b, *rest))
            total = graph.call_function(aten.add.Tensor, (convolved, summand))
            last = graph.call_function(aten.relu.default, (total,))
        return last, y

    return build


@needs_onednn
def test_fused_convolutions() -> None:
    """ReLUs and sums go into the convolution before them; a summand is written into unless it is the caller's or read later."""
    weight, x = randn(4, 4, 3, 3).float() / 6, randn(2, 4, 7, 6).float()
    kept = x.clone()
    before = with_examples(program(residual(weight)), x)
    after = copy_graph(before)
    assert onednn.prepack(after) == onednn.fuse_into_convolutions(after) == []
    after.recompile()
    names = [n.removeprefix("mkldnn.") for n in calls(after)]
    assert names == [
        "_convolution_pointwise", *["_convolution_pointwise.binary"] * 3, "neg", "_convolution_pointwise_.binary",
    ]  # fmt: skip
    twin = program(residual(weight.double()))(x.double())
    for got, expected, plain in zip(after(x), twin, before(x), strict=True):
        assert off(got, expected) <= 2 * off(plain, expected) + 1e-6
    assert torch.equal(x, kept)


def test_every_lowering_has_a_test() -> None:
    tested = {
        convolutions.flip_transposed, convolutions.channels_last, convolutions.transposed_to_pixel_shuffle,
        gates.byte_gates, gates.byte_masks, gates.byte_gates_of_middle_size,
        memory.early_coefficients, memory.free_views, memory.hold_views, memory.reuse_memory,
        onednn.prepack, onednn.fuse_into_convolutions, onednn.sum_samples, pooling.gates_before_pools, pooling.scatter_columns,
        pooling.pools_without_input, shares.add_shares, shares.dot_shares, shares.join_shares,
    }  # fmt: skip
    assert {*lower.PASSES, *lower.QUICK} <= tested
