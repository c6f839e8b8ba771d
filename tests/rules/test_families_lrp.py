"""The LRP family: each rule set equals its twin of the paper, runs both ways where it is linear, survives denominators of 0."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
import twins
from families import NETS, both_ways, built, by_sample, compiled, error, explained, mlp, net, pooled, randn
from frpc.errors import InputError, OptionError, UnsupportedOpError
from frpc.rules import (
    LRP,
    AlphaBeta,
    AttnLRP,
    DeepTaylor,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    Flat,
    Gamma,
    RuleSet,
    WSquare,
    ZBox,
    ZPlus,
)

EPS, TINY = 0.05, 0.01  # large enough to show

Twin = Callable[[list[twins.Layer], Tensor, Tensor], Tensor]


def rule(dense: twins.Share, convolution: twins.Share | None = None, first: twins.Share | None = None) -> Twin:
    return lambda layers, x, r: twins.lrp(layers, x, r, dense, convolution, first)


def box(low: float, high: float) -> twins.Share:
    """The box of one number for all cells."""

    def share(layer: twins.Weighted, a: Tensor, r: Tensor) -> Tensor:
        return twins.z_box(torch.full_like(a, low), torch.full_like(a, high), TINY)(layer, a, r)

    return share


EPSILON = twins.epsilon(EPS)
FAMILY: dict[str, tuple[RuleSet, Twin]] = {
    "lrp-0": (LRP(0.0), rule(twins.epsilon(0.0))),
    "epsilon": (LRP(EPS), rule(EPSILON)),
    "z+": (ZPlus(TINY), rule(twins.z_plus(TINY))),
    "alpha 2 beta 1": (AlphaBeta(2.0, 1.0, TINY), rule(twins.alpha_beta(2.0, 1.0, TINY))),
    "alpha 1.5 beta 0.5": (AlphaBeta(1.5, 0.5, TINY), rule(twins.alpha_beta(1.5, 0.5, TINY))),
    "alpha 1 beta 0": (AlphaBeta(1.0, 0.0, TINY), rule(twins.z_plus(TINY))),
    "gamma": (Gamma(0.25, TINY), rule(twins.gamma(0.25, TINY))),
    "gamma 3": (Gamma(3.0, TINY), rule(twins.gamma(3.0, TINY))),
    "w^2": (WSquare(EPS, TINY), rule(EPSILON, None, twins.w_square(TINY))),
    "flat": (Flat(EPS, TINY), rule(EPSILON, None, twins.flat(TINY))),
    "z-box": (ZBox(EPS, TINY, -4.0, 5.0), rule(EPSILON, None, box(-4.0, 5.0))),
    "epsilon-plus": (EpsilonPlus(EPS, TINY), rule(EPSILON, twins.z_plus(TINY))),
    "epsilon-plus-flat": (EpsilonPlusFlat(EPS, TINY), rule(EPSILON, twins.z_plus(TINY), twins.flat(TINY))),
    "epsilon-alpha2-beta1": (EpsilonAlpha2Beta1(EPS, TINY), rule(EPSILON, twins.alpha_beta(2.0, 1.0, TINY))),
    "epsilon-alpha2-beta1-flat": (
        EpsilonAlpha2Beta1Flat(EPS, TINY), rule(EPSILON, twins.alpha_beta(2.0, 1.0, TINY), twins.flat(TINY)),
    ),
    "epsilon-gamma-box": (
        EpsilonGammaBox(EPS, TINY, -4.0, 5.0, 0.5), rule(EPSILON, twins.gamma(0.5, TINY), box(-4.0, 5.0)),
    ),
    "deep Taylor": (DeepTaylor(stabilizer=TINY), rule(twins.z_plus(TINY), None, twins.w_square(TINY))),
    "deep Taylor, boxed": (
        DeepTaylor(stabilizer=TINY, low=-4.0, high=5.0), rule(twins.z_plus(TINY), None, box(-4.0, 5.0)),
    ),
}  # fmt: skip
FIRST = {name for name in FAMILY if any(word in name for word in ("w^2", "flat", "box", "deep"))}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("of", NETS)
def test_rule_set_is_its_twin(name: str, of: str) -> None:
    """R of the input, for any linear functional of the output; nets with bias, inputs of both signs."""
    model, x = net(of)
    rules, twin = FAMILY[name]
    with torch.no_grad():
        output = model(x)
    layers, seed = twins.dense(model, x.shape[1:]), randn(*output.shape, seed=5)
    expected = by_sample(lambda a, r: twin(layers, a, r), x, seed * output)
    assert error(explained(model, x, rules, seed), expected) <= 1e-10


@pytest.mark.parametrize(
    ("rules", "of"),
    [
        (LRP(0.0), "mlp"),
        (LRP(0.0), "residual"),
        (Gamma(0.25, 1e-14), "residual"),
        (ZPlus(1e-14), "mlp"),
        (ZPlus(1e-14), "max pool"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_without_bias_all_relevance_arrives(rules: RuleSet, of: str) -> None:
    """Biases absorb; where there are none, and eps is next to nothing, the map sums to the explained output.

    z+ gives nothing of a neuron that nothing raised, so for it only outputs above 0 are explained.
    """
    model, x = net(of, bias=False)
    with torch.no_grad():
        output = model(x)
    seed = (output > 0).double() if isinstance(rules, ZPlus) else torch.ones_like(output)
    explanation = compiled(model, x, rule=rules)(x, seed=seed)
    relevance = explanation.relevance
    assert isinstance(relevance, Tensor)
    size = relevance.abs().flatten(1).sum(1)
    assert bool((size > 0.01).all())
    bound = (1e-12 if isinstance(rules, LRP) else 1e-10) * size  # the stabilizer, 1e-14, against sums of a few thousandths
    assert bool(((relevance.flatten(1).sum(1) - (seed * output).sum(1)).abs() <= bound).all())
    assert bool((explanation.bias.abs() <= bound).all())


def test_what_biases_absorb_is_reported() -> None:
    """The map and the share beside it sum to the explained output."""
    model, x = net("max pool")
    explanation = compiled(model, x, rule=LRP(EPS))(x, target=2)
    relevance = explanation.relevance
    assert isinstance(relevance, Tensor)
    assert bool((explanation.bias.abs() > 1e-3).all())
    missing = relevance.flatten(1).sum(1) + explanation.bias - explanation.output[:, 2]
    assert bool((missing.abs() <= 1e-13 * relevance.abs().flatten(1).sum(1)).all())


@pytest.mark.parametrize("of", ["max pool", "residual"])
def test_z_plus_never_changes_the_sign(of: str) -> None:
    """A positive start gives a map without negative cells."""
    model, x = net(of)
    relevance = explained(model, x, ZPlus(), model(x).detach())  # R = z^2
    assert bool((relevance >= 0).all()) and bool((relevance > 0).any())


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in FIRST])
@pytest.mark.parametrize("of", ["strided", "residual", "signed"])
def test_forward_is_the_transpose(name: str, of: str) -> None:
    """`<push(u), v> == <u, pull(v)>`, over the whole net and map by map."""
    model, x = net(of)
    assert both_ways(model, (x,), FAMILY[name][0]) <= 1e-11


@pytest.mark.parametrize("of", ["mlp", "max pool"])
def test_forward_maps_of_a_layer_are_the_transposed_ones(of: str) -> None:
    """Dense columns, the thesis's algorithm 1, under an LRP rule."""
    model, x = net(of)
    explainer = compiled(model, x, rule=ZPlus(TINY))
    name = explainer.layers()[2]
    forward, backward = (explainer.layer(name, x, strategy=s).dense() for s in ("forward", "transposed"))
    assert error(forward, backward) <= 1e-12


# Denominators that are nothing --------------------------------------------------------------------------------------------


@functools.cache
def single(weight: tuple[float, ...], bias: float | None = None) -> nn.Sequential:
    """One dense layer of one neuron."""
    layer = nn.Linear(len(weight), 1, bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([list(weight)]))
        if bias is not None:
            layer.bias.fill_(bias)
    return nn.Sequential(layer).eval()


CANCEL = {"0": (1.0, -1.0), "-0": (-1.0, 1.0), "1e-300": (1e-300, 0.0), "-1e-300": (-1e-300, 0.0), "denormal": (5e-324, 0.0)}


@pytest.mark.parametrize("x", CANCEL.values(), ids=CANCEL)
@pytest.mark.parametrize("name", FAMILY)
def test_a_neuron_near_zero(name: str, x: tuple[float, float]) -> None:
    """z = +-0, 1e-300, the least denormal: what is given is finite, and the twin's with sgn(0) = +1."""
    model, a = single((1.0, 1.0)), torch.tensor([x], dtype=torch.float64)
    rules, twin = FAMILY[name]
    found = explained(model, a, rules, torch.ones(1, 1, dtype=torch.float64))
    assert bool(torch.isfinite(found).all())
    if name == "lrp-0":  # the quotient 0/0 has the value of its limit, the contributions themselves
        assert torch.equal(found, a)
    else:
        expected = twin(twins.dense(model, (2,)), a[0], model(a)[0].detach())
        assert bool(((found[0] - expected).abs() <= 1e-10 * expected.abs() + 1e-320).all())


@pytest.mark.parametrize("name", ["z+", "alpha 2 beta 1", "gamma"])
def test_no_positive_part(name: str) -> None:
    """z+ = 0: nothing raised the neuron; the stabilizer, with sgn(0) = +1, takes all, and the share is exactly 0."""
    model, a = single((-1.0, -2.0), -0.5), torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    rules, twin = FAMILY[name]
    found = explained(model, a, rules, torch.ones(1, 1, dtype=torch.float64))
    expected = twin(twins.dense(model, (2,)), a[0], model(a)[0].detach())
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[0], expected) or error(found[0], expected) <= 1e-14
    if name == "z+":
        assert torch.equal(found, torch.zeros_like(a))


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "lrp-0"])
@pytest.mark.parametrize("value", [0.0, -1e-300])
def test_inputs_of_nothing(name: str, value: float) -> None:
    """A picture of one value near 0 through a whole net: finite, and the twin's."""
    model, x = net("max pool")
    x = torch.full_like(x, value)
    rules, twin = FAMILY[name]
    with torch.no_grad():
        output = model(x)
    layers = twins.dense(model, x.shape[1:])
    expected = by_sample(lambda a, r: twin(layers, a, r), x, output)
    found = explained(model, x, rules, torch.ones_like(output))
    assert bool(torch.isfinite(found).all())
    assert bool(((found - expected).abs() <= 1e-10 * expected.abs().sum() + 1e-307).all())


def test_sign_of_zero_is_plus_one() -> None:
    """`z + eps sgn(z)` at +0 and -0 is +eps: Bach et al. leave it open, method §5 says so."""
    from frpc.rules.lrp.lrp import stabilized

    z = torch.tensor([0.0, -0.0, 2.0, -2.0, 1e-300, -1e-300], dtype=torch.float64)
    assert stabilized(z, 0.5).tolist() == [0.5, 0.5, 2.5, -2.5, 0.5, -0.5]


# Transformers -------------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """One head without biases."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d, d, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


def test_attn_lrp_is_its_twin() -> None:
    """Softmax by Taylor, products by halves: relevance goes to queries and keys as well as to values."""
    model, x = built(lambda: nn.Sequential(SelfAttention(4))), randn(2, 5, 4, seed=2)
    part = model[0]
    assert isinstance(part, SelfAttention)
    with torch.no_grad():
        output = model(x)
    seed = randn(*output.shape, seed=6)
    weights = [p.weight.detach() for p in (part.query, part.key, part.value)]
    expected = torch.stack([twins.attn_lrp(a, r, *weights, EPS) for a, r in zip(x, seed * output, strict=True)])
    assert error(explained(model, x, AttnLRP(EPS), seed), expected) <= 1e-10
    assert both_ways(model, (x,), AttnLRP(EPS)) <= 1e-11


# What is refused ------------------------------------------------------------------------------------------------------------


def test_box_that_the_input_leaves() -> None:
    model, x = net("max pool")
    explainer = frpc.compile(model, x.clamp(0, 1), rule=ZBox())
    with pytest.raises(
        InputError, match=r"z-box rule needs inputs between low and high; this one goes 1 above high.*low = -mean/std"
    ):
        explainer(x.clamp(0, 1) + 1, target=0)
    with pytest.raises(InputError, match=r"this one goes 0\.5 below low"):
        explainer(x.clamp(0, 1) - 0.5, target=0)
    with pytest.raises(InputError, match=r"z-box"):
        compiled(model, x, rule=EpsilonGammaBox())(x, target=0)


def test_alpha_and_beta_that_do_not_conserve() -> None:
    with pytest.raises(OptionError, match=r"alpha=2\.0, beta=0\.5: both must be at least 0, with alpha - beta = 1"):
        AlphaBeta(2.0, 0.5)
    with pytest.raises(OptionError, match="both must be at least 0"):
        AlphaBeta(0.5, -0.5)


def test_first_layer_rules_elsewhere_are_refused() -> None:
    """A rule that does not look at values cannot stand between layers: there is no multiplier for it to hand on."""
    model, x = net("mlp")
    with pytest.raises(UnsupportedOpError, match="it can only be used for a layer that reads the input"):
        compiled(model, x, rule=frpc.rules.compose({"2": _FlatEverywhere()}, default=LRP()))


class _FlatEverywhere(Flat):
    def layer_rule(self, site: frpc.rules.Site) -> frpc.rules.table.Rule:
        return self.first_rule(site)


@pytest.mark.parametrize("name", ["flat", "z-box", "w^2"])
def test_first_layer_rules_have_no_forward_direction(name: str) -> None:
    """They give relevance itself where others give a multiplier; asked for columns, they say so."""
    model = built(lambda: pooled(True))
    x = randn(1, 2, 6, 6, seed=3).clamp(-3, 3)
    explainer = compiled(model, x, rule=FAMILY[name][0])
    layer = explainer.layers()[1]
    with pytest.raises(OptionError, match="|".join(("flat", "z_box", "w_square"))):
        explainer.layer(layer, x, strategy="forward")


def test_tensor_bounds_broadcast_to_a_sample() -> None:
    """Bounds per channel, as of a normalized photo."""
    model, x = net("max pool")
    x = x.clamp(-1.5, 1.5)
    low, high = torch.tensor([-1.5, -2.0]).view(2, 1, 1), torch.tensor([1.5, 2.5]).view(2, 1, 1)
    layers = twins.dense(model, x.shape[1:])
    bounds = [b.double().expand(2, 6, 6).flatten() for b in (low, high)]
    with torch.no_grad():
        output = model(x)
    expected = by_sample(lambda a, r: twins.lrp(layers, a, r, EPSILON, None, twins.z_box(*bounds, TINY)), x, output)
    assert error(explained(model, x, ZBox(EPS, TINY, low, high), torch.ones_like(output)), expected) <= 1e-10


def test_mlp_first_layer_is_the_one_that_reads_the_input() -> None:
    """A view in front of it changes nothing."""
    plain, x = built(lambda: mlp(True)), randn(2, 6)
    viewed = nn.Sequential(nn.Flatten(), *plain)
    seed = randn(2, 4)
    found = explained(viewed, x.view(2, 2, 3), Flat(EPS, TINY), seed)
    assert torch.equal(found.flatten(1), explained(plain, x, Flat(EPS, TINY), seed))
