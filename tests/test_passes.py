"""Every pass: the graph before and after it, the same function, nothing left to change, names and origins kept."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import frpc
from frpc import canonicalize, fused, lower, optimize
from frpc.attention import expand_attention
from frpc.capture import capture, snapshot
from frpc.decompose import expand_composites
from frpc.folding import fold_batch_norm
from frpc.graph import NOWHERE, origin_of
from frpc.lower import Refusal
from frpc.pipeline import copy_graph, front
from frpc.precision import keep_float64
from frpc.recurrent import unroll_recurrent_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),  # torch's note on its speed
    pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning"),  # a recurrent layer flattens its weights anew
]

aten = torch.ops.aten
X, S, I, D = (3, 4), (3, 4, 9), (3, 4, 8, 7), (3, 4, 4, 5, 3)  # noqa: E741 - features, a sequence, an image, a volume


class Function(nn.Module):
    """A line of user code in the module's parts and x."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with batch statistics that are no identity."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)
            if part.affine:
                nn.init.normal_(part.weight, generator=generator)
                nn.init.normal_(part.bias, generator=generator)
    return model.double().eval()


def captured(model: nn.Module, *shapes: tuple[int, ...]) -> fx.GraphModule:
    return capture(snapshot(trained(model)), [randn(*shape) for shape in shapes]).graph_module


def calls(graph_module: fx.GraphModule) -> list[str]:
    """The operators in order, in short."""
    return [
        "getitem" if n.target is operator.getitem else str(n.target).removeprefix("aten.").removesuffix(".default")
        for n in graph_module.graph.nodes
        if n.op == "call_function"
    ]


def layers(graph_module: fx.GraphModule) -> list[str]:
    return sorted(name for node in graph_module.graph.nodes for name in node.meta.get("layers", ()))


def check_examples(graph_module: fx.GraphModule, inputs: list[Tensor]) -> None:
    """Example values say what the nodes compute, with the batch symbolic; every call knows its line."""

    class Checker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function":
                assert origin_of(n) is not NOWHERE, n.format_node()
            if n.op != "output":
                for example, value in pairs(n.meta["val"], result):
                    assert example.dtype == value.dtype
                    fits = [isinstance(e, torch.SymInt) or e == v for e, v in zip(example.shape, value.shape, strict=True)]
                    assert all(fits), f"{n.format_node()} {example.shape} {value.shape}"
            return result

    Checker(graph_module).run(*inputs)


def pairs(example: Any, value: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(value, tuple | list):
        for e, v in zip(example, value, strict=True):
            yield from pairs(e, v)
    elif isinstance(value, Tensor):
        yield example, value


def run_pass(
    one_pass: Callable[[fx.GraphModule], Any], before: fx.GraphModule, shapes: tuple[tuple[int, ...], ...]
) -> fx.GraphModule:
    """Runs a pass twice on a copy: the first time it changes the graph and not its function, the second time nothing."""
    after, inputs = copy_graph(before), [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert one_pass(after) is True
    after.graph.lint()
    after.recompile()
    torch.testing.assert_close(after(*inputs), before(*inputs), rtol=1e-12, atol=1e-12)
    assert layers(after) == layers(before)
    check_examples(after, inputs)
    code = after.code
    assert one_pass(after) is False
    after.recompile()
    assert after.code == code
    return after


# Canonicalization -------------------------------------------------------------------------------------------------------

# fmt: off
CANONICAL: dict[str, tuple[Any, nn.Module, tuple[int, ...], list[str], list[str]]] = {
    "copies": (
        canonicalize.remove_copies, Function(lambda m, x: aten.alias(x).relu() + aten.alias(x)), X,
        ["alias", "relu", "alias", "add.Tensor"], ["relu", "add.Tensor"]),
    "assertions": (
        canonicalize.remove_assertions, Function(lambda m, x: x.to(torch.float64) + 1), X,
        ["_assert_tensor_metadata", "add.Tensor"], ["add.Tensor"]),
    "conv 1d": (
        canonicalize.unify_convolutions, nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1, 2, 2)), S, ["conv1d"], ["convolution"]),
    "conv 2d": (
        canonicalize.unify_convolutions, nn.Sequential(nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), bias=False)), I,
        ["conv2d"], ["convolution"]),
    "conv 3d": (canonicalize.unify_convolutions, nn.Sequential(nn.Conv3d(4, 2, 2, padding=1)), D, ["conv3d"], ["convolution"]),
    "valid padding": (
        canonicalize.unify_convolutions, nn.Sequential(nn.Conv2d(4, 3, 2, 2, padding="valid")), I,
        ["conv2d.padding"], ["convolution"]),
    "same padding": (
        canonicalize.unify_convolutions, nn.Sequential(nn.Conv2d(4, 3, 3, padding="same")), I,
        ["conv2d.padding"], ["convolution"]),
    "same padding, even kernel": (
        canonicalize.unify_convolutions, nn.Sequential(nn.Conv1d(4, 3, 4, padding="same", dilation=3)), S,
        ["conv1d.padding"], ["constant_pad_nd", "convolution"]),
    "transposed conv": (
        canonicalize.unify_convolutions, nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2)), I,
        ["conv_transpose2d.input"], ["convolution"]),
    "transposed conv 1d": (
        canonicalize.unify_convolutions, nn.Sequential(nn.ConvTranspose1d(4, 2, 3)), S, ["conv_transpose1d"], ["convolution"]),
    "transposed conv 3d": (
        canonicalize.unify_convolutions, nn.Sequential(nn.ConvTranspose3d(4, 2, 2)), D,
        ["conv_transpose3d.input"], ["convolution"]),
    "recurrent layer": (
        unroll_recurrent_layers, Function(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(9, 3, batch_first=True)), S,
        ["sym_size.int", "zeros", "rnn_tanh.input", "getitem"],
        ["sym_size.int", "zeros", "select.int", "linear", *["select.int", "linear", "add.Tensor", "tanh"] * 4, "stack"]),
    "recurrent layer, last state alone": (
        unroll_recurrent_layers,
        Function(lambda m, x: m.rnn(x)[1][0], rnn=nn.RNN(9, 3, nonlinearity="relu", batch_first=True)), S,
        ["sym_size.int", "zeros", "rnn_relu.input", "getitem", "select.int"],
        ["sym_size.int", "zeros", "select.int", "linear", *["select.int", "linear", "add.Tensor", "relu"] * 4,
         "stack", "select.int"]),
    "split": (
        canonicalize.split_to_slices, Function(lambda m, x: x.split([1, 3], 1)[1].sum(1) - x.split(2, -2)[1].mean(1)), S,
        ["split_with_sizes", "getitem", "sum.dim_IntList", "split.Tensor", "getitem", "mean.dim", "sub.Tensor"],
        ["slice.Tensor", "sum.dim_IntList", "slice.Tensor", "mean.dim", "sub.Tensor"]),
    "chunk": (
        canonicalize.split_to_slices, Function(lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1)), S,
        ["split.Tensor", "getitem", "getitem", "cat"], ["slice.Tensor", "slice.Tensor", "cat"]),
    "split, unsafe or copied": (
        canonicalize.split_to_slices,
        Function(lambda m, x: aten.unsafe_split.Tensor(x, 2, 1)[1] + aten.split_with_sizes_copy(x, [2, 2], 1)[0]), S,
        ["unsafe_split.Tensor", "getitem", "split_with_sizes_copy", "getitem", "add.Tensor"],
        ["slice.Tensor", "slice.Tensor", "add.Tensor"]),
    "spelled out": (
        expand_composites, Function(lambda m, x: torch.aminmax(x, dim=-1)[1]), S, ["aminmax", "getitem"],
        ["amin", "amax"]),
    "unbind": (
        canonicalize.split_to_slices, Function(lambda m, x: x.unbind(1)[2] + x.unbind(-2)[-1]), S,
        ["unbind.int", "getitem", "unbind.int", "getitem", "add.Tensor"], ["select.int", "select.int", "add.Tensor"]),
    "stack": (
        canonicalize.stack_to_cat, Function(lambda m, x: torch.stack([x, x * 2.0], -1)), S,
        ["mul.Tensor", "stack"], ["mul.Tensor", "unsqueeze", "unsqueeze", "cat"]),
    "one channel written in place": (
        canonicalize.select_to_slice_scatter, Function(lambda m, x: torch.select_scatter(x, x[:, 0] * 2.0, 1, 1)), S,
        ["slice.Tensor", "select.int", "mul.Tensor", "select_scatter"],
        ["slice.Tensor", "select.int", "mul.Tensor", "unsqueeze", "slice_scatter"]),
    "circular padding": (
        canonicalize.unroll_circular_pads, Function(lambda m, x: F.pad(x, (1, 2), mode="circular")), S,
        ["pad"], ["slice.Tensor", "slice.Tensor", "cat"]),
    "shrinks": (
        canonicalize.recover_shrinks, Function(lambda m, x: F.softshrink(x, 0.3) + F.hardshrink(x, 0.2)), S,
        ["abs", "gt.Scalar", "sign", "mul.Tensor", "sub.Tensor", "mul.Tensor", "where.self", "abs", "le.Scalar",
         "where.ScalarSelf", "add.Tensor"],
        ["softshrink", "hardshrink", "add.Tensor"]),
    "max-pool 1d": (
        canonicalize.expose_winners, nn.Sequential(nn.MaxPool1d(3, 2, 1, 1, ceil_mode=True)), S,
        ["max_pool1d"], ["unsqueeze", "max_pool2d_with_indices", "getitem", "squeeze.dim"]),
    "max-pool 1d, stride not given": (
        canonicalize.expose_winners, Function(lambda m, x: F.max_pool1d(x, 2)), S,
        ["max_pool1d"], ["unsqueeze", "max_pool2d_with_indices", "getitem", "squeeze.dim"]),
    "max-pool 2d": (
        canonicalize.expose_winners, nn.Sequential(nn.MaxPool2d(3, 2, 1)), I,
        ["max_pool2d"], ["max_pool2d_with_indices", "getitem"]),
    "max-pool 3d": (
        canonicalize.expose_winners, nn.Sequential(nn.MaxPool3d(2)), D, ["max_pool3d"], ["max_pool3d_with_indices", "getitem"]),
    "shuffle": (
        canonicalize.unify_shuffles,
        Function(lambda m, x: x.view(-1, 2, 2, 8, 7).transpose(1, 2).contiguous().view(-1, 4, 8, 7)), I,
        ["view", "transpose.int", "clone", "view"], ["channel_shuffle"]),
    "gated linear unit": (
        canonicalize.expand_gated_linear_units, nn.Sequential(nn.GLU(1)), I,
        ["glu"], ["slice.Tensor", "slice.Tensor", "sigmoid", "mul.Tensor"]),
    "composite": (
        expand_composites, Function(lambda m, x: F.pad(x, (1, 2), value=0.5)), X, ["pad"], ["constant_pad_nd"]),
    "attention, causal": (
        expand_attention, Function(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), S,
        ["scaled_dot_product_attention"], ["transpose.int", "mul.Tensor", "matmul", "where.ScalarOther", "_softmax", "matmul"]),
    "attention, added mask": (
        expand_attention, Function(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.w), w=randn(4, 4)), S,
        ["scaled_dot_product_attention"], ["transpose.int", "mul.Tensor", "matmul", "add.Tensor", "_safe_softmax", "matmul"]),
    "attention, grouped queries": (
        expand_attention,
        Function(lambda m, x: F.scaled_dot_product_attention(x, k := x.mean(1, True), k, scale=0.3, enable_gqa=True)), I,
        ["mean.dim", "scaled_dot_product_attention"],
        ["mean.dim", *["unsqueeze", "expand", "flatten.using_ints"] * 2, "transpose.int", "mul.Tensor", "matmul", "_softmax",
         "matmul"]),
    "products added": (
        fused.expand_products_added,
        Function(lambda m, x: torch.addcmul(x, x, m.w, value=2) + torch.addcdiv(x, x, m.w), w=randn(4)), X,
        ["addcmul", "addcdiv", "add.Tensor"], ["mul.Tensor", "add.Tensor", "div.Tensor", "add.Tensor", "add.Tensor"]),
    "interpolation": (
        fused.expand_products_added, Function(lambda m, x: torch.lerp(x, x.relu(), m.w), w=randn(4)), X,
        ["relu", "lerp.Tensor"], ["relu", "sub.Tensor", "mul.Tensor", "add.Tensor"]),
    "moments": (
        fused.expand_moments, Function(lambda m, x: torch.sub(*torch.var_mean(x, -1)) + torch.std_mean(x, -1)[0]), S,
        ["var_mean.dim", "getitem", "getitem", "sub.Tensor", "std_mean.dim", "getitem", "add.Tensor"],
        ["var.correction", "mean.dim", "sub.Tensor", "std.correction", "add.Tensor"]),
    "bounds": (
        fused.expand_bounds,
        Function(lambda m, x: torch.clamp(x, m.w, m.v) - torch.clamp_min(x, m.w), w=randn(4), v=randn(4).abs()), X,
        ["clamp.Tensor", "clamp_min.Tensor", "sub.Tensor"], ["maximum", "minimum", "maximum", "sub.Tensor"]),
    "distances": (
        fused.expand_distances, Function(lambda m, x: torch.cdist(x, m.w), w=randn(5, 9)), S,
        ["cdist"], ["unsqueeze", "unsqueeze", "sub.Tensor", "linalg_vector_norm"]),
    "similarity": (
        fused.expand_similarities, Function(lambda m, x: F.cosine_similarity(x, m.w, dim=-1), w=randn(4)), X,
        ["cosine_similarity"], [*["linalg_vector_norm", "clamp_min", "div.Tensor"] * 2, "mul.Tensor", "sum.dim_IntList"]),
    "norm by its older name": (
        fused.unify_norms, Function(lambda m, x: aten.norm.ScalarOpt_dim(x, 3, [-1])), S,
        ["norm.ScalarOpt_dim"], ["linalg_vector_norm"]),
    "constants": (
        canonicalize.fold_constants, Function(lambda m, x: F.linear(x, m.w * 2, m.w.sum(1)), w=randn(5, 4)), X,
        ["mul.Tensor", "sum.dim_IntList", "linear"], ["linear"]),
    "weight norm": (
        canonicalize.fold_constants, nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), X,
        ["_weight_norm", "linear"], ["linear"]),
}
# fmt: on


@pytest.mark.parametrize("name", CANONICAL)
def test_canonicalization(name: str) -> None:
    one_pass, model, shape, before, after = CANONICAL[name]
    graph_module = captured(model, shape)
    assert calls(graph_module) == before
    assert calls(run_pass(one_pass, graph_module, (shape,))) == after


def test_every_canonicalization_has_a_test() -> None:
    tested = {one_pass for one_pass, *_ in CANONICAL.values()} | {
        canonicalize.refuse_random,
        keep_float64,
    }  # test_precision.py has the latter
    assert [p.__name__ for p in canonicalize.PASSES if p not in tested] == []


def test_passes_leave_other_graphs_alone() -> None:
    graph_module = captured(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), X)
    code = graph_module.code
    for one_pass in canonicalize.PASSES:
        assert one_pass(graph_module) is False
        graph_module.recompile()
        assert graph_module.code == code


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.rand_like(x),
        lambda m, x: x + torch.randn(4),
        lambda m, x: x * torch.bernoulli(torch.full((4,), 0.5)),
        lambda m, x: x + torch.empty_like(x).normal_(),
        lambda m, x: x * torch.randint(0, 2, (4,)),
        lambda m, x: x[:, torch.randperm(4)],
        lambda m, x: F.dropout(x, 0.5),
        lambda m, x: F.alpha_dropout(x, 0.5, True),
        lambda m, x: F.rrelu(x, training=True),
    ],
    ids=["rand", "randn", "bernoulli", "normal_", "randint", "randperm", "dropout", "alpha dropout", "rrelu"],
)
def test_random_numbers_are_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(frpc.errors.TrainingModeError, match=r"draws random numbers in evaluation mode\n .*test_passes.py:\d+ "):
        canonicalize.refuse_random(captured(Function(function), X))


def test_functions_that_are_random_in_training_alone() -> None:
    model = Function(lambda m, x: F.rrelu(F.dropout(x, 0.5, False)) + F.scaled_dot_product_attention(x, x, x))
    assert canonicalize.refuse_random(captured(model, (3, 4, 4))) is False


# Batch-norm folding -----------------------------------------------------------------------------------------------------


def canonical(model: nn.Module, *shapes: tuple[int, ...]) -> fx.GraphModule:
    return front(snapshot(trained(model)), [randn(*shape) for shape in shapes], None).canonical


def fold(keep: frozenset[str] = frozenset()) -> Callable[[fx.GraphModule], bool]:
    return lambda graph_module: fold_batch_norm(graph_module, keep)


NORM = ["_native_batch_norm_legit_no_training", "getitem"]
# fmt: off
FOLDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv 1d": (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), S),
    "conv 2d": (nn.Sequential(nn.Conv2d(4, 6, 3, 2, bias=False), nn.BatchNorm2d(6, eps=0.3)), I),
    "conv 3d": (nn.Sequential(nn.Conv3d(4, 2, 2), nn.BatchNorm3d(2, affine=False)), D),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), I),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)), I),
    "transposed, groups": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), 1, (1, 0), 2, bias=False), nn.BatchNorm2d(6)), I),
    "transposed 1d, depthwise": (nn.Sequential(nn.ConvTranspose1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)), S),
    "linear": (nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)), X),
}
# fmt: on


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_goes_into_the_weights(name: str) -> None:
    model, shape = FOLDED[name]
    graph_module = canonical(model, shape)
    (layer,) = [c for c in calls(graph_module) if c not in NORM]
    assert calls(graph_module) == [layer, *NORM]
    folded = run_pass(fold(), graph_module, (shape,))
    assert calls(folded) == [layer]
    (node,) = [n for n in folded.graph.nodes if n.op == "call_function"]
    assert node.meta["layers"] == ("0", "1")
    assert node.meta["folded"] == "1"


def test_layers_asked_for_stay() -> None:
    """`keep` names the convolution: its own output, before the norm, is wanted."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2))
    graph_module = canonical(model, I)
    assert calls(run_pass(fold(frozenset({"0"})), graph_module, (I,))) == ["convolution", *NORM, "convolution"]
    assert calls(run_pass(fold(frozenset({"1"})), graph_module, (I,))) == ["convolution", "convolution"]


def test_a_module_called_twice_folds_once() -> None:
    """The call that the norm follows takes new weights; the other keeps the old."""
    model = Function(lambda m, x: m.norm(m.conv(x)) + m.conv(x), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6))
    folded = run_pass(fold(), canonical(model, I), (I,))
    assert calls(folded) == ["convolution", "convolution", "add.Tensor"]
    first, second = folded.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert first.args[1] is not second.args[1]


def test_a_pair_called_twice_folds_twice() -> None:
    pair = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = Function(lambda m, x: m.pair(m.pair(x).relu()) - m.pair(x), pair=pair)
    folded = run_pass(fold(), canonical(model, I), (I,))
    assert calls(folded) == ["convolution", "relu", "convolution", "convolution", "sub.Tensor"]


NOT_FOLDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "its result is used elsewhere": (
        Function(lambda m, x: m.norm(y := m.conv(x)) + y.relu(), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)),
        I,
    ),
    "something in between": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), I),
    "nothing before": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), I),
    "channels that are not the features": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (3, 4, 5)),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_batch_norm_that_cannot_fold_stays(name: str) -> None:
    model, shape = NOT_FOLDED[name]
    graph_module = canonical(model, shape)
    before = calls(graph_module)
    assert fold_batch_norm(graph_module, frozenset()) is False
    assert calls(graph_module) == before


# Optimization -----------------------------------------------------------------------------------------------------------


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


def with_examples(graph_module: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """Notes on every node the value it has at some inputs, as tracing does."""

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["val"] = super().run_node(n)
            return n.meta["val"]

    Noting(graph_module).run(*inputs)
    return graph_module


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
        optimize.remove_dead,
        optimize.merge_common,
        optimize.merge_scales,
        optimize.fold_constants,
        optimize.drop_unread,
        optimize.fold_added_bias,
        optimize.drop_covered_gates,
    }
    assert set(optimize.PASSES) <= tested


# Lowering ---------------------------------------------------------------------------------------------------------------


def lowered(
    one_pass: Callable[[fx.GraphModule], list[Refusal]], before: fx.GraphModule, *inputs: Tensor
) -> tuple[fx.GraphModule, list[Refusal]]:
    """Runs a pass twice: the same function, and the second time the same graph and the same refusals."""
    after, expected = copy_graph(before), before(*inputs)
    refusals = one_pass(after)
    after.graph.lint()
    after.recompile()
    torch.testing.assert_close(after(*inputs), expected, rtol=1e-12, atol=1e-12)
    code, copied = after.code, copy_graph(after)
    assert [r for r in one_pass(copied) if r not in refusals] == []
    copied.recompile()
    assert copied.code == code
    return after, refusals


def convolution(weight: Tensor, **given: Any) -> fx.GraphModule:
    """One call of `aten.convolution` on `v`; the options are those of a transposed one where nothing is said."""
    spatial = weight.dim() - 2
    options = {"stride": 1, "padding": 0, "dilation": 1, "transposed": True, "output_padding": 0, "groups": 1} | given
    numbers = [[v] * spatial if type(v) is int and k != "groups" else v for k, v in options.items()]

    def build(graph: fx.Graph, constant: Any) -> Any:
        v, w = graph.placeholder("v"), constant("weight", weight)
        return graph.call_function(aten.convolution.default, (v, w, None, *numbers))

    return program(build)


@pytest.mark.parametrize(
    ("weight", "v", "options"),
    [
        (randn(4, 3, 3, 3), (2, 4, 5, 7), {}),
        (randn(4, 3, 3, 2), (2, 4, 5, 7), {"padding": [2, 1], "dilation": [1, 3]}),
        (randn(4, 1, 3), (2, 4, 6), {"padding": [1]}),
        (randn(2, 3, 2, 1, 3), (2, 2, 4, 3, 5), {"padding": [1, 0, 0]}),
    ],
    ids=["2d", "2d, dilated", "1d", "3d"],
)
def test_transposed_convolutions_are_flipped(weight: Tensor, v: tuple[int, ...], options: dict[str, Any]) -> None:
    after, refusals = lowered(lower.flip_transposed, convolution(weight, **options), randn(*v))
    assert refusals == []
    (node,) = after.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert node.args[6] is False
    assert node.args[1].target == "weight_flipped"


@pytest.mark.parametrize(
    ("weight", "v", "options", "why"),
    [
        (randn(4, 3, 3, 3), (2, 4, 5, 7), {"stride": [2, 1]}, "stride [2, 1]"),
        (randn(4, 3, 3, 3), (2, 4, 5, 7), {"groups": 2}, "2 groups"),
        (randn(4, 3, 2, 2), (2, 4, 5, 7), {"padding": 2}, "padding wider than the kernel"),
        (randn(4, 3, 1, 1), (2, 4, 5, 7), {}, "a 1x1 kernel"),
    ],
    ids=["stride", "groups", "padding", "1x1"],
)
def test_refused_flips_say_why(weight: Tensor, v: tuple[int, ...], options: dict[str, Any], why: str) -> None:
    before = convolution(weight, **options)
    after, (refusal,) = lowered(lower.flip_transposed, before, randn(*v))
    assert calls(after) == calls(before)
    assert str(refusal).startswith("stride-1 transposed convolution as a convolution not used at convolution_default: ")
    assert why in refusal.why


def test_a_weight_used_both_ways_is_kept_and_flipped_once() -> None:
    weight = randn(4, 4, 3, 3)

    def build(graph: fx.Graph, constant: Any) -> Any:
        v, w = graph.placeholder("v"), constant("weight", weight)
        rest = ([1, 1], [1, 1], [1, 1])
        plain = graph.call_function(aten.convolution.default, (v, w, None, *rest, False, [0, 0], 1))
        for _ in range(2):
            plain = graph.call_function(aten.convolution.default, (plain, w, None, *rest, True, [0, 0], 1))
        return plain

    after, refusals = lowered(lower.flip_transposed, program(build), randn(2, 4, 5, 6))
    names = [n.args[1].target for n in after.graph.find_nodes(op="call_function", target=aten.convolution.default)]
    assert names == ["weight", "weight_flipped", "weight_flipped"]
    assert refusals == []


def test_channels_last() -> None:
    """Weights of 2-d convolutions change their memory order and nothing else."""
    before = convolution(randn(4, 3, 3, 3), transposed=False, padding=1)
    after, refusals = lowered(lower.channels_last, before, randn(2, 3, 5, 7))
    assert refusals == []
    assert after.weight.is_contiguous(memory_format=torch.channels_last)
    assert before.weight.is_contiguous()
    _, (refusal,) = lowered(lower.channels_last, convolution(randn(4, 3, 3), transposed=False), randn(2, 3, 5))
    assert str(refusal) == "channels-last not used at convolution_default: f64[4, 3, 3] on cpu"


def test_free_views() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        y = graph.call_function(aten.view.default, (x, [2, -1]))
        return graph.call_function(aten._unsafe_view.default, (y, [3, 4]))

    before = program(build)
    after, refusals = lowered(lower.free_views, before, randn(3, 4))
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
        view = graph.call_function(aten.reshape.default, (square, [4, 3]))
        return graph.call_function(aten.neg.default, (view,)), graph.call_function(aten.div.Tensor, (c, x)), third

    x = randn(3, 4)
    before = with_examples(program(build), x)
    kept, constant = x.clone(), before.c.clone()
    after, refusals = lowered(lower.reuse_memory, before, x)
    assert calls(before) == ["mul.Tensor", "relu", "add.Tensor", "abs", "mul.Tensor", "reshape", "neg", "div.Tensor"]
    assert calls(after) == ["mul.Tensor", "relu_", "add_.Tensor", "abs", "mul.Tensor", "reshape", "neg", "div.Tensor"]
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
    after, _ = lowered(lower.reuse_memory, with_examples(program(build), x), x)
    assert calls(after) == ["mul.Tensor", "relu", "abs_", "neg", "reshape", "add_.Tensor", "abs"]


def test_reuse_memory_needs_the_same_size_and_type() -> None:
    def build(graph: fx.Graph, constant: Any) -> Any:
        x = graph.placeholder("x")
        small = graph.call_function(aten.abs.default, (x,))
        wide = graph.call_function(aten.add.Tensor, (small, constant("c", randn(2, 3, 4))))
        single = graph.call_function(aten.neg.default, (constant("s", randn(2, 3, 4).float()),))
        return graph.call_function(aten.mul.Tensor, (single, graph.call_function(aten.reshape.default, (wide, [2, 3, 4]))))

    x = randn(3, 4)
    after, _ = lowered(lower.reuse_memory, with_examples(program(build), x), x)
    assert calls(after) == ["abs", "add.Tensor", "neg", "reshape", "mul.Tensor"]


def test_every_lowering_has_a_test() -> None:
    assert set(lower.PASSES) <= {lower.flip_transposed, lower.channels_last, lower.free_views, lower.reuse_memory}
