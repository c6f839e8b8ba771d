"""DeepLIFT's reveal-cancel rule: the paper's own example, a dense twin written from it, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frpc
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


def twin(weights: list[Tensor], biases: list[Tensor], x: Tensor, r: Tensor) -> Tensor:
    """One sample through dense layers with sigmoids between them, neuron by neuron; relevance of the input for output 0."""
    values, references = [x], [r]
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        values.append(torch.sigmoid(w @ values[-1] + b))
        references.append(torch.sigmoid(w @ references[-1] + b))
    multiplier = weights[-1][0].clone()
    for level in range(len(weights) - 2, -1, -1):
        w, b = weights[level], biases[level]
        d = values[level] - references[level]
        below = torch.zeros_like(d)
        for j in range(len(w)):
            parts = w[j] * d
            up, down, start = parts[parts > 0].sum(), parts[parts < 0].sum(), w[j] @ references[level] + b[j]
            f = torch.sigmoid
            risen = 0.5 * (f(start + up) - f(start)) + 0.5 * (f(start + up + down) - f(start + down))
            fallen = 0.5 * (f(start + down) - f(start)) + 0.5 * (f(start + up + down) - f(start + up))
            for i in range(len(d)):
                slope = risen / up if parts[i] > 0 else fallen / down if parts[i] < 0 else torch.zeros(())
                below[i] += multiplier[j] * w[j, i] * slope
        multiplier = below
    return multiplier * (x - r)


def test_the_rule_is_the_papers() -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 2)]
    model, x, reference = nn.Sequential(*layers).double(), 3 * randn(4, 5), randn(1, 5, seed=1)
    explainer = frpc.compile(model, (x,), rule=frpc.rules.DeepLiftRevealCancel(reference))
    found = explainer(x, target=0)
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weights, biases = [layer.weight.detach() for layer in dense], [layer.bias.detach() for layer in dense]
    expected = torch.stack([twin(weights, biases, sample, reference[0]) for sample in x])
    assert float((found.relevance - expected).abs().sum() / expected.abs().sum()) <= 1e-10
    gained = (model(x) - model(reference))[:, 0].detach()
    assert float((found.relevance.sum(1) - gained).abs().max()) <= 1e-12


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
    with pytest.raises(OptionError, match=r"^0: the rule reveal_cancel takes this layer and the activation behind it as one"):
        explainer.at("0", x, target=0)
    assert explainer.at("1", x, target=0)["1"].shape == (1, 3)
