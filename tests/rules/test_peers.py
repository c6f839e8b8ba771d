"""The same numbers as Captum and zennit on the nets they are right for, and what is right where they are not.

Both work by hooks on modules: a plain sequence of modules, each called once, is what they explain. zennit divides by
`z + stabilizer` in average pools and sums too, and its canonizer leaves the eps of a merged batch norm where it was; `1e-12` for
both keeps that below the bound. Bounds are relative L1 in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from families import built, compiled, error, mlp, normed, pooled, randn, strided
from frpc.rules import (
    LRP,
    AlphaBeta,
    Deconvnet,
    DeepLift,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    Flat,
    Gamma,
    Gradient,
    GuidedBackprop,
    RuleSet,
    WSquare,
    ZBox,
    ZPlus,
)

captum = pytest.importorskip("captum")
attr = pytest.importorskip("captum.attr")
lrp_rules = pytest.importorskip("captum.attr._utils.lrp_rules")
zennit = pytest.importorskip("zennit")
composites = pytest.importorskip("zennit.composites")
canonizers = pytest.importorskip("zennit.canonizers")
rules = pytest.importorskip("zennit.rules")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes on non-linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor \\d did not already require gradients:UserWarning"),
]

TINY = 1e-12
NETS: dict[str, tuple[Callable[[bool], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)), "VGG-like": (pooled, (2, 6, 6)), "strided": (strided, (2, 6, 6)), "batch norm": (normed, (2, 6, 6)),
}  # fmt: skip


def net(name: str) -> tuple[nn.Sequential, Tensor]:
    make, shape = NETS[name]
    model = built(lambda: make(True))
    for part in model:
        if isinstance(part, nn.BatchNorm2d):
            part.eps = TINY
    return model, randn(2, *shape, seed=3)


def ours(model: nn.Module, x: Tensor, rule: RuleSet, target: int) -> Tensor:
    return compiled(model, x, rule=rule, bias="separate")(x, target=target).relevance


untouched = functools.cache(net)
"""A net that no peer puts hooks on."""


# Captum -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", NETS)
def test_input_x_gradient(of: str) -> None:
    model, x = net(of)
    assert error(ours(*untouched(of), Gradient(), 1), attr.InputXGradient(model).attribute(x, target=1).detach()) <= 1e-12


@pytest.mark.parametrize("of", ["mlp", "VGG-like", "strided"])
def test_guided_backprop_and_deconvolution(of: str) -> None:
    model, x = net(of)
    assert error(ours(*untouched(of), GuidedBackprop(), 1), attr.GuidedBackprop(model).attribute(x, target=1).detach()) <= 1e-12
    assert error(ours(*untouched(of), Deconvnet(), 1), attr.Deconvolution(model).attribute(x, target=1).detach()) <= 1e-12


@pytest.mark.parametrize("of", ["mlp", "average"])
def test_deeplift(of: str) -> None:
    """The rescale rule, without max pools: Captum gives those to the winner at the input alone."""
    model, x = net("mlp") if of == "mlp" else (built(lambda: pooled(True, nn.AvgPool2d)), randn(2, 2, 6, 6, seed=3))
    reference = randn(1, *x.shape[1:], seed=4)
    expected = attr.DeepLift(model).attribute(x, reference, target=1).detach()
    assert error(ours(model, x, DeepLift(reference), 1), expected) <= 1e-8  # Captum takes the slope where |dx| < 1e-10


@pytest.mark.parametrize("of", ["mlp", "VGG-like"])
def test_captum_lrp(of: str) -> None:
    """Captum's epsilon rule, which it gives to every layer that is told to have it."""
    model, x = net(of)
    for layer in model:
        if not isinstance(layer, nn.ReLU):
            layer.rule = lrp_rules.EpsilonRule(epsilon=1e-9)
    expected = attr.LRP(model).attribute(x, target=1).detach()
    assert error(ours(*untouched(of), LRP(1e-9), 1), expected) <= 1e-6


# zennit -----------------------------------------------------------------------------------------------------------------------


def zennits(model: nn.Module, x: Tensor, composite: object, target: int) -> Tensor:
    """R of the input for R of the output = z e_c."""
    x = x.clone().requires_grad_()
    with composite.context(model) as hooked:  # type: ignore[attr-defined]
        output = hooked(x)
        start = torch.zeros_like(output)
        start[:, target] = output[:, target].detach()
        (relevance,) = torch.autograd.grad(output, x, start)
    return relevance.detach()


def everywhere(rule: object) -> object:
    """One rule for all layers with weights; activations pass."""
    kinds = zennit.types
    return composites.LayerMapComposite(
        [(kinds.Activation, rules.Pass()), (kinds.AvgPool, rules.Norm(TINY)), (kinds.Linear, rule)]
    )


def first(rule: object) -> object:
    """One rule for the first layer, epsilon for the others."""
    kinds = zennit.types
    rest = [(kinds.Activation, rules.Pass()), (kinds.AvgPool, rules.Norm(TINY)), (kinds.Linear, rules.Epsilon(1e-6))]
    return composites.SpecialFirstLayerMapComposite(rest, [(kinds.Linear, rule)])


LOW, HIGH = -4.0, 5.0


def gamma_box(x: Tensor) -> object:
    """zennit's EpsilonGammaBox with the bias left out of the box alone: the z-beta rule has none (Montavon et al. 2017)."""
    box = rules.ZBox(torch.full_like(x[:1], LOW), torch.full_like(x[:1], HIGH), TINY, zero_params=["bias"])
    return composites.EpsilonGammaBox(
        torch.full_like(x[:1], LOW), torch.full_like(x[:1], HIGH), 0.01, 0.25, TINY, first_map=[(zennit.types.Convolution, box)]
    )


RULES: dict[str, tuple[RuleSet, Callable[[Tensor], object]]] = {
    "Epsilon": (LRP(0.01), lambda x: everywhere(rules.Epsilon(0.01))),
    "ZPlus": (ZPlus(0.01), lambda x: everywhere(rules.ZPlus(0.01))),
    "AlphaBeta": (AlphaBeta(2, 1, 0.01), lambda x: everywhere(rules.AlphaBeta(2.0, 1.0, 0.01))),
    "Gamma": (Gamma(0.25, 0.01), lambda x: everywhere(rules.Gamma(0.25, 0.01))),
    "ZBox": (
        ZBox(1e-6, 0.01, LOW, HIGH),
        lambda x: first(rules.ZBox(torch.full_like(x[:1], LOW), torch.full_like(x[:1], HIGH), 0.01, zero_params=["bias"])),
    ),
    "WSquare": (WSquare(1e-6, 0.01), lambda x: first(rules.WSquare(0.01, zero_params=["bias"]))),
    "Flat": (Flat(1e-6, 0.01), lambda x: first(rules.Flat(0.01))),
    "EpsilonPlus": (EpsilonPlus(0.01, TINY), lambda x: composites.EpsilonPlus(0.01, TINY)),
    "EpsilonPlusFlat": (EpsilonPlusFlat(0.01, TINY), lambda x: composites.EpsilonPlusFlat(0.01, TINY)),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(0.01, TINY), lambda x: composites.EpsilonAlpha2Beta1(0.01, TINY)),
    "EpsilonAlpha2Beta1Flat": (EpsilonAlpha2Beta1Flat(0.01, TINY), lambda x: composites.EpsilonAlpha2Beta1Flat(0.01, TINY)),
    "EpsilonGammaBox": (EpsilonGammaBox(0.01, TINY, LOW, HIGH), gamma_box),
}


# zennit's box is for convolutions; ours is for the layer that reads the input
PAIRS = [(of, name) for of in NETS for name in RULES if (of, name) != ("mlp", "EpsilonGammaBox")]


@pytest.mark.parametrize(("of", "name"), PAIRS)
def test_zennit(of: str, name: str) -> None:
    """zennit's rules and composites under their own names; batch norm merged by its canonizer where there is one."""
    model, x = net(of)
    rule, make = RULES[name]
    target = int(model(x).sum(0).argmax())  # z+ gives nothing of an output that nothing raised
    own = ours(*untouched(of), rule, target)
    composite = make(x)
    composite.canonizers = [canonizers.SequentialMergeBatchNorm()]  # type: ignore[attr-defined]
    assert float(own.abs().sum()) > 1e-3
    assert error(own, zennits(model, x, composite, target)) <= 1e-6


# Where peers are wrong --------------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """One ReLU module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.relu(self.second(self.relu(self.first(x)))))


class Functional(Reused):
    """The same with functional ReLUs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class Plus(Reused):
    """A residual written with `+`."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.third(h + F.relu(self.second(h)))


class Pair(Reused):
    """Two inputs that meet in a product."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.third(F.relu(self.first(x)) * torch.sigmoid(self.first(y)))


def complete(model: nn.Module, inputs: tuple[Tensor, ...], references: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> float:
    """`|sum R - (f(x) - f(x_ref))|` against the size of the map."""
    with torch.no_grad():
        change = (model(*inputs) - model(*references))[:, 1]
    flat = torch.cat([m.flatten(1) for m in found], 1)
    return float(((flat.sum(1) - change).abs() / flat.abs().sum(1)).max())


@pytest.mark.parametrize("kind", [Functional, Reused, Plus], ids=lambda kind: kind.__name__)
def test_deeplift_where_hooks_see_too_little(kind: type[nn.Module]) -> None:
    """Ours is complete; Captum's, whose hooks see modules once, raises or is far off."""
    model, x = built(lambda: nn.Sequential(kind())), randn(2, 6, seed=3)
    reference = randn(1, 6, seed=4)
    assert complete(model, (x,), (reference,), (ours(model, x, DeepLift(reference), 1),)) <= 1e-12
    try:
        theirs = attr.DeepLift(model).attribute(x, reference, target=1).detach()
    except RuntimeError:
        pass
    else:
        assert complete(model, (x,), (reference,), (theirs,)) > 0.01


def test_several_inputs_in_a_product() -> None:
    """Increments of both inputs add up; without a rule for `*`, Captum's do not."""
    model = built(lambda: nn.Sequential(Pair()))[0]
    x, y = randn(2, 6, seed=3), randn(2, 6, seed=5)
    zeros = (torch.zeros_like(x), torch.zeros_like(y))
    found = frpc.compile(model, (x, y), rule=DeepLift())(x, y, target=1).relevance
    assert complete(model, (x, y), zeros, found) <= 1e-12
    try:
        theirs = attr.DeepLift(model).attribute((x, y), zeros, target=1)
    except RuntimeError:
        return
    assert complete(model, (x, y), zeros, tuple(t.detach() for t in theirs)) > 0.01


@pytest.mark.parametrize("kind", [Functional, Plus], ids=lambda kind: kind.__name__)
def test_lrp_where_hooks_see_too_little(kind: type[nn.Module]) -> None:
    """Without biases LRP-0 conserves: ours does. zennit's `+` gives each branch all of R."""
    model, x = built(lambda: nn.Sequential(kind()))[0], randn(2, 6, seed=3)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    zeros = torch.zeros_like(x)
    assert complete(model, (x,), (zeros,), (ours(model, x, LRP(0.0), 1),)) <= 1e-12
    theirs = zennits(model, x, everywhere(rules.Epsilon(1e-12)), 1)
    lost = complete(model, (x,), (zeros,), (theirs,))
    assert lost > 0.01 if kind is Plus else lost <= 1e-9 or lost > 0.01
