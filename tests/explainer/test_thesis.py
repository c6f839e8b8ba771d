"""The compiler's one promise: its map is the thesis's recursion, number for number.

Random small networks, and the thesis's own, are explained by frpc and by the dense float64 reference, which share no
code. Relative L1 `sum|V - ref| / sum|ref|` stays below 1e-10 and conservation below 1e-12 of `sum|V|`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import frpc
import nets
import strategies
from reference import relevance, relevance_maps
from strategies import Case, Expression, Join, cases

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

# The same draws each time. No shrinking: it would compile for minutes, and a failing draw prints its short plan anyway.
QUICK = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operators: more threads wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(found: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    """Relative L1; where nothing is expected nothing may be found."""
    return found.shape == expected.shape and bool((found - expected).abs().sum() <= bound * expected.abs().sum())


def conserves(maps: Tensor, explained: Tensor, bound: float = 1e-12) -> bool:
    """`|sum V - y| / sum|V|` for every map of a stack; explained has the stack's leading shape."""
    flat = maps.flatten(explained.ndim)
    return bool(((flat.sum(-1) - explained).abs() <= bound * flat.abs().sum(-1)).all())


def check_seed(case: Case, number: int) -> None:
    """Explains a random functional of the output by both."""
    module, x = case
    explainer = frpc.compile(module, (x,))
    with torch.no_grad():
        expected = module(x.clone())
    seed = randn(*expected.shape, seed=number)
    output, found = explainer(x, seed=seed)
    assert torch.allclose(output, expected, rtol=1e-11, atol=1e-11)
    assert agrees(found, relevance(module, x, seed)[0])
    assert conserves(found, (seed * output).flatten(1).sum(1))


# One of each ----------------------------------------------------------------------------------------------------------


class OneOfEach(nn.Module):
    """Many small networks side by side on the same input, their outputs in a row."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(1.0 * x).flatten(1) for branch in self.branches], 1)


def layers(dims: int) -> list[nn.Module]:
    """Every kind of option of the convolutions and pools over `dims` dimensions, and batch normalisation."""

    def named(kind: str, *args: Any, **options: Any) -> nn.Module:
        return getattr(nn, f"{kind}{dims}d")(*args, **options)

    convolutions: list[dict[str, Any]] = [
        {"stride": 2, "padding": 1}, {"groups": 2, "bias": False}, {"dilation": 2, "padding": "same"},
        {"padding": "valid"}, {"padding": 2, "dilation": 3, "stride": 3}, {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"}, {"padding": "same", "padding_mode": "replicate"},
    ]  # fmt: skip
    transposed: list[dict[str, Any]] = [
        {"stride": 2}, {"padding": 1, "bias": False}, {"stride": 3, "padding": 1, "output_padding": 2},
        {"groups": 2, "dilation": 2, "output_padding": 1},
    ]  # fmt: skip
    pools: list[dict[str, Any]] = [
        {}, {"stride": 1, "padding": 1}, {"stride": 2, "ceil_mode": True},
        {"stride": 2, "padding": 1, "ceil_mode": True},
    ]  # fmt: skip
    return [
        *(named("Conv", 2, 4, 3, **options) for options in convolutions),
        *(named("Conv", 2, 3, k, padding="same") for k in (1, 2)),
        *(named("ConvTranspose", 2, 4, 3, **options) for options in transposed),
        *(named("MaxPool", 3, **options) for options in pools),
        *(named("MaxPool", 2, 2, 1, dilation, ceil_mode=True) for dilation in (2, 3)),
        *(named("AvgPool", 3, **options, count_include_pad=count) for options in pools for count in (True, False)),
        *(named(f"Adaptive{kind}Pool", size) for kind in ("Max", "Avg") for size in (1, 3)),
        *(named("BatchNorm", 2, affine=affine) for affine in (True, False)),
        nn.Sequential(nn.Linear(7, 2), named("BatchNorm", 2)),
        nn.Sequential(named("BatchNorm", 2), named("Conv", 2, 2, 3, padding=1), named("BatchNorm", 2), nn.ReLU()),
        nn.Sequential(named("ConvTranspose", 2, 4, 2, groups=2), named("BatchNorm", 4)),
    ]


def family(name: str) -> tuple[tuple[int, ...], list[nn.Module]]:
    """The shape of a sample and the small networks of one family."""
    kind, dims = name.split("-")[0], int(name.split("-")[1])
    shape = (6,) if dims == 0 else (2, *(7, 5, 4)[:dims]) if kind != "layers" else (2, *(5, 6, 7)[3 - dims :])
    if kind == "layers":
        return shape, layers(dims)
    if kind == "views":
        return shape, [Expression(text) for text in strategies.VIEWS[dims + 2]]
    if kind == "constants":
        return shape, [Expression(text, randn(*shape, seed=3)) for text in strategies.CONSTANTS]
    if kind == "unions":
        texts = (*strategies.UNIONS, *strategies.IN_PLACE_UNIONS)
        return shape, [Join(text, nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 1)) for text in texts]
    texts = (*strategies.ACTIVATIONS, *strategies.SATURATING, *strategies.IN_PLACE)
    modules = [
        *(make() for make in strategies.MODULES),
        nn.PReLU(),
        nn.PReLU(6),
        nn.Hardtanh(),
        nn.ReLU6(),
        nn.Hardsigmoid(),
    ]
    return shape, [*map(Expression, texts), *modules]


FAMILIES: list[Any] = [f"{kind}-{dims}" for kind in ("views", "layers") for dims in (2, 3)]
FAMILIES += [pytest.param(f"{kind}-1", marks=pytest.mark.slow) for kind in ("views", "layers")]


@pytest.mark.parametrize("name", ["activations-0", "constants-0", "constants-1", "unions-1", "views-0", *FAMILIES])
def test_one_of_each(name: str) -> None:
    """Every line and every layer the random networks are made of, each on its own account."""
    shape, branches = family(name)
    x = 2 * randn(1, *shape)
    builder = strategies.Builder(lambda strategy: None, 5)
    model = builder.seeded(OneOfEach(*branches))
    explainer, maps = frpc.compile(model, (x,)), relevance_maps(model, x).maps[0]
    with torch.no_grad():
        sizes = [branch(x.clone()).numel() for branch in branches]
    wrong = []
    for branch, own, first in zip(branches, sizes, itertools.accumulate(sizes, initial=0), strict=False):
        seed = torch.zeros(1, len(maps), dtype=torch.float64)
        seed[0, first : first + own] = randn(own, seed=1)
        output, found = explainer(x, seed=seed)
        if not (agrees(found.flatten(), seed[0] @ maps) and conserves(found, (seed * output).sum(1))):
            wrong.append(repr(branch))
    assert not wrong


# Random networks ------------------------------------------------------------------------------------------------------


@settings(QUICK, max_examples=20)
@given(cases(), st.integers(0, 1000))
def test_map_is_the_recursion(case: Case, number: int) -> None:
    """T 3.5, 3.8, 4.10 for chains, residual sums, concatenations, shared, in-place and functional forms."""
    check_seed(case, number)


@pytest.mark.slow
@settings(QUICK, max_examples=600, derandomize=False, print_blob=True, phases=list(Phase))
@given(cases(steps=9), st.integers(0, 1000))
def test_map_is_the_recursion_at_length(case: Case, number: int) -> None:
    """The same for more and longer networks, new ones each time."""
    check_seed(case, number)


@settings(QUICK, max_examples=5)
@given(cases(head=True), st.data())
def test_targets_of_a_batch(case: Case, data: st.DataObject) -> None:
    """An int, one target a sample, K targets a sample: each is the map of that logit of that sample (T 4.1, 4.2)."""
    module, x = case
    batch = torch.cat([x, randn(2, *x.shape[1:], seed=data.draw(st.integers(0, 1000)))])
    explainer = frpc.compile(module, (x,))
    maps = torch.cat([relevance_maps(module, sample[None]).maps for sample in batch])  # [B, O, N]
    logits, rows = maps.shape[1], torch.arange(3)
    with torch.no_grad():
        expected = module(batch.clone())

    one = data.draw(st.integers(0, logits - 1))
    output, found = explainer(batch, target=one)
    assert torch.allclose(output, expected, rtol=1e-11, atol=1e-11)
    assert agrees(found, maps[:, one].reshape(batch.shape))
    assert conserves(found, output[:, one])

    each = torch.tensor(data.draw(st.lists(st.integers(0, logits - 1), min_size=3, max_size=3)))
    found = explainer(batch, target=each).relevance
    assert agrees(found, maps[rows, each].reshape(batch.shape))

    several = torch.stack([each, each.flip(0), torch.full((3,), one), torch.zeros_like(each)], 1)  # [B, K]
    found = explainer(batch, target=several).relevance
    assert agrees(found, maps[rows[:, None], several].reshape(3, 4, *x.shape[1:]))
    assert conserves(found, output.gather(1, several))


@settings(QUICK, max_examples=5)
@given(cases(), st.integers(0, 1000))
def test_constants_apart(case: Case, number: int) -> None:
    """`separate` leaves out the constants' share; with it the account balances (method, section 2)."""
    module, x = case
    explainer = frpc.compile(module, (x,), bias="separate")
    carried = relevance_maps(module, x, ledger=True)
    seed = randn(*carried.value.shape, seed=number)
    out = explainer(x, seed=seed)
    ledger = torch.einsum("o,on->n", seed.flatten(), carried.maps.flatten(0, -2))
    assert agrees(torch.cat([out.relevance.flatten(), out.bias]), ledger)
    assert agrees(out.relevance, ledger[:-1].view_as(x)) or ledger[:-1].abs().sum() < 1e-6 * ledger.abs().sum()


@settings(QUICK, max_examples=5)
@given(cases(head=True))
def test_constants_in_receptive_fields(case: Case) -> None:
    """`receptive_field` moves constants about: the account and their share of it stay."""
    module, x = case
    output, found, *_ = out = frpc.compile(module, (x,), bias="receptive_field")(x, target=0)
    beta = relevance_maps(module, x, ledger=True).maps[0, 0, -1]
    assert conserves(found, output[:, 0])
    assert torch.allclose(out.bias, beta, rtol=1e-10, atol=1e-12)


# Cases that random draws do not reach ---------------------------------------------------------------------------------


def test_worked_example_of_figure_3_1() -> None:
    """y = w1 x1 + w2 x2 + b has the map [w1 x1 + b/2, w2 x2 + b/2]."""
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 7.0]]))
        layer.bias.fill_(4.0)
    out = frpc.compile(layer, (randn(1, 2),))(torch.tensor([[3.0, -5.0]]).double(), target=0)
    assert out.relevance.tolist() == [[8.0, -33.0]]
    assert out.bias.tolist() == [4.0]


class Everywhere(nn.Module):
    """z = x1 + x2 through one activation after the other: logit k is f_k(z)."""

    functions = (
        *(
            torch.relu,
            F.leaky_relu,
            F.elu,
            F.celu,
            F.selu,
            F.gelu,
            F.silu,
            F.mish,
            F.hardswish,
            F.hardsigmoid,
            F.softplus,
        ),
        *(F.softsign, torch.tanh, torch.sigmoid, F.logsigmoid, F.tanhshrink, F.hardtanh, F.relu6, F.hardshrink),
        *(F.softshrink, torch.sin, torch.cos, torch.atan, torch.erf, torch.abs, torch.square, torch.expm1, torch.exp),
    )

    def forward(self, x: Tensor) -> Tensor:
        z = x.sum(1, keepdim=True)
        return torch.cat([f(z) for f in self.functions], 1)


def tiny_and_large() -> Tensor:
    """Rows (x1, x2) whose sum z is 0, -0, denormal, near the switch to a series, at a knee, saturated."""
    sizes = (
        5e-324,
        1e-310,
        1e-160,
        1e-20,
        1e-12,
        1e-9,
        1.49e-8,
        1.5e-8,
        1e-7,
        1e-5,
        1e-3,
        0.5,
        1.0,
        3.0,
        6.0,
        19.0,
        21.0,
        40.0,
    )
    rows = [(0.0, 0.0), (-0.0, -0.0), (2.5, -2.5), *((s * z, 0.0) for z in sizes for s in (1, -1))]
    return torch.tensor(rows, dtype=torch.float64)


def test_secants_where_division_fails() -> None:
    """Every activation at every such z: V = f'(0) V_z + f(0)/N at z = 0, the divided difference elsewhere."""
    x, model = tiny_and_large(), Everywhere().eval()
    count = len(Everywhere.functions)
    out = frpc.compile(model, (x,))(x, target=torch.arange(count).expand(len(x), count))
    expected = torch.cat([relevance_maps(model, row[None]).maps for row in x])  # [B, K, N]
    error = (out.relevance - expected).abs()
    # PyTorch's own f(z) is this far from f: it computes 1 + erf, z - tanh z as written, to eps |z|. Denormals round.
    slack = 4 * torch.finfo(torch.float64).eps * x.abs().sum(1)[:, None, None] + 5e-324
    allowed = 1e-12 * expected.abs().sum(-1, keepdim=True) + slack
    worst = [(Everywhere.functions[k].__name__, x[b].tolist()) for b, k, _ in (error > allowed).nonzero().tolist()]
    assert not worst


def test_first_of_equals_wins() -> None:
    """Ties in max pooling, from saturation and from repeated inputs: the first index, as PyTorch has it."""
    model = nn.Sequential(
        nn.Hardtanh(-0.5, 0.5), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Flatten(), nn.Linear(18, 3)
    ).double()
    x = (2 * randn(1, 2, 5, 5)).round() / 2
    assert x.unique().numel() < 12
    check_seed(Case(model.eval(), x), 0)


def test_aliases_written_in_place() -> None:
    """`x += y` and `view.relu_()` write to x itself, so a later reader of x sees them."""

    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            corner = x.view(x.size(0), 2, 3).transpose(1, 2)[:, 1:]
            corner.relu_()
            y = x
            y += 0.25
            y[:, ::2] *= 3.0
            return x.tanh() - y

    # The reference's tracer cannot see a write through y[:, ::2], so the map is worked out from the same net unaliased.
    class Plain(Aliased):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            a, b = x.view(x.size(0), 2, 3).split((1, 2), 2)
            x = torch.cat((a, b.relu()), 2).flatten(1) + 0.25
            x = x * torch.tensor([3.0, 1.0] * 3, dtype=torch.float64)
            return x.tanh() - x

    torch.manual_seed(1)
    model, plain, x = Aliased().double().eval(), Plain().double().eval(), randn(1, 4)
    plain.load_state_dict(model.state_dict())
    seed = randn(1, 6, seed=2)
    assert agrees(frpc.compile(model, (x,))(x, seed=seed).relevance, relevance(plain, x, seed)[0])


def test_receptive_field_by_hand() -> None:
    """Two 1d convolutions of width 3: a bias of the first spreads over 3 cells, of the second over 5."""
    first, second = nn.Conv1d(1, 2, 3, bias=True).double(), nn.Conv1d(2, 1, 3, bias=True).double()
    model, x = nn.Sequential(first, nn.ReLU(), second).eval(), randn(1, 1, 9)
    with torch.no_grad():
        hidden = first(x)[0].relu()
        expected = torch.zeros(5, 9, dtype=torch.float64)
        for i in range(5):
            expected[i, i : i + 5] += second.bias[0] / 5
            for c in range(2):
                for tap in range(3):
                    gain = second.weight[0, c, tap] * (hidden[c, i + tap] > 0)
                    reach = slice(i + tap, i + tap + 3)
                    expected[i, reach] += gain * (first.weight[c, 0] * x[0, 0, reach] + first.bias[c] / 3)
    explainer = frpc.compile(model, (x,), bias="receptive_field")
    for i in range(5):
        assert agrees(explainer(x, seed=F.one_hot(torch.tensor([[i]]), 5).double()).relevance[0, 0], expected[i])


def test_several_inputs() -> None:
    """N counts the elements of all inputs of a sample; each input gets its own map."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.facts = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)

        def forward(self, image: Tensor, facts: Tensor) -> Tensor:
            return F.gelu(self.image(image)).mean((2, 3)) * torch.sigmoid(self.facts(facts)) + self.facts(facts)

    torch.manual_seed(0)
    model, inputs = Two().double().eval(), (randn(1, 2, 5, 5), randn(1, 4, seed=1))
    seed = randn(1, 3, seed=2)
    _, found = frpc.compile(model, inputs)(*inputs, seed=seed)
    for one, expected in zip(found, relevance(model, inputs, seed), strict=True):
        assert agrees(one, expected)


# The thesis's nets and trained ones -----------------------------------------------------------------------------------


def test_thesis_mlp() -> None:
    """T 3.3.1, all ten logits."""
    torch.manual_seed(0)
    model, x = nets.thesis_mlp().double().eval(), torch.rand(1, 1, 28, 28).double()
    out = frpc.compile(model, (x,))(x, target=torch.arange(10)[None])
    assert agrees(out.relevance.reshape(1, 10, 784), relevance_maps(model, x).maps)
    assert conserves(out.relevance, out.output)


def test_trained_residual_net() -> None:
    """ResNet-20 with trained weights on the middle of a test image, all ten logits (small, so that N columns fit)."""
    model, (images, _) = nets.cifar_resnet(20).double(), nets.cifar10_test(1)
    x = images[:, :, 10:22, 10:22].double()
    out = frpc.compile(model, (x,))(x, target=torch.arange(10)[None])
    assert agrees(out.relevance.reshape(1, 10, -1), relevance_maps(model, x).maps)
    assert conserves(out.relevance, out.output)


@pytest.mark.slow
def test_thesis_alexnet() -> None:
    """T 4.2.2 at full size: 1024 pixel columns through AlexNet, against the channel sums of frpc's map."""
    torch.manual_seed(0)
    model, x = nets.ThesisAlexNet().double().eval(), randn(1, 3, 32, 32)
    out = frpc.compile(model, (x,))(x, target=torch.arange(10)[None])
    assert conserves(out.relevance, out.output)
    assert agrees(out.relevance.sum(2).flatten(2), relevance_maps(model, x, cells="pixels").maps)
