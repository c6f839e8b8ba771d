"""DeepLIFT's reveal-cancel rule: the paper's own example, a dense twin written from it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
from families import explained
from frpc.errors import OptionError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Smaller(nn.Module):
    """``min(a, b) = a - relu(a - b)``, figure 2 of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gap = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.first.weight.data, self.gap.weight.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - torch.relu(self.gap(x))


def test_both_inputs_of_a_minimum_are_credited() -> None:
    """Rescale gives all to the smaller input, reveal-cancel half to each."""
    x = torch.tensor([[5.0, 2.0], [3.0, 8.0], [4.0, 4.0]])
    revealed = frpc.compile(Smaller(), (x,), rule=frpc.rules.DeepLiftRevealCancel())(x).relevance
    torch.testing.assert_close(revealed, torch.tensor([[1.0, 1.0], [1.5, 1.5], [2.0, 2.0]]))
    rescaled = frpc.compile(Smaller(), (x[:2],), rule=frpc.rules.DeepLift())(x[:2]).relevance
    torch.testing.assert_close(rescaled, torch.tensor([[0.0, 2.0], [3.0, 0.0]]))


def twin(weights: list[Tensor], biases: list[Tensor], x: Tensor, r: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """One sample through dense layers with f between them, neuron by neuron; relevance of the input for output 0.

    Section 3.5.3 of the paper: `dy+ = 1/2 (f(r + dx+) - f(r)) + 1/2 (f(r + dx- + dx+) - f(r + dx-))`, `dy-` likewise, and
    `m(dx+, dy+) = dy+ / dx+`; the linear rule of 3.5.1 with the parts of an increment taken by the sign of `w dx`.
    """
    values, references = [x], [r]
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        values.append(f(w @ values[-1] + b))
        references.append(f(w @ references[-1] + b))
    multiplier = weights[-1][0].clone()
    for level in range(len(weights) - 2, -1, -1):
        w, b = weights[level], biases[level]
        d = values[level] - references[level]
        below = torch.zeros_like(d)
        for j in range(len(w)):
            parts = w[j] * d
            up, down, start = parts[parts > 0].sum(), parts[parts < 0].sum(), w[j] @ references[level] + b[j]
            risen = 0.5 * (f(start + up) - f(start)) + 0.5 * (f(start + up + down) - f(start + down))
            fallen = 0.5 * (f(start + down) - f(start)) + 0.5 * (f(start + up + down) - f(start + up))
            for i in range(len(d)):
                slope = risen / up if parts[i] > 0 else fallen / down if parts[i] < 0 else torch.zeros(())
                below[i] += multiplier[j] * w[j, i] * slope
        multiplier = below
    return multiplier * (x - r)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky relu": lambda: nn.LeakyReLU(0.3),
    "prelu": lambda: nn.PReLU(init=0.4),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.6),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": lambda: nn.Hardtanh(-0.8, 1.5),
    "softplus": lambda: nn.Softplus(beta=2.0, threshold=15.0),
    "log sigmoid": nn.LogSigmoid,
    "threshold": lambda: nn.Threshold(0.3, -0.5),
    "softshrink": lambda: nn.Softshrink(0.4),
    "hardshrink": lambda: nn.Hardshrink(0.4),
}


LIKE_OTHERS = {"relu6", "leaky relu", "selu", "celu", "gelu by tanh", "hardshrink"}  # but for their numbers


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in ACTIVATIONS])
def test_the_rule_is_the_papers(name: str) -> None:
    """Behind a layer with weights every activation, with parameters of its own, has its positive and its negative part."""
    torch.manual_seed(1)
    f = ACTIVATIONS[name]()
    model = nn.Sequential(nn.Linear(5, 7), f, nn.Linear(7, 6), f, nn.Linear(6, 2)).double()
    x, reference = 10 * randn(4, 5), randn(1, 5, seed=1)
    explainer = frpc.compile(model, (x,), rule=frpc.rules.DeepLiftRevealCancel(reference))
    found = explainer(x, target=0)
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights, biases = [layer.weight.detach() for layer in dense], [layer.bias.detach() for layer in dense]
    with torch.no_grad():
        expected = torch.stack([twin(weights, biases, sample, reference[0], lambda u: f(u[None])[0]) for sample in x])
        gained = (model(x) - model(reference))[:, 0]
    assert float((found.relevance - expected).abs().sum() / expected.abs().sum()) <= 1e-10
    assert float((found.relevance.sum(1) - gained).abs().max()) <= 1e-12
    assert not any("reveal" in str(r).lower() for r in explainer.refusals)
    if name not in ("sigmoid", "tanh"):  # where both parts have one slope they agree, elsewhere not
        rescaled = explained(model, x, frpc.rules.DeepLift(reference), torch.tensor([[1.0, 0.0]] * 4).double())
        assert float((rescaled - expected).abs().sum() / expected.abs().sum()) > 0.01


class Residual(nn.Module):
    """An activation behind a sum, one whose layer something else reads too, and one behind a sum written as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act, self.gate = nn.ELU(), nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.head(self.act(self.two(self.gate(h)) + h))


def test_where_the_rule_cannot_be_taken_it_says_so() -> None:
    """Rescale is complete there too; the refusals name the activations that got it."""
    model, x = Residual().double(), randn(3, 4)
    explainer = frpc.compile(model, (x,), rule=frpc.rules.DeepLiftRevealCancel())
    said = [str(r) for r in explainer.refusals if "own rule" in str(r)]
    assert len(said) == 2 and any("at act" in line for line in said) and any("at gate" in line for line in said)
    assert all("it gets the rescale rule" in line for line in said)
    with torch.no_grad():
        gained = (model(x) - model(torch.zeros_like(x)))[:, 1]
    assert float((explainer(x, target=1).relevance.sum(1) - gained).abs().max()) <= 1e-12


class Added(nn.Module):
    """``f(W x + V x)`` as one call of addmm: what is added is a contribution like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(randn(4, 5, seed=3)), nn.Parameter(randn(4, 5, seed=4))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.elu(torch.addmm(x[:, :1] * self.v[0], x, self.w, beta=0.5, alpha=3)))


def test_a_summand_belongs_to_its_part() -> None:
    torch.manual_seed(0)
    model, x = Added().double(), randn(3, 4)
    found = frpc.compile(model, (x,), rule=frpc.rules.DeepLiftRevealCancel())(x, target=0).relevance
    with torch.no_grad():
        f, w, v = nn.functional.elu, 3 * model.w, 0.5 * model.v[0]
        parts = torch.cat([x[:, :, None] * w, (x[:, :1] * v)[:, None]], 1)  # [B, contributions, neurons]
        up, down = parts.clamp(min=0).sum(1), parts.clamp(max=0).sum(1)
        risen, fallen = 0.5 * (f(up) + f(up + down) - f(down)), 0.5 * (f(down) + f(up + down) - f(up))
        slope = torch.where(parts > 0, (risen / up)[:, None], (fallen / down)[:, None])
        shared = (parts * slope * model.head.weight[0]).sum(-1)
        expected = shared[:, :4]
        expected[:, 0] += shared[:, 4]
    assert float((found - expected).abs().sum() / expected.abs().sum()) <= 1e-12


def test_it_adds_up_in_a_convolutional_net_in_both_directions() -> None:
    torch.manual_seed(2)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ]
    model, x = nn.Sequential(*layers).double(), randn(2, 2, 8, 8)
    explainer = frpc.compile(model, (x,), method="deeplift-reveal-cancel")
    found = explainer(x, target=2)
    gained = (model(x) - model(torch.zeros_like(x)))[:, 2].detach()
    for maps in (found.relevance, explainer.at("1", x, target=2)["1"], explainer.at("4", x, target=2)["4"]):
        assert float((maps.flatten(1).sum(1) - gained).abs().max()) <= 1e-12
    dense, pulled = (explainer.layer("3", x, strategy=s).dense() for s in ("forward", "transposed"))
    assert float((dense - pulled).abs().sum() / pulled.abs().sum()) <= 1e-10


def test_neurons_with_two_multipliers_have_no_relevance() -> None:
    x = randn(1, 4)
    explainer = frpc.compile(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double(), method="deeplift-reveal-cancel")
    with pytest.raises(OptionError, match=r"^0: the rule reveal_cancel treats this layer and the activation after it as one"):
        explainer.at("0", x, target=0)
    assert explainer.at("1", x, target=0)["1"].shape == (1, 3)
