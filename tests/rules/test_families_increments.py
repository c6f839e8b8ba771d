"""Gradients and increments: the gradient is PyTorch's, LID and DeepLIFT are complete, the identities of the papers hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
import twins
import twins_increments
from case import Case, aten
from cases import CASES
from families import (
    NETS,
    both_ways,
    built,
    by_sample,
    check_complete,
    compiled,
    error,
    explained,
    front_of,
    mlp,
    net,
    pooled,
    prepared,
    randn,
    residual,
)
from frpc.errors import UnsupportedOpError
from frpc.rules import LID, LRP, DeepLift, Gradient, LIDTaylor, LRPTaylor, RuleSet
from frpc.rules.increments.increments import INCREMENTS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's note on its speed


# Every operator -----------------------------------------------------------------------------------------------------------

NO_GRADIENT = {
    "detach": "PyTorch's derivative ends there; an account of values goes on",
    "scatter.src two carried": "PyTorch has no gradient of a source larger than the index",
    "scatter.src on a constant": "PyTorch has no gradient of a source larger than the index",
    "scatter_add smaller index": "PyTorch has no gradient of a source larger than the index",
    "grid_sampler_2d by a carried grid": "refused: the grid carries, and its derivative is not known",
    "heaviside": "refused: PyTorch has no derivative of it",
}
ORDER = {"median.dim", "nanmedian.dim", "mode", "kthvalue", "topk", "sort", "sort.stable"}  # refused without steps, see below
JUMPS = {
    "where.self condition of a carried value": "the condition is no number: what its change adds is carried by no operand",
    "masked_fill.Tensor of a carried value": "as where",
    "gather by a carried order": "the places are no numbers: what their change adds is carried by no operand",
    "index.Tensor one for each sample": "as gather",
    "index.Tensor one for each sample, apart": "as gather",
}
INCOMPLETE = {*ORDER, *JUMPS, "grid_sampler_2d by a carried grid", "heaviside"}


def swept(without: Any) -> list[Any]:
    """The cases whose call stands in the canonical graph; by default one of each operator with a rule of its own."""
    known = {case.id for case in CASES}
    assert set(without) <= known, "an exclusion names no case"
    chosen = [case for case in CASES if case.arguments is None and case.id not in without]
    own = {aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.rms_norm.default, *INCREMENTS}
    first = {case.op: case.id for case in reversed(chosen) if case.op in own}
    return [pytest.param(case, id=case.id, marks=() if case.id in first.values() else pytest.mark.slow) for case in chosen]


@functools.cache
def module_of(case_id: str) -> nn.Module:
    return next(case for case in CASES if case.id == case_id).module()


@pytest.mark.parametrize("case", swept(NO_GRADIENT))
def test_gradient_is_autograds(case: Case) -> None:
    """`Gradient()` pulls PyTorch's own derivative, and asks nothing of the batch size."""
    module, inputs = module_of(case.id), case.inputs()
    output = module(*inputs)
    seed = randn(*output.shape, seed=7)
    _, expected = torch.autograd.functional.vjp(module, inputs, seed)
    ready = prepared(module, inputs, Gradient(times_input=False))
    free = front_of(module, inputs).captured.static_batch_reason is None
    assert isinstance(ready.assignment.sources[0].meta["val"].shape[0], torch.SymInt) == free, "the rules fix the batch size"
    _, *found, _ = ready.run(inputs, seed)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and bool((f - e).abs().sum() <= 1e-10 * e.abs().sum())


@pytest.mark.parametrize("case", swept(INCOMPLETE))
def test_lid_is_complete(case: Case) -> None:
    """Increments of every operator add up exactly, between two inputs of either sign."""
    inputs = case.inputs()
    assert check_complete(module_of(case.id), inputs, case.inputs(1, seed=9), LID(), 1e-12) <= 1e-12


@pytest.mark.parametrize("case", [c for c in CASES if c.id in JUMPS], ids=lambda case: case.id)
def test_a_jump_is_reported(case: Case) -> None:
    """Where a choice that is no number changes from the reference to the input, the map says how much it lacks."""
    assert check_complete(module_of(case.id), case.inputs(), case.inputs(1, seed=9), LID(), 1e-12) > 0.01


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ORDER - {"mode"}], ids=lambda case: case.id)
def test_orders_need_steps(case: Case) -> None:
    """Sorting has no closed average: refused in words, and by n points complete in the limit."""
    module, inputs, reference = module_of(case.id), case.inputs(), case.inputs(1, seed=9)
    with pytest.raises(UnsupportedOpError, match=r"which elements it selects changes .* give steps, LID\(steps=10\)"):
        frpc.compile(module, inputs, rule=LID())
    missing = [check_complete(module, inputs, reference, LID(steps=n), 1e-12) for n in (3, 60)]
    assert missing[1] <= 0.05 and missing[1] < missing[0]


# Whole nets against their twins ---------------------------------------------------------------------------------------------

SMOOTH: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "ReLU": (lambda: pooled(True), (2, 6, 6)),
    "GELU": (lambda: pooled(True, nn.AvgPool2d, nn.GELU), (2, 6, 6)),
    "SiLU": (lambda: residual(True, nn.SiLU), (2, 6, 6)),
    "Sigmoid": (lambda: mlp(True, nn.Sigmoid), (6,)),
    "Tanh": (lambda: pooled(True, nn.MaxPool2d, nn.Tanh), (2, 6, 6)),
}


@functools.cache
def smooth(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net with that activation, two samples, and a reference of the same size."""
    make, shape = SMOOTH[name]
    return built(make), randn(2, *shape, seed=3), randn(1, *shape, seed=4)


INCREMENT_TWINS: dict[str, tuple[Callable[[Tensor], RuleSet], Callable[..., Tensor]]] = {
    "LID-Taylor": (lambda r: LIDTaylor(r), twins_increments.lid_taylor),
    "LID-IG, n = 1": (lambda r: LID(r, steps=1), functools.partial(twins_increments.lid_ig, steps=1)),
    "LID-IG, n = 10": (lambda r: LID(r, steps=10), functools.partial(twins_increments.lid_ig, steps=10)),
    "LID exact": (lambda r: LID(r), twins_increments.deeplift),
    "DeepLIFT": (lambda r: DeepLift(r), twins_increments.deeplift),
}


@pytest.mark.parametrize("name", INCREMENT_TWINS)
@pytest.mark.parametrize("of", [*SMOOTH, *NETS])
def test_increments_are_their_twins(of: str, name: str) -> None:
    """R handed down by L 13, L 20 and DeepLIFT's rescale rule, with the divisions the papers print."""
    model, x, reference = smooth(of) if of in SMOOTH else (*net(of), randn(1, *NETS[of][1], seed=4))
    make, twin = INCREMENT_TWINS[name]
    with torch.no_grad():
        change = model(x) - model(reference)
    layers, seed = twins.dense(model, x.shape[1:]), randn(*change.shape, seed=5)
    expected = by_sample(lambda a, r: twin(layers, a, reference.flatten(), r), x, seed * change)
    assert error(explained(model, x, make(reference), seed), expected) <= 1e-10


@pytest.mark.parametrize("of", [*SMOOTH, *NETS])
def test_plain_gradient_and_lrp_taylor_are_their_twins(of: str) -> None:
    """S 4: the chain rule; L 18: the same times the values."""
    model, x = smooth(of)[:2] if of in SMOOTH else net(of)
    with torch.no_grad():
        seed = randn(*model(x).shape, seed=5)
    layers = twins.dense(model, x.shape[1:])
    expected = by_sample(lambda a, v: twins_increments.gradient(layers, a, v), x, seed)
    assert error(explained(model, x, Gradient(times_input=False), seed), expected) <= 1e-10
    assert error(explained(model, x, LRPTaylor(), seed), x * expected) <= 1e-10


@pytest.mark.parametrize("rules", [Gradient(), LIDTaylor(), LID(), LID(steps=3), LID(pooling="path")], ids=str)
@pytest.mark.parametrize("of", ["ReLU", "SiLU", "Tanh"])
def test_forward_is_the_transpose(of: str, rules: RuleSet) -> None:
    """`<push(u), v> == <u, pull(v)>`, over the whole net and map by map."""
    model, x, _ = smooth(of)
    assert both_ways(model, (x,), rules) <= 1e-11


# Completeness at every layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow)],
    ids=["f32", "f64"],
)
@pytest.mark.parametrize("of", SMOOTH)
def test_every_layer_adds_up(of: str, dtype: torch.dtype, bound: float) -> None:
    """`sum R = f(x) - f(x_ref)` at the input and at each layer that everything passes through."""
    model, x, reference = smooth(of)
    model, x, reference = built(SMOOTH[of][0]).to(dtype), x.to(dtype), reference.to(dtype)
    explainer = compiled(model, x, rule=LID(reference))
    layers = [name for name in explainer.layers() if "body" not in name]  # a residual branch is passed by
    found = explainer.at(layers, x, target=1)
    explanation = explainer(x, target=1)
    with torch.no_grad():
        change = (model.double()(x.double()) - model(reference.double()))[:, 1]
    assert len(layers) >= 5
    for name, relevance in [*found.items(), ("input", explanation.relevance)]:
        assert isinstance(relevance, Tensor)
        lacking = (relevance.double().flatten(1).sum(1) - change).abs() / relevance.double().abs().flatten(1).sum(1)
        assert float(lacking.max()) <= bound, name
    assert bool((explanation.bias.abs() <= bound * change.abs().clamp(min=1.0)).all())


@pytest.mark.parametrize("steps", [(10, 100), pytest.param((10, 100, 1000), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("of", SMOOTH)
def test_many_steps_come_to_the_exact_average(of: str, steps: tuple[int, ...]) -> None:
    """L 21 with n = 10, 100, 1000: the distance falls as 1/n to the limit of infinitely many points."""
    if len(steps) == 2 and of not in ("ReLU", "Sigmoid"):
        pytest.skip("the others run with -m slow")
    model, x, reference = smooth(of)
    seed = randn(2, 4, seed=5)
    exact = explained(model, x, LID(reference, pooling="path"), seed)
    errors = [error(explained(model, x, LID(reference, steps=n), seed), exact) for n in steps]
    print(of, [f"n = {n}: {e:.1e}" for n, e in zip(steps, errors, strict=True)])
    assert all(e < 2 / n for n, e in zip(steps, errors, strict=True))
    assert all(4 * after < before for before, after in pairwise(errors))


def test_ends_and_path_differ_where_a_third_element_wins_on_the_way() -> None:
    """Both ways of a max pool add up; only the path gives to what wins in between."""
    model = nn.Sequential(nn.MaxPool2d((1, 3))).double().eval()
    x, reference = torch.tensor([[[[4.0, 3.0, 0.0]]]]).double(), torch.tensor([[[[0.0, 3.0, 4.0]]]]).double()
    x[0, 0, 0, 1] = reference[0, 0, 0, 1] = 2.5
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends, path = (explained(model, x, LID(reference, pooling=p), one).flatten() for p in ("ends", "path"))
    assert ends.tolist() == [2.0, 0.0, -2.0]  # half the way each
    assert path.tolist() == pytest.approx([1.5, 0.0, -1.5])  # the second wins from 3/8 to 5/8 of the way, and does not change


# Identities -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["mlp", "max pool", "residual", "strided"])
def test_without_bias_four_methods_are_one(of: str) -> None:
    """ReLU nets, no bias, zero reference: LID-Taylor = gradient * input = LRP-0 = DeepLIFT = LID."""
    model, x = net(of, bias=False)
    seed = randn(2, 4, seed=5)
    expected = explained(model, x, Gradient(), seed)
    for rules in (LIDTaylor(), LRP(0.0), DeepLift(), LID(), LID(steps=10), LRPTaylor()):
        assert error(explained(model, x, rules, seed), expected) <= 1e-12, rules


def test_with_bias_they_are_not() -> None:
    model, x = net("max pool")
    seed = randn(2, 4, seed=5)
    maps = [explained(model, x, rules, seed) for rules in (Gradient(), DeepLift(), LIDTaylor(), LID(steps=10))]
    assert error(maps[0], maps[2]) <= 1e-12  # reference 0: dx = x
    assert error(maps[1], maps[2]) > 0.05 and error(maps[3], maps[1]) > 1e-3


# References -----------------------------------------------------------------------------------------------------------------


def test_several_references_give_the_mean_of_single_ones() -> None:
    model, x, _ = smooth("ReLU")
    references = randn(3, 2, 6, 6, seed=8)
    explainer = compiled(model, x, rule=LID(references))
    single = [compiled(model, x, rule=LID(r[None])) for r in references]
    mean = sum(one(x, target=2).relevance for one in single) / 3
    assert error(explainer(x, target=2).relevance, mean) <= 1e-13
    inner = sum(one.at("2", x, target=2)["2"] for one in single) / 3
    assert error(explainer.at("2", x, target=2)["2"], inner) <= 1e-13
    assert LID(list(references.split(1))).account.reference.count == 3


def test_blur_is_the_blurred_input() -> None:
    """Another reference for every sample: what the blur takes away is explained."""
    model, x, _ = smooth("ReLU")
    explanation = compiled(model, x, rule=LID("blur"))(x, target=0)
    blurred = frpc.rules.references.Blur()(x)
    assert float(blurred.std()) < 0.5 * float(x.std())
    with torch.no_grad():
        change = (model(x) - model(blurred))[:, 0]
    relevance = explanation.relevance.flatten(1)
    assert bool(((relevance.sum(1) - change).abs() <= 1e-12 * relevance.abs().sum(1)).all())
    for k in range(2):
        one = compiled(model, x, rule=LID(blurred[k : k + 1]))(x[k : k + 1], target=0)
        assert error(explanation.relevance[k : k + 1], one.relevance) <= 1e-12


def test_data_mean() -> None:
    batches = [randn(3, 2, 4, seed=1), randn(5, 2, 4, seed=2)]
    assert error(frpc.data_mean(batches), torch.cat(batches).mean(0, keepdim=True)) <= 1e-15


def convolutions(explainer: frpc.Explainer) -> int:
    """How often the program convolves, transposes and all."""
    return sum(n.target is aten.convolution.default for n in explainer.program.graph.nodes)


def test_a_fixed_reference_costs_no_second_forward_pass() -> None:
    """It is propagated at compile time: as many convolutions as a gradient takes. A blur depends on the input."""
    model, x, reference = smooth("GELU")
    plain = convolutions(compiled(model, x, rule=Gradient()))
    assert convolutions(compiled(model, x, rule=LID(reference))) == plain == 4
    assert convolutions(compiled(model, x, rule=LID("zero"))) == plain
    assert convolutions(compiled(model, x, rule=LID("blur"))) == 6


def test_any_batch_meets_one_reference() -> None:
    """The compiled program takes other batch sizes."""
    model, x, reference = smooth("SiLU")
    explainer = compiled(model, x, rule=LID(reference))
    more = randn(5, 2, 6, 6, seed=12)
    assert error(explainer(more, target=1).relevance[3:4], explainer(more[3:4], target=1).relevance) <= 1e-13


# Blocks of transformers and recurrent nets ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads with a mask, a norm in front, a residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x)).view(x.shape[0], 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], 4, 6))


class Squeeze(nn.Module):
    """Squeeze and excitation: channels weighted by a gate of their own means."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3))))))[:, :, None, None]


class Last(nn.Module):
    """The last hidden state of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


BLOCKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "attention": (lambda: nn.Sequential(Attention(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(24, 3)), (4, 6)),
    "RMS norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 5), nn.SiLU(), nn.RMSNorm(5)), (4, 6)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten()), (2, 5, 5)),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()), (2, 5, 5)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU()), (2, 5, 5)),
    "gate": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), Squeeze(), nn.Flatten(), nn.Linear(36, 3)), (2, 5, 5)),
    "softmax": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 4), nn.LogSoftmax(-1)), (4, 6)),
    "LSTM": (lambda: nn.Sequential(Last(nn.LSTM(3, 4, batch_first=True)), nn.Linear(4, 3)), (3, 3)),
    "GRU": (lambda: nn.Sequential(Last(nn.GRU(3, 4, batch_first=True)), nn.Linear(4, 3)), (3, 3)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    """Gradients are PyTorch's and increments add up, through products of carried values, norms and softmax."""
    make, shape = BLOCKS[name]
    model, x, reference = built(make), randn(2, *shape, seed=3), randn(1, *shape, seed=4)
    output = model(x)
    seed = randn(*output.shape, seed=7)
    _, expected = torch.autograd.functional.vjp(model, x, seed)
    assert error(explained(model, x, Gradient(times_input=False), seed), expected) <= 1e-10
    assert check_complete(model, (x,), (reference,), LID(), 1e-12) <= 1e-12
    if name not in ("LSTM", "GRU"):  # hundreds of operators, each at n points
        missing = [check_complete(model, (x,), (reference,), LID(steps=n), 1e-12) for n in (4, 40)]
        assert missing[1] <= 0.25 * missing[0] + 1e-12


def test_rows_that_are_masked_altogether() -> None:
    """A token that may look at nothing gets zeros, and no NaN on the way back."""

    class Blind(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.mask[0] = False

    model, x, reference = built(lambda: nn.Sequential(Blind())), randn(2, 4, 6, seed=3), randn(1, 4, 6, seed=4)
    output = model(x)
    seed = randn(*output.shape, seed=7)
    _, expected = torch.autograd.functional.vjp(model, x, seed)
    assert error(explained(model, x, Gradient(times_input=False), seed), expected) <= 1e-10
    for rules in (LID(), LID(steps=3)):
        assert bool(torch.isfinite(explained(model, x, rules, seed)).all())
    assert check_complete(model, (x,), (reference,), LID(), 1e-12) <= 1e-12


@pytest.mark.parametrize("distance", [0.0, 1e-14, 1e-7, 1.0, 200.0, 1e5])
def test_softmax_far_from_and_near_its_reference(distance: float) -> None:
    """Logits that hardly move, and logits that leave every probability at 0 or 1: finite, and complete."""
    model = built(lambda: nn.Sequential(nn.Softmax(-1)))
    reference = randn(1, 5, seed=4)
    x = reference + distance * randn(2, 5, seed=3)
    seed = randn(2, 5, seed=7)
    found = explained(model, x, LID(reference), seed)
    change = (seed * (model(x) - model(reference))).sum(1)
    assert bool(torch.isfinite(found).all())
    assert bool(((found.sum(1) - change).abs() <= 1e-12 * found.abs().sum(1) + 1e-15).all())
