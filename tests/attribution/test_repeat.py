"""Averages of gradients: completeness, quadrature, noise, and how passes are batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc import repeat
from frpc.attribution import passes
from frpc.errors import InputError, MemoryLimitError, OptionError, ShapeError, TargetError

TIGHT = 1e-12


def net(activation: type[nn.Module] = nn.Softplus) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5), activation()]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double().eval()


X = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
WHICH = torch.tensor([0, 2, 1])
PAIRS = torch.tensor([[0, 1], [2, 0], [1, 2]])
GRADIENT = frpc.rules.Gradient(times_input=False)


@pytest.fixture(scope="module")
def smooth() -> frpc.Explainer:
    return frpc.compile(net(), (X,), rule=GRADIENT)


def slope(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """PyTorch's own gradient."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x)[:, target].sum(), x)
    return gradient


@pytest.mark.parametrize("quadrature", ["gausslegendre", "midpoint", "trapezoid", "right"])
def test_integrated_gradients_are_the_sum_written_out(smooth: frpc.Explainer, quadrature: str) -> None:
    places, weights = repeat.points(quadrature, 7)
    reference = torch.full([1, 2, 6, 6], 0.3, dtype=torch.float64)
    slow = sum(w * slope(net(), reference + a * (X - reference), 1) for a, w in zip(places, weights, strict=True))
    found = repeat.integrated_gradients(smooth, X, 1, reference=reference, steps=7, quadrature=quadrature)
    assert torch.allclose(found.relevance, (X - reference) * slow, rtol=0, atol=TIGHT)
    assert torch.equal(found.output, net()(X))
    lacking = found.relevance.flatten(1).sum(1) - (net()(X) - net()(reference))[:, 1]
    assert torch.allclose(found.delta, lacking.detach(), rtol=0, atol=TIGHT)
    assert found.passes == 7


@pytest.mark.parametrize(("quadrature", "power"), [("midpoint", 2), ("trapezoid", 2), ("right", 1)])
def test_completeness_comes_with_steps(smooth: frpc.Explainer, quadrature: str, power: int) -> None:
    """The error falls by the order of the rule."""
    few, many = (repeat.integrated_gradients(smooth, X, 1, steps=n, quadrature=quadrature).delta.abs().max() for n in (10, 160))
    assert many < few * 16.0**-power * 1.5
    assert repeat.integrated_gradients(smooth, X, 1).delta.abs().max() < 1e-9  # 50 points of Gauss and Legendre


@pytest.mark.parametrize("quadrature", ["gausslegendre", "midpoint", "trapezoid", "right"])
def test_exact_on_linear_nets(quadrature: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    found = repeat.integrated_gradients(model, x, 2, steps=2, quadrature=quadrature)
    assert torch.allclose(found.relevance, x * model.weight[2], rtol=0, atol=1e-14)
    assert found.delta.abs().max() < 1e-14


def test_several_targets_and_targets_of_each_sample(smooth: frpc.Explainer) -> None:
    both = repeat.integrated_gradients(smooth, X, PAIRS, steps=4)
    assert both.relevance.shape == (3, 2, 2, 6, 6) and both.delta.shape == (3, 2)
    for column in range(2):
        one = repeat.integrated_gradients(smooth, X, PAIRS[:, column], steps=4, internal_batch_size=5)
        assert torch.allclose(both.relevance[:, column], one.relevance, rtol=0, atol=TIGHT)
        assert torch.allclose(both.delta[:, column], one.delta, rtol=0, atol=TIGHT)
    seed = torch.nn.functional.one_hot(WHICH, 3).double()
    seeded = repeat.integrated_gradients(smooth, X, seed=seed, steps=4)
    assert torch.allclose(seeded.relevance, repeat.integrated_gradients(smooth, X, WHICH, steps=4).relevance, rtol=0, atol=TIGHT)


def test_of_probabilities(smooth: frpc.Explainer) -> None:
    """The sum is ``P(x) - P(x_ref)``, whether a model, an explainer of scores or one of probabilities is given."""
    model = net()
    found = repeat.integrated_gradients(smooth, X, WHICH, of="probability", steps=60)
    increment = (model(X).softmax(1) - model(0 * X).softmax(1)).gather(1, WHICH[:, None])[:, 0]
    assert torch.allclose(found.relevance.flatten(1).sum(1), increment.detach(), rtol=0, atol=1e-9)
    assert found.delta.abs().max() < 1e-9
    meant = frpc.compile(model, (X,), rule=GRADIENT, seed="softmax_taylor")
    assert torch.equal(repeat.integrated_gradients(meant, X, WHICH, steps=60).relevance, found.relevance)


def test_input_times_gradient_explainers_are_taken_too(smooth: frpc.Explainer) -> None:
    times = frpc.compile(net(), (X,), rule=frpc.rules.Gradient())
    expected = repeat.integrated_gradients(smooth, X, 0, steps=3).relevance
    assert torch.equal(repeat.integrated_gradients(times, X, 0, steps=3).relevance, expected)
    assert torch.equal(repeat.integrated_gradients(net(), X, 0, steps=3).relevance, expected)


def test_batches_change_nothing(smooth: frpc.Explainer) -> None:
    for method in (
        lambda size: repeat.integrated_gradients(smooth, X, WHICH, steps=5, internal_batch_size=size),
        lambda size: repeat.smoothgrad(smooth, X, WHICH, samples=5, internal_batch_size=size),
        lambda size: repeat.expected_gradients(smooth, X, WHICH, references=X[:2], internal_batch_size=size),
    ):
        whole = method(None)
        for size in (1, 4, 1000):
            assert torch.allclose(method(size).relevance, whole.relevance, rtol=0, atol=TIGHT)


def test_the_memory_limit_sets_the_batch(smooth: frpc.Explainer) -> None:
    one = passes.peak_bytes(smooth.compiled(X).program)
    assert one >= 8 * (2 * 36 + 4 * 36)  # the input and the first activation, at least
    found = repeat.integrated_gradients(smooth, X, 0, steps=50, memory_limit=7 * one)
    assert found.internal_batch_size == 7
    assert repeat.integrated_gradients(smooth, X, PAIRS, steps=50, memory_limit=7 * one).internal_batch_size == 3
    assert repeat.integrated_gradients(smooth, X, 0, steps=2).internal_batch_size == 6  # no more than there are points
    with pytest.raises(MemoryLimitError, match=r"One sample needs .*, but the limit is"):
        repeat.integrated_gradients(smooth, X, 0, memory_limit=one - 1)


def test_smoothgrad(smooth: frpc.Explainer) -> None:
    first = repeat.smoothgrad(smooth, X, 1, samples=6, random_seed=3)
    assert torch.equal(first.relevance, repeat.smoothgrad(smooth, X, 1, samples=6, random_seed=3).relevance)
    assert not torch.equal(first.relevance, repeat.smoothgrad(smooth, X, 1, samples=6, random_seed=4).relevance)
    assert first.delta is None
    still = repeat.smoothgrad(smooth, X, 1, samples=3, stdev=0.0)
    assert torch.allclose(still.relevance, slope(net(), X, 1), rtol=0, atol=TIGHT)
    generator = torch.Generator().manual_seed(3)
    sigma = 0.15 * (X.flatten(1).amax(1) - X.flatten(1).amin(1)).reshape(3, 1, 1, 1)
    drawn = [torch.stack([torch.randn(2, 6, 6, generator=generator, dtype=X.dtype) for _ in X]) for _ in range(6)]
    each = torch.stack([slope(net(), X + sigma * noise, 1) for noise in drawn])
    assert torch.allclose(first.relevance, each.mean(0), rtol=0, atol=TIGHT)
    squares = repeat.smoothgrad(smooth, X, 1, samples=6, random_seed=3, moment="square").relevance
    assert torch.allclose(squares, (each**2).mean(0), rtol=0, atol=TIGHT)
    variance = repeat.smoothgrad(smooth, X, 1, samples=6, random_seed=3, moment="variance").relevance
    assert torch.allclose(variance, each.var(0, unbiased=False), rtol=0, atol=TIGHT)
    pairs = repeat.smoothgrad(smooth, X, PAIRS, samples=2, moment="square").relevance
    assert torch.allclose(pairs[:, 1], repeat.smoothgrad(smooth, X, PAIRS[:, 1], samples=2, moment="square").relevance)


def test_smoothgrad_of_guided_backpropagation() -> None:
    model = net(nn.ReLU)
    guided = frpc.compile(model, (X,), method="guided-backprop")
    expected = guided(X, target=0).relevance
    assert torch.allclose(repeat.smoothgrad(guided, X, 0, samples=2, stdev=0.0).relevance, expected, rtol=0, atol=TIGHT)


def test_expected_gradients_sum_to_what_exceeds_the_mean(smooth: frpc.Explainer) -> None:
    references = torch.randn(4, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = net()
    found = repeat.expected_gradients(smooth, X, 1, references=references, samples=200)
    increment = model(X)[:, 1] - model(references)[:, 1].mean()
    assert torch.allclose(found.relevance.flatten(1).sum(1), increment.detach(), rtol=0, atol=1e-3)
    assert found.delta.abs().max() < 1e-3 and found.passes == 800
    one = repeat.expected_gradients(smooth, X, 1, references=references[:1], samples=200).relevance
    path = repeat.integrated_gradients(smooth, X, 1, reference=references[:1]).relevance
    assert (one - path).abs().sum() / path.abs().sum() < 1e-3


def test_models_with_one_number_a_sample() -> None:
    class Score(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x**2).sum(1)

    x = torch.randn(2, 3, dtype=torch.float64)
    found = repeat.integrated_gradients(Score().eval(), x, steps=4)
    assert torch.allclose(found.relevance, x**2, rtol=0, atol=TIGHT)
    with pytest.raises(OptionError, match="softmax is always 1"):
        repeat.integrated_gradients(Score().eval(), x, of="probability")


def test_models_with_a_fixed_batch_run_as_they_are() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3) ** 2 if x.shape[0] == 2 else x

    x = torch.randn(2, 3, dtype=torch.float64)
    found = repeat.integrated_gradients(Fixed().eval(), x, WHICH[:2], steps=4, internal_batch_size=5)
    assert torch.allclose(found.relevance.sum(1), (x**2).gather(1, WHICH[:2, None])[:, 0], rtol=0, atol=TIGHT)
    assert found.internal_batch_size == 2


def test_a_progress_bar_where_one_is_asked_for(smooth: frpc.Explainer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int]] = []

    def track(runs: range, title: str, transient: bool) -> range:
        shown.append((title, len(runs)))
        return runs

    monkeypatch.setattr("rich.progress.track", track)
    repeat.integrated_gradients(smooth, X, 0, steps=2, internal_batch_size=4)
    assert not shown
    repeat.integrated_gradients(smooth, X, 0, steps=2, internal_batch_size=4, progress=True)
    assert shown == [("integrated gradients", 2)]


def test_what_does_not_fit_is_said(smooth: frpc.Explainer) -> None:
    with pytest.raises(OptionError, match=r"FRP gives relevance, but this function averages gradients\. Pass the model itself"):
        repeat.integrated_gradients(frpc.compile(net(), (X,)), X, 0)
    with pytest.raises(OptionError, match="choose gausslegendre, midpoint, trapezoid or right"):
        repeat.integrated_gradients(smooth, X, 0, quadrature="simpson")
    with pytest.raises(OptionError, match="steps=1: the trapezoid rule needs at least 2"):
        repeat.integrated_gradients(smooth, X, 0, steps=1, quadrature="trapezoid")
    with pytest.raises(OptionError, match="2 references given; this function takes one"):
        repeat.integrated_gradients(smooth, X, 0, reference=X[:2])
    with pytest.raises(ShapeError, match=r"The reference has shape \[2, 5, 6\] per sample"):
        repeat.integrated_gradients(smooth, X, 0, reference=X[:1, :, 1:])
    with pytest.raises(OptionError, match="choose logit or probability"):
        repeat.smoothgrad(smooth, X, 0, of="loss")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one sample and a deviation of at least 0"):
        repeat.smoothgrad(smooth, X, 0, stdev=-1.0)
    with pytest.raises(OptionError, match="choose mean, square or variance"):
        repeat.smoothgrad(smooth, X, 0, moment="median")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give at least one for each reference"):
        repeat.expected_gradients(smooth, X, 0, references=X, samples=0)
    with pytest.raises(OptionError, match="give at least 1"):
        repeat.smoothgrad(smooth, X, 0, internal_batch_size=0)
    with pytest.raises(InputError, match=r"x is torch\.int64; give one floating-point tensor"):
        repeat.smoothgrad(smooth, X.long(), 0)
    with pytest.raises(TargetError, match="Give target= or seed="):
        repeat.smoothgrad(smooth, X)
    contrastive = frpc.compile(net(), (X,), rule=GRADIENT, seed="contrastive")
    with pytest.raises(OptionError, match="Contrastive is not the gradient of a number"):
        repeat.smoothgrad(contrastive, X, 0)


@pytest.mark.peer
def test_captum_integrates_the_same() -> None:
    captum = pytest.importorskip("captum.attr")
    model = net(nn.ReLU)
    reference = torch.full_like(X[:1], 0.2)
    theirs = captum.IntegratedGradients(model).attribute(X, reference, target=WHICH, n_steps=20)
    ours = repeat.integrated_gradients(model, X, WHICH, reference=reference, steps=20).relevance
    assert (ours - theirs).abs().sum() / theirs.abs().sum() < 1e-8  # Captum's weights are rounded to float32
