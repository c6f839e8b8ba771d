"""Activation maximisation, maps over several scales, and baselines that other libraries compute."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from frpc import baselines
from frpc.attribution.scales import vgg_stages
from frpc.errors import InputError, LayerNameError, OptionError, PackageError, ShapeError, TargetError

TIGHT = 1e-12
X = torch.randn(2, 2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PAIRS = torch.tensor([[0, 1], [2, 0]])


def small_vgg() -> nn.Sequential:
    """Five stages of one convolution each."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in pairwise((2, 3, 4, 4, 4, 4)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(4, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 100, 3)).eval()


@pytest.fixture(scope="module")
def explainer() -> frpc.Explainer:
    return frpc.compile(small_vgg(), (X,))


# Scales -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pools"), [("s4", [11]), ("s54321", [14, 11, 8, 5, 2][1:]), ("s21", [5, 2])])
def test_scales_are_summed_as_written(explainer: frpc.Explainer, name: str, pools: list[int]) -> None:
    """The fifth stage of this net is one place, so it is asked for apart."""
    layers = [f"0.{number}" for number in pools]
    expected = torch.zeros(2, 32, 32, dtype=torch.float64)
    for layer in layers:
        channels = explainer.at(layer, X, target=1)[layer].sum(1, keepdim=True)
        expected += F.interpolate(channels, size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    found = frpc.multiscale(explainer, X, 1, layers if name == "s54321" else name)
    assert torch.allclose(found.relevance, expected, rtol=0, atol=TIGHT)
    assert [tuple(s.shape) for s in found.scales.values()] == [(2, 2 ** (5 - p // 3 - 1), 2 ** (5 - p // 3 - 1)) for p in pools]


def test_scales_of_several_targets_and_other_rules() -> None:
    explainer = frpc.compile(small_vgg(), (X,), method="sig-lid-ig")
    both = frpc.multiscale(explainer, X, PAIRS, "s432")
    assert both.relevance.shape == (2, 2, 32, 32)
    for k in range(2):
        one = frpc.multiscale(explainer, X, PAIRS[:, k], "s432")
        assert torch.allclose(both.relevance[:, k], one.relevance, rtol=0, atol=TIGHT)


def test_stages_are_the_max_pools_in_order(explainer: frpc.Explainer) -> None:
    expected = {"s1": "0.2", "s2": "0.5", "s3": "0.8", "s4": "0.11", "s5": "0.14"}
    assert vgg_stages(small_vgg()) == vgg_stages(explainer) == expected
    import torchvision

    with torch.device("meta"):
        vgg = torchvision.models.vgg16(weights=None, init_weights=False)
    assert list(vgg_stages(vgg).values()) == [f"features.{n}" for n in (4, 9, 16, 23, 30)]


def test_scales_that_do_not_fit_are_refused(explainer: frpc.Explainer) -> None:
    with pytest.raises(OptionError, match=r"0\.14 gives \[B, 4, 1, 1\], which is not a spatial map"):
        frpc.multiscale(explainer, X, 1)
    with pytest.raises(OptionError, match="Sequential has 0 max pools; the stages s1 to s5 are the five of a VGG net"):
        frpc.multiscale(frpc.compile(conv_net()), torch.randn(1, 3, 12, 12), 1)
    with pytest.raises(OptionError, match="name at least one layer, and each once"):
        frpc.multiscale(explainer, X, 1, "s44")
    with pytest.raises(LayerNameError, match=r"has no layer '0\.77'"):
        frpc.multiscale(explainer, X, 1, ["0.2", "0.77"])
    with pytest.raises(ShapeError, match="pictures"):
        frpc.multiscale(explainer, X[0], 1)


# Features -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"layer": "0", "channel": 2}, {"layer": "1", "neuron": (1, 4, 5)}, {"class_": 1}])
def test_activations_rise(asked: dict[str, object]) -> None:
    model = conv_net()
    found = frpc.feature(model, size=(3, 12, 12), steps=30, **asked)  # type: ignore[arg-type]
    assert found.image.shape == (1, 3, 12, 12) and found.activations.shape == (31,)
    assert found.activations[-1] > found.activations[0] + 0.5
    assert torch.equal(found.image, frpc.feature(model, size=(3, 12, 12), steps=30, **asked).image)  # type: ignore[arg-type]
    with torch.no_grad():
        part = model if "class_" in asked else model[: int(asked["layer"]) + 1]  # type: ignore[call-overload]
        index = asked.get("neuron", (asked.get("channel", 1),))
        assert torch.allclose(part(found.image)[(0, *index)].mean(), found.activations[-1], atol=1e-5)  # type: ignore[misc]
    assert not found.image.requires_grad and all(p.grad is None for p in model.parameters())


def test_steps_follow_the_objective_written_out() -> None:
    model = conv_net().double()
    start = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    found = frpc.feature(model, "0", channel=1, start=start, steps=4, l2=0.01, tv=0.02, jitter=0, rate=0.1)
    x = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(4):
        smooth = x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum()
        loss = 0.01 * (x**2).sum() + 0.02 * smooth - model[0](x)[0, 1].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert torch.allclose(found.image, x.detach(), rtol=0, atol=1e-9)


def test_penalties_do_what_they_say() -> None:
    def size(**options: float) -> Tensor:
        image = frpc.feature(conv_net(), "0", channel=1, size=(3, 12, 12), steps=40, jitter=0, **options).image  # type: ignore[arg-type]
        return torch.stack([(image**2).sum(), image.diff(dim=2).abs().sum() + image.diff(dim=3).abs().sum()])

    free = size(l2=0.0, tv=0.0)
    assert size(l2=0.05, tv=0.0)[0] < 0.5 * free[0]
    assert size(l2=0.0, tv=0.05)[1] < 0.5 * free[1]
    bounded = frpc.feature(conv_net(), "0", channel=1, size=(3, 12, 12), steps=40, bounds=(-0.1, torch.full([3, 1, 1], 0.2)))
    assert bounded.image.min() >= -0.1 and bounded.image.max() <= 0.2


def test_inputs_without_rows_and_explainers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    found = frpc.feature(model, "1", neuron=(2,), size=(5,), steps=20)
    assert found.activations[-1] > found.activations[0]
    same = frpc.feature(frpc.compile(model), "1", neuron=(2,), size=(5,), steps=20)
    assert torch.equal(found.image, same.image)


def test_features_that_do_not_fit_are_refused() -> None:
    model, size = conv_net(), (3, 12, 12)
    with pytest.raises(OptionError, match=r"Give one of channel=, neuron= and class_= \(none given\)"):
        frpc.feature(model, "0", size=size)
    with pytest.raises(OptionError, match=r"\(channel and class_ given\)"):
        frpc.feature(model, "0", channel=1, class_=2, size=size)
    with pytest.raises(OptionError, match="class_= is for the model's output and needs none"):
        frpc.feature(model, "0", class_=2, size=size)
    with pytest.raises(LayerNameError, match="has no layer '7'"):
        frpc.feature(model, "7", channel=2, size=size)
    with pytest.raises(TargetError, match=r"4 is out of range: 0 has shape \['B', 4, 10, 10\], with indices 0 to 3"):
        frpc.feature(model, "0", channel=4, size=size)
    with pytest.raises(TargetError, match="give a neuron as a tuple of 3 ints"):
        frpc.feature(model, "0", neuron=(1, 2), size=size)
    with pytest.raises(OptionError, match="steps=0: give at least 1"):
        frpc.feature(model, "0", channel=1, size=size, steps=0)
    with pytest.raises(ShapeError, match=r"give one input, \[1, \.\.\.\]"):
        frpc.feature(model, "0", channel=1, start=torch.randn(2, 3, 12, 12))
    with pytest.raises(InputError, match=r"start is torch\.int64"):
        frpc.feature(model, "0", channel=1, start=torch.ones(1, 3, 12, 12, dtype=torch.int64))


# Baselines ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "package"), [("lime", "captum"), ("kernel_shap", "captum"), ("partition_shap", "shap")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, call: str, package: str) -> None:
    for module in (package, f"{package}.attr"):  # whether or not a test before this one has loaded it
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PackageError) as caught:
        getattr(baselines, call)(conv_net(), torch.randn(1, 3, 12, 12), 1)
    assert str(caught.value).endswith(
        f" needs the package {package}, which is not installed.\n  Fix: pip install 'frpc[baselines]'"
    )


def test_segments_number_the_rectangles_of_a_grid() -> None:
    parts = baselines.segments((4, 5), (2, 3))
    assert parts.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5]]
    assert baselines.segments((2, 2)).unique().numel() == 4  # no more than there are pixels


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", ["kernel_shap", "shapley_values", pytest.param("partition_shap", marks=pytest.mark.slow)])
def test_shapley_values_sum_to_what_exceeds_nothing(call: str) -> None:
    for package in ("captum.attr", "sklearn", "shap"):
        pytest.importorskip(package)
    model, x = conv_net(), torch.randn(2, 3, 12, 12)
    which = torch.tensor([2, 0])
    parts = {} if call == "partition_shap" else {"parts": baselines.segments((12, 12), (2, 2))}
    found = getattr(baselines, call)(model, x, which, samples=200, **parts)
    cells = found.relevance
    whole = cells.sum((1, 2, 3)) if not parts else cells[:, 0, ::6, ::6].sum((1, 2))
    with torch.no_grad():
        increment = (model(x) - model(0 * x)).gather(1, which[:, None])[:, 0]
    assert torch.allclose(whole, increment, atol=1e-3)
    assert torch.equal(found.output, model(x).detach())
    again = getattr(baselines, call)(frpc.compile(model), x, which, samples=200, **parts)
    assert torch.allclose(again.relevance, cells, atol=1e-4)


@pytest.mark.peer
def test_captum_is_asked_as_it_is() -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = conv_net(), torch.randn(2, 3, 12, 12)
    parts = baselines.segments((12, 12), (2, 3))
    theirs = captum.FeatureAblation(model).attribute(x, target=1, feature_mask=parts.expand(1, 3, 12, 12))
    found = baselines.feature_ablation(model, x, 1, parts=parts)
    assert torch.equal(found.relevance, theirs.detach()) and found.method == "FeatureAblation"
    state = torch.random.get_rng_state()
    first = baselines.shapley_values(model, x, 1, parts=parts, samples=2, random_seed=3)
    assert torch.equal(first.relevance, baselines.shapley_values(model, x, 1, parts=parts, samples=2, random_seed=3).relevance)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(OptionError, match=r"captum\.attr has no method of that name"):
        baselines.attribute("Limes", model, x, 1)
    with pytest.raises(ShapeError, match=r"parts has shape \[5, 5\], but a sample of x has shape \[3, 12, 12\]"):
        baselines.lime(model, x, 1, parts=torch.zeros(5, 5, dtype=torch.int64))
    with pytest.raises(TargetError, match="give an int or class indices"):
        baselines.feature_ablation(model, x, torch.tensor([1, 2, 0]), parts=parts)
