"""The explainer as a user holds it: targets, batches, inputs, bias policies, inner layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from explained_nets import Maps, agrees, conserves, explainer, images, net, randn, settled
from frpc.errors import SourceError

# Targets ----------------------------------------------------------------------------------------------------------------


def test_targets_agree() -> None:
    """An int, `[B]`, `[B, 1]`, a number without dimensions and the unit seed ask for the same map."""
    x = images(3)
    out = explainer()(x, target=2)
    expected = net()(x).detach()
    assert agrees(out.output, expected)
    assert out.relevance.shape == x.shape
    assert out.bias.shape == (3,)
    assert conserves(out.relevance, expected[:, 2])
    unit = F.one_hot(torch.full((3,), 2), 5).double()
    for same in ({"target": torch.tensor([2, 2, 2])}, {"target": torch.tensor(2)}, {"seed": unit}, {"seed": unit.float()}):
        again = explainer()(x, **same)
        assert torch.equal(again.relevance, out.relevance)
        assert torch.equal(again.bias, out.bias)
    for column in ({"target": torch.tensor([[2], [2], [2]])}, {"seed": unit[:, None]}):
        again = explainer()(x, **column)
        assert again.relevance.shape == (3, 1, 3, 12, 10)
        assert agrees(again.relevance[:, 0], out.relevance)
        assert agrees(again.bias[:, 0], out.bias)


def test_several_targets_of_each_sample() -> None:
    x, targets = images(2), torch.tensor([[4, 0, 4], [1, 2, 3]], dtype=torch.int32)
    out = explainer()(x, target=targets)
    assert out.relevance.shape == (2, 3, 3, 12, 10)
    assert out.bias.shape == (2, 3)
    assert conserves(out.relevance, out.output.gather(1, targets.long()))
    for k in range(3):
        one = explainer()(x, target=targets[:, k])
        assert agrees(out.relevance[:, k], one.relevance)
        assert agrees(out.bias[:, k], one.bias)
    assert torch.equal(out.map(1, target=2), out.relevance[1, 2])
    seeds = explainer()(x, seed=F.one_hot(targets.long(), 5).double())
    assert torch.equal(seeds.relevance, out.relevance)


def test_seeds_are_linear() -> None:
    x, weights = images(2), randn(2, 5, seed=1)
    out = explainer()(x, seed=weights)
    parts = explainer()(x, target=torch.arange(5).expand(2, 5))
    assert agrees(out.relevance, torch.einsum("bk,bkchw->bchw", weights, parts.relevance))
    assert agrees(out.bias, (weights * parts.bias).sum(1))
    assert conserves(out.relevance, (weights * out.output).sum(1))


def test_targets_of_an_output_of_several_dimensions() -> None:
    model, x = settled(Maps()), randn(2, 1, 6, 5)
    compiled = frpc.compile(model, (x,))
    out = compiled(x, target=(1, 3, 2))
    assert conserves(out.relevance, out.output[:, 1, 3, 2])
    seed = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
    seed[:, 1, 3, 2] = 1
    assert torch.equal(compiled(x, seed=seed).relevance, out.relevance)
    columns = compiled(x, seed=torch.stack([seed, 2 * seed], 1))
    assert agrees(columns.relevance, torch.stack([out.relevance, 2 * out.relevance], 1))


@pytest.mark.parametrize("squeeze", [False, True], ids=["B, 1", "B"])
def test_a_single_output_needs_no_target(squeeze: bool) -> None:
    layer = settled(nn.Linear(4, 1))
    model = nn.Sequential(layer, nn.Flatten(0)) if squeeze else layer
    x = randn(3, 4)
    out = frpc.compile(model, (x,))(x)
    assert agrees(out.relevance, x * layer.weight.detach() + layer.bias.detach() / 4)


def test_integers_of_numpy_are_targets() -> None:
    np = pytest.importorskip("numpy")
    x = images(1)
    assert torch.equal(explainer()(x, target=np.int64(3)).relevance, explainer()(x, target=3).relevance)


def test_an_explanation_unpacks() -> None:
    output, relevance = out = explainer()(images(2), target=0)
    assert output is out.output
    assert relevance is out.relevance
    assert torch.equal(out.map(1), relevance[1])


# Batches and inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["uniform", "receptive_field", "separate"])
def test_any_batch_and_samples_apart(bias: str) -> None:
    """Compiled with one sample, asked with 1, 2 and 5: each sample's account is its own."""
    x, targets = images(5), torch.tensor([0, 4, 2, 2, 1])
    whole = explainer(bias)(x, target=targets)
    for part in (slice(0, 1), slice(1, 3), slice(0, 5)):
        out = explainer(bias)(x[part], target=targets[part])
        assert agrees(out.output, whole.output[part])
        assert agrees(out.relevance, whole.relevance[part])
        assert agrees(out.bias, whole.bias[part])


def test_memory_order_of_the_input_does_not_matter() -> None:
    x = images(2)
    out = explainer()(x, target=1)
    for same in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert agrees(explainer()(same, target=1).relevance, out.relevance)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.facts, self.last = nn.Conv2d(1, 3, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        return self.last(F.gelu(self.image(image)).mean((2, 3)) * torch.sigmoid(self.facts(facts)))


def test_tuple_inputs_give_tuple_relevances() -> None:
    model, inputs = settled(TwoInputs()), (randn(3, 1, 5, 4), randn(3, 4, seed=1))
    compiled = frpc.compile(model, inputs)
    out = compiled(*inputs, target=1)
    assert isinstance(out.relevance, tuple)
    assert [r.shape for r in out.relevance] == [x.shape for x in inputs]
    assert conserves(torch.cat([r.flatten(1) for r in out.relevance], 1), out.output[:, 1])
    assert torch.equal(out.map(2, source=1), out.relevance[1][2])
    columns = compiled(*inputs, target=torch.tensor([[0, 1]] * 3))
    assert [tuple(r.shape) for r in columns.relevance] == [(3, 2, 1, 5, 4), (3, 2, 4)]
    assert agrees(columns.relevance[0][:, 1], out.relevance[0])
    small = compiled(*(x[:1] for x in inputs), target=1)
    assert agrees(small.relevance[1], out.relevance[1][:1])


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.kind == "dict":
            return {"logits": y, "features": x.relu()}
        return (x.relu(), y) if self.kind == "tuple" else OrderedDict(logits=y, classes=y.argmax(1))


@pytest.mark.parametrize(("kind", "output"), [("dict", "logits"), ("tuple", 1), ("tuple", -1), ("one float", None)])
def test_which_output_is_explained(kind: str, output: str | int | None) -> None:
    model, x = settled(Several(kind)), randn(2, 4)
    out = frpc.compile(model, (x,), output=output)(x, target=2)
    assert agrees(out.relevance, x * model.layer.weight.detach()[2] + model.layer.bias.detach()[2] / 4)


def test_the_identity_is_explained_by_itself() -> None:
    x = randn(2, 4)
    out = frpc.compile(nn.Identity(), (x,))(x, target=1)
    assert torch.equal(out.relevance, x * F.one_hot(torch.tensor([1, 1]), 4))
    assert torch.equal(out.bias, torch.zeros(2, dtype=torch.float64))


class Elsewhere(nn.Module):
    """An output that does not depend on the input's values."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.answer.expand(x.shape[0], 3)


def test_an_output_of_constants_is_refused() -> None:
    """Its map would say nothing of the input."""
    with pytest.raises(SourceError, match="No path carries relevance from the sources"):
        frpc.compile(settled(Elsewhere()), (randn(2, 4),))


def gradients_at(model: nn.Module, names: Sequence[str], x: Tensor, target: int) -> list[Any]:
    """The gradient of a logit at the input, then value and gradient of each named layer, by autograd."""
    values: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: values.__setitem__(name, o)) for name in names
    ]
    with torch.enable_grad():
        tracked = x.clone().requires_grad_()
        logit = model(tracked)[:, target].sum()
        at_input, *gradients = torch.autograd.grad(logit, [tracked, *(values[name] for name in names)])
    for handle in handles:
        handle.remove()
    return [at_input, *((values[name].detach(), gradient) for name, gradient in zip(names, gradients, strict=True))]


# Bias policies ----------------------------------------------------------------------------------------------------------


def test_separate_leaves_the_constants_out() -> None:
    x = images(2)
    apart, spread = explainer("separate")(x, target=3), explainer()(x, target=3)
    assert agrees(apart.bias, spread.bias)
    assert agrees(apart.relevance + apart.bias[:, None, None, None] / x[0].numel(), spread.relevance)
    assert bool(((apart.relevance.flatten(1).sum(1) + apart.bias - apart.output[:, 3]).abs() <= 1e-12).all())
    gradient = torch.autograd.grad(net()(tracked := x.clone().requires_grad_())[:, 3].sum(), tracked)[0]
    assert agrees(apart.relevance, x * gradient, 1e-11)  # for ReLU and max-pool nets


class Local(nn.Module):
    """Convolutions, pools and a residual sum with biases, then a layer that sees everything; for `[B, 2, 13, 11]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 3, (3, 1), padding=(1, 0))
        self.third = nn.Conv2d(3, 2, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(x))
        x = F.max_pool2d(x, 3, 2, 1)
        return self.last(F.relu(self.third(F.avg_pool2d(x, 2, 1))).flatten(1))


def connected(model: Local, x: Tensor) -> dict[str, Tensor]:
    """Which input pixels each neuron of a convolution can see, `[I', J', I, J]`, by perturbing a net without signs."""
    positive = copy.deepcopy(model)
    for convolution in (positive.first, positive.second, positive.third):
        nn.init.ones_(convolution.weight)
        nn.init.zeros_(convolution.bias)

    def forward(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = positive.first(image)
        both = positive.second(first)
        pooled = F.avg_pool2d(F.avg_pool2d(first + both, 3, 2, 1), 2, 1)
        return first, both, positive.third(pooled)

    base = torch.ones_like(x[:1])
    reached = {name: [] for name in ("first", "second", "third")}
    for pixel in range(x[0, 0].numel()):
        bumped = base.clone()
        bumped.flatten(2)[..., pixel] += 1
        for name, before, after in zip(reached, forward(base), forward(bumped), strict=True):
            reached[name].append((before != after)[0, 0])
    return {name: torch.stack(found, -1).unflatten(-1, x.shape[2:]) for name, found in reached.items()}


def test_receptive_field_spreads_each_constant_over_what_its_neuron_sees() -> None:
    model, x = settled(Local()), randn(1, 2, 13, 11)
    found = frpc.compile(model, (x,), bias="receptive_field")(x, target=2)
    names = ("first", "second", "third")
    gradients = gradients_at(model, names, x, 2)
    expected = x * gradients[0]
    expected = x * gradients[0]
    for (name, sees), (_, gradient) in zip(connected(model, x).items(), gradients[1:], strict=True):
        constant = (gradient[0] * getattr(model, name).bias.detach()[:, None, None]).sum(0)  # [I', J']
        share = sees.double() / sees.double().sum((2, 3), keepdim=True) / x.shape[1]
        expected = expected + torch.einsum("ij,ijuv->uv", constant, share)
    expected = expected + model.last.bias.detach()[2] / x[0].numel()
    assert agrees(found.relevance, expected, 1e-11)
    assert conserves(found.relevance, found.output[:, 2])
    columns = frpc.compile(model, (x,), bias="receptive_field")(x, target=torch.tensor([[0, 2]]))
    assert agrees(columns.relevance[:, 1], found.relevance)


# Inner layers -----------------------------------------------------------------------------------------------------------


def test_inner_layers_are_value_times_gradient() -> None:
    """For a ReLU net, at batch norms, blocks, pools and the head; several from one pass."""
    x, model = images(2), net()
    names = ["stem.0", "stem.1", "stem.3", "stem", "block.0", "block", "head"]
    _, *expected = gradients_at(model, names, x, 4)
    found = explainer().at(names, x, target=4)
    assert list(found) == names
    assert len(found) == 7
    assert agrees(found.output, model(x).detach())
    for name, (value, gradient) in zip(names, expected, strict=True):
        assert agrees(found[name], value * gradient, 1e-11), name
    one = explainer().at("block.0", x, target=torch.tensor([[0, 4], [4, 1]]))
    assert one["block.0"].shape == (2, 2, 4, 6, 5)
    assert agrees(one["block.0"][0, 1], found["block.0"][0])
    assert agrees(one["block.0"][1, 0], found["block.0"][1])


def test_layers_are_those_of_the_model() -> None:
    names = explainer().layers()
    assert set(names) <= {name for name, _ in net().named_modules()}
    assert [n for n in names if n in ("stem.0", "stem.1", "stem", "block", "head")] == [
        "stem.0",
        "stem.1",
        "stem",
        "block",
        "head",
    ]


def test_predict_is_the_model() -> None:
    x = images(3)
    assert agrees(explainer().predict(x), net()(x).detach())
