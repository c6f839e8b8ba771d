"""Every canonicalization and folding: the graph before and after, the same function, nothing left to change, origins kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import frpc
from frpc.canonicalize import fused, moving, recovered, sliding, trimming
from frpc.canonicalize import passes as canonicalize
from frpc.canonicalize.attention import expand_attention
from frpc.canonicalize.bags import expand_embedding_bags
from frpc.canonicalize.batch_norm import fold_batch_norm
from frpc.canonicalize.complex.complexes import split_complex
from frpc.canonicalize.precision import keep_float64, norms_in_one_type, promote_explicitly
from frpc.canonicalize.recurrent import unroll_recurrent_layers
from frpc.capture.decompose import expand_composites
from frpc.capture.export import capture
from frpc.core.graph import NOWHERE, origin_of
from frpc.core.snapshot import snapshot
from frpc.core.stages import copy_graph
from frpc.driver.prepare import prepare
from graphs import calls, randn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),  # torch's note on its speed
    pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning"),  # a recurrent layer flattens its weights again
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
        trimming.remove_copies, Function(lambda m, x: aten.alias(x).relu() + aten.alias(x)), X,
        ["alias", "relu", "alias", "add.Tensor"], ["relu", "add.Tensor"]),
    "assertions": (
        trimming.remove_assertions, Function(lambda m, x: x.to(torch.float64) + 1), X,
        ["_assert_tensor_metadata", "add.Tensor"], ["add.Tensor"]),
    "conv 1d": (
        sliding.unify_convolutions, nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1, 2, 2)), S, ["conv1d"], ["convolution"]),
    "conv 2d": (
        sliding.unify_convolutions, nn.Sequential(nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), bias=False)), I,
        ["conv2d"], ["convolution"]),
    "conv 3d": (sliding.unify_convolutions, nn.Sequential(nn.Conv3d(4, 2, 2, padding=1)), D, ["conv3d"], ["convolution"]),
    "valid padding": (
        sliding.unify_convolutions, nn.Sequential(nn.Conv2d(4, 3, 2, 2, padding="valid")), I,
        ["conv2d.padding"], ["convolution"]),
    "same padding": (
        sliding.unify_convolutions, nn.Sequential(nn.Conv2d(4, 3, 3, padding="same")), I,
        ["conv2d.padding"], ["convolution"]),
    "same padding, even kernel": (
        sliding.unify_convolutions, nn.Sequential(nn.Conv1d(4, 3, 4, padding="same", dilation=3)), S,
        ["conv1d.padding"], ["constant_pad_nd", "convolution"]),
    "transposed conv": (
        sliding.unify_convolutions, nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2)), I,
        ["conv_transpose2d.input"], ["convolution"]),
    "transposed conv 1d": (
        sliding.unify_convolutions, nn.Sequential(nn.ConvTranspose1d(4, 2, 3)), S, ["conv_transpose1d"], ["convolution"]),
    "transposed conv 3d": (
        sliding.unify_convolutions, nn.Sequential(nn.ConvTranspose3d(4, 2, 2)), D,
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
        moving.split_to_slices, Function(lambda m, x: x.split([1, 3], 1)[1].sum(1) - x.split(2, -2)[1].mean(1)), S,
        ["split_with_sizes", "getitem", "sum.dim_IntList", "split.Tensor", "getitem", "mean.dim", "sub.Tensor"],
        ["slice.Tensor", "sum.dim_IntList", "slice.Tensor", "mean.dim", "sub.Tensor"]),
    "chunk": (
        moving.split_to_slices, Function(lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1)), S,
        ["split.Tensor", "getitem", "getitem", "cat"], ["slice.Tensor", "slice.Tensor", "cat"]),
    "split, unsafe or copied": (
        moving.split_to_slices,
        Function(lambda m, x: aten.unsafe_split.Tensor(x, 2, 1)[1] + aten.split_with_sizes_copy(x, [2, 2], 1)[0]), S,
        ["unsafe_split.Tensor", "getitem", "split_with_sizes_copy", "getitem", "add.Tensor"],
        ["slice.Tensor", "slice.Tensor", "add.Tensor"]),
    "spelled out": (
        expand_composites, Function(lambda m, x: torch.aminmax(x, dim=-1)[1]), S, ["aminmax", "getitem"],
        ["amin", "amax"]),
    "unbind": (
        moving.split_to_slices, Function(lambda m, x: x.unbind(1)[2] + x.unbind(-2)[-1]), S,
        ["unbind.int", "getitem", "unbind.int", "getitem", "add.Tensor"], ["select.int", "select.int", "add.Tensor"]),
    "stack": (
        moving.stack_to_cat, Function(lambda m, x: torch.stack([x, x * 2.0], -1)), S,
        ["mul.Tensor", "stack"], ["mul.Tensor", "unsqueeze", "unsqueeze", "cat"]),
    "one channel written in place": (
        moving.select_to_slice_scatter, Function(lambda m, x: torch.select_scatter(x, x[:, 0] * 2.0, 1, 1)), S,
        ["slice.Tensor", "select.int", "mul.Tensor", "select_scatter"],
        ["slice.Tensor", "select.int", "mul.Tensor", "unsqueeze", "slice_scatter"]),
    "circular padding": (
        moving.unroll_circular_pads, Function(lambda m, x: F.pad(x, (1, 2), mode="circular")), S,
        ["pad"], ["slice.Tensor", "slice.Tensor", "cat"]),
    "shrinks": (
        recovered.recover_shrinks, Function(lambda m, x: F.softshrink(x, 0.3) + F.hardshrink(x, 0.2)), S,
        ["abs", "gt.Scalar", "sign", "mul.Tensor", "sub.Tensor", "mul.Tensor", "where.self", "abs", "le.Scalar",
         "where.ScalarSelf", "add.Tensor"],
        ["softshrink", "hardshrink", "add.Tensor"]),
    "max-pool 1d": (
        sliding.expose_winners, nn.Sequential(nn.MaxPool1d(3, 2, 1, 1, ceil_mode=True)), S,
        ["max_pool1d"], ["unsqueeze", "max_pool2d_with_indices", "getitem", "squeeze.dim"]),
    "max-pool 1d, stride not given": (
        sliding.expose_winners, Function(lambda m, x: F.max_pool1d(x, 2)), S,
        ["max_pool1d"], ["unsqueeze", "max_pool2d_with_indices", "getitem", "squeeze.dim"]),
    "max-pool 2d": (
        sliding.expose_winners, nn.Sequential(nn.MaxPool2d(3, 2, 1)), I,
        ["max_pool2d"], ["max_pool2d_with_indices", "getitem"]),
    "max-pool 3d": (
        sliding.expose_winners, nn.Sequential(nn.MaxPool3d(2)), D, ["max_pool3d"], ["max_pool3d_with_indices", "getitem"]),
    "shuffle": (
        recovered.unify_shuffles,
        Function(lambda m, x: x.view(-1, 2, 2, 8, 7).transpose(1, 2).contiguous().view(-1, 4, 8, 7)), I,
        ["view", "transpose.int", "clone", "view"], ["channel_shuffle"]),
    "gated linear unit": (
        fused.expand_gated_linear_units, nn.Sequential(nn.GLU(1)), I,
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
        trimming.fold_constants, Function(lambda m, x: F.linear(x, m.w * 2, m.w.sum(1)), w=randn(5, 4)), X,
        ["mul.Tensor", "sum.dim_IntList", "linear"], ["linear"]),
    "weight norm": (
        trimming.fold_constants, nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), X,
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
        trimming.refuse_random,
        expand_embedding_bags,  # test_bags.py has it
        split_complex,  # test_complex.py has it
        keep_float64,  # test_precision.py has it
        norms_in_one_type,  # these three: test_rewrites.py, and autocast and caches in test_capture.py
        promote_explicitly,
        moving.drop_blank_operands,
    }
    assert [p.__name__ for p in canonicalize.PASSES if p not in tested] == []


def test_passes_leave_other_graphs_alone() -> None:
    graph_module = captured(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), X)
    code = graph_module.code
    for one_pass in canonicalize.PASSES:
        assert one_pass(graph_module) is False
        graph_module.recompile()
        assert graph_module.code == code


# fmt: off
ALIKE: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "shrunk where large, else as it is": (
        lambda m, x: torch.where(x.abs() > 0.5, x - x.sign() * 0.5, x).sum(1, keepdim=True), torch.full((1, 3), 2.0)),
    "shrunk by twice the bound": (
        lambda m, x: torch.where(x.abs() > 0.5, torch.sub(x, x.sign() * 0.5, alpha=2), x * 0), torch.full((1, 3), 2.0)),
    "shrunk by a bound below 0": (lambda m, x: torch.where(x.abs() > -0.5, x + x.sign() * 0.5, x * 0), randn(2, 3)),
    "shuffled with the samples": (
        lambda m, x: x.reshape(2 * x.shape[0], 2, 2, 5).transpose(1, 2).reshape(x.shape[0], 8, 5), randn(3, 8, 5)),
    "shuffled vectors": (lambda m, x: x.reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6), randn(3, 6)),
    "a product added to a sum with a product": (lambda m, x: torch.addcmul(torch.addcmul(x, x, x), x, x), randn(2, 4)),
    "between what lies between": (lambda m, x: torch.lerp(torch.lerp(x, x * 2, x.relu()), x, x.relu()), randn(2, 4)),
    "bounded twice by tensors": (lambda m, x: torch.clamp(torch.clamp_min(x, x / 2), -x.abs(), x.abs() / 2), randn(2, 4)),
    "distances of distances": (lambda m, x: torch.cdist(torch.cdist(x, x[:, :2]), x[:, :4, :2]), randn(2, 4, 5)),
    "moments of moments": (
        lambda m, x: torch.var_mean(x * torch.var_mean(x, 1, keepdim=True)[1], 1, keepdim=True)[0], randn(2, 4)),
    "similar to each of several": (lambda m, x: F.cosine_similarity(x[:, None], x[:1].new_ones(5, 1), dim=1), randn(2, 4)),
    "similar, of fewer dimensions": (lambda m, x: F.cosine_similarity(x[:, None], x.new_ones(5, 4), dim=2), randn(2, 4)),
    "cut and continued round": (lambda m, x: F.pad(x, (2, -1, -1, 1), mode="circular"), randn(2, 3, 5, 4)),
    "float32 as bits": (lambda m, x: x * x.float().view(torch.int32).sign(), randn(2, 4)),
}
# fmt: on


@pytest.mark.parametrize("name", ALIKE)
def test_what_looks_like_something_else(name: str) -> None:
    """Compiled at one input and asked at others: what a pass takes for another function is wrong there."""
    function, example = ALIKE[name]
    model = Function(function)
    explainer = frpc.compile(model)
    explainer(example, target=(0,) * (model(example).dim() - 1))
    for batch in (1, 2, 3):
        x = torch.linspace(-0.6, 1.1, batch * example[0].numel(), dtype=example.dtype).reshape(batch, *example.shape[1:])
        x[0].view(-1)[0] = 0.2
        torch.testing.assert_close(explainer(x, target=(0,) * (model(x).dim() - 1)).output, model(x))


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
        trimming.refuse_random(captured(Function(function), X))


def test_functions_that_are_random_in_training_alone() -> None:
    model = Function(lambda m, x: F.rrelu(F.dropout(x, 0.5, False)) + F.scaled_dot_product_attention(x, x, x))
    assert trimming.refuse_random(captured(model, (3, 4, 4))) is False


# Batch-norm folding -----------------------------------------------------------------------------------------------------


def canonical(model: nn.Module, *shapes: tuple[int, ...]) -> fx.GraphModule:
    return prepare(snapshot(trained(model)), [randn(*shape) for shape in shapes], None).canonical


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
