"""What all families share: where relevance starts, methods by name, sets composed of others, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
import twins
import twins_increments
from families import NETS, built, by_sample, compiled, error, explained, net, randn
from frpc.errors import InputError, OptionError, ShapeError
from frpc.rules import (
    FRP,
    LID,
    LRP,
    Deconvnet,
    EpsilonPlus,
    Flat,
    Gate,
    Gradient,
    GuidedBackprop,
    Half,
    LIDTaylor,
    RectifiedGradient,
    RuleSet,
    WinnerTakesAll,
    ZBox,
    ZPlus,
    compose,
)
from frpc.rules.top import TOPS, SoftmaxIntegrated

aten = torch.ops.aten

# Where relevance starts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOPS)
@pytest.mark.parametrize("increments", [False, True], ids=["values", "increments"])
def test_top_is_its_twin(name: str, increments: bool) -> None:
    """R of the logits, class by class, and what becomes of it in the layers below.

    Probability, CLRP and SG give relevance that frpc divides by the logit, stabilized by 1e-12: no logit here is below 0.01.
    """
    model, x = net("max pool")
    reference = randn(1, 2, 6, 6, seed=4)
    rules: RuleSet = LIDTaylor(reference) if increments else LRP(0.0)
    with torch.no_grad():
        z = model(x)
        there = model(reference)[0] if increments else torch.zeros(4, dtype=torch.float64)
    assert float((z - there).abs().min()) > 0.01
    layers = twins.dense(model, x.shape[1:])
    for c in range(4):
        start = torch.stack([twins.top(name, row, c, there) for row in z])
        seed = torch.zeros_like(z)
        seed[:, c] = 1
        if increments:
            expected = by_sample(lambda a, r: twins_increments.lid_taylor(layers, a, reference.flatten(), r), x, start)
        else:
            expected = by_sample(lambda a, r: twins.lrp(layers, a, r, twins.epsilon(0.0)), x, start)
        assert error(explained(model, x, rules, seed, TOPS[name]), expected) <= 1e-9


def test_softmax_integrated_sums_to_the_probability_gained() -> None:
    """`sum R(Y^L) = P_c(x) - P_c(x_ref)` (L 24), with an error that falls as 1/n."""
    model, x = net("max pool")
    reference = randn(1, 2, 6, 6, seed=4)
    with torch.no_grad():
        gained = (model(x).softmax(-1) - model(reference).softmax(-1))[:, 1]
    missing = []
    for n in (10, 100, 1000):
        relevance = explained(model, x, LID(reference), torch.eye(4, dtype=torch.float64)[[1, 1]], SoftmaxIntegrated(n))
        missing.append(float((relevance.flatten(1).sum(1) - gained).abs().max()))
    print("SIG:", [f"{e:.1e}" for e in missing])
    assert missing[2] <= 1e-5 and missing[0] > 5 * missing[1] > 25 * missing[2]


def test_gradient_of_softmax_saturates_and_its_integral_does_not() -> None:
    """A confident logit (L 1.5): SG and ST give next to nothing, SIG most of what the probability gained."""
    model, x = net("mlp", bias=False)
    with torch.no_grad():
        z = model(x)[:1]
        x = x[:1] * (60.0 / float(z.max() - z.topk(2).values[0, 1]))  # without biases the logits grow with the input
        p, c = model(x).softmax(-1), int(z.argmax())
    assert float(p[0, c]) > 1 - 1e-12
    sizes = {}
    for name in ("sg-lrp-0", "st-lrp-0", "st-lid-taylor", "sig-lrp-0", "sig-lid-taylor", "sig-lid-ig"):
        sizes[name] = float(compiled(model, x, method=name)(x, target=c).relevance.abs().sum())
    assert all(sizes[name] < 1e-9 for name in ("sg-lrp-0", "st-lrp-0", "st-lid-taylor")), sizes
    assert all(sizes[name] > 0.05 for name in ("sig-lrp-0", "sig-lid-taylor", "sig-lid-ig")), sizes


def test_contrastive_and_softmax_gradient_sum_to_nothing() -> None:
    """What the target gets, the others lose (S 25, 26), at the logits; without biases also below."""
    model, x = net("mlp", bias=False)
    seed = torch.eye(4, dtype=torch.float64)[[2, 2]]
    for name in ("contrastive", "softmax_gradient"):
        relevance = explained(model, x, LRP(0.0), seed, TOPS[name]).flatten(1)
        assert bool((relevance.sum(1).abs() <= 1e-9 * relevance.abs().sum(1)).all())


def test_tokens_and_pixels_have_classes_of_their_own() -> None:
    """Softmax runs over the classes: the last of three dimensions, the second of four."""
    z = randn(2, 5, 3, seed=1)
    seed = torch.zeros_like(z)
    seed[:, 4, 2] = 1
    token = TOPS["softmax_taylor"](seed, z, None)
    assert error(token[0, 4], twins.softmax_gradient(z[0, 4], 2)) <= 1e-12
    assert float(token[:, :4].abs().sum()) == 0
    pixels = z.movedim(-1, 1)[..., None]  # [2, 3, 5, 1]
    assert error(TOPS["softmax_taylor"](seed.movedim(-1, 1)[..., None], pixels, None), token.movedim(-1, 1)[..., None]) <= 1e-14


# Transposed passes that are changed --------------------------------------------------------------------------------------------

CHANGED = {
    "guided": (GuidedBackprop(), twins_increments.guided),
    "deconvnet": (Deconvnet(), twins_increments.deconvolved),
    "RectGrad 0.8": (RectifiedGradient(times_input=False, q=0.8), twins_increments.rectified(80)),
    "RectGrad 0": (RectifiedGradient(times_input=False, q=0.0), twins_increments.rectified(0)),
    "RectGrad 0.07": (RectifiedGradient(times_input=False, q=0.07), twins_increments.rectified(7)),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("of", [name for name in NETS if name != "signed"])
def test_changed_pass_is_its_twin(of: str, name: str) -> None:
    model, x = net(of)
    rules, at_relu = CHANGED[name]
    layers, seed = twins.dense(model, x.shape[1:]), randn(2, 4, seed=5)
    expected = by_sample(lambda a, v: twins_increments.gradient(layers, a, v, at_relu), x, seed)
    assert error(explained(model, x, rules, seed), expected) <= 1e-10
    plain = explained(model, x, Gradient(times_input=False), seed)
    assert name == "RectGrad 0" or error(explained(model, x, rules, seed), plain) > 0.01


def test_rank_of_a_percentile_is_exact() -> None:
    """0.07 of 100 cells are 7, though 0.07 * 100 is 7.000000000000001."""
    model = nn.Sequential(nn.ReLU()).double().eval()
    x = torch.arange(1.0, 101.0, dtype=torch.float64)[None]
    kept = explained(model, x, RectifiedGradient(times_input=False, q=0.07), torch.ones_like(x))
    assert int(kept.sum()) == 93


@pytest.mark.parametrize("rules", [GuidedBackprop(True), Deconvnet(True), RectifiedGradient()], ids=lambda r: r.name)
def test_a_changed_pass_has_no_forward_direction(rules: RuleSet) -> None:
    model, x = net("max pool")
    explainer = compiled(model, x, rule=rules)
    name = r"(guided_relu|deconvnet_relu|rectified_gradient)"
    with pytest.raises(OptionError, match=rf'strategy="forward": .*{name}.*works only backwards'):
        explainer.layer(explainer.layers()[3], x, strategy="forward")


# Methods by name ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[nn.Sequential, Tensor]:
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    return built(lambda: nn.Sequential(*layers)), randn(2, 2, 6, 6, seed=3)


# Pairs of a start and a rule, or of two rules: others of the list have each of them.
BOTH = {"epsilon-plus-flat", "epsilon-alpha2-beta1-flat", "sg-lrp-zp", "st-lrp-0", "st-lid-taylor", "sig-lrp-0", "sig-lid-taylor"}
METHODS = [pytest.param(m, id=m.name, marks=[pytest.mark.slow] if m.name in BOTH else []) for m in frpc.methods()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles_and_prints(method: Any, small: tuple[nn.Sequential, Tensor]) -> None:
    """K targets are K single ones; the printed program is Python; every field says something."""
    model, x = small
    explainer = compiled(model, x, method=method.name)
    many = explainer(x, target=torch.tensor([[0, 3], [1, 2]]))
    for k, targets in enumerate(([0, 1], [3, 2])):
        single = explainer(x, target=torch.tensor(targets))  # another program, compiled above
        assert bool((many.relevance[:, k] - single.relevance).abs().sum() <= 1e-12 * single.relevance.abs().sum())
        assert torch.allclose(many.bias[:, k], single.bias, rtol=1e-10, atol=1e-14)
    assert (explainer.rules.name, explainer.rules.account.conserves) == (method.rules().name, method.rules().account.conserves)
    scope: dict[str, Any] = {}
    exec(compile(explainer.code, "<program>", "exec"), scope)
    seed = explainer.seed_for(x, target=1)
    direct, printed = explainer.program(x, seed), scope["forward"](explainer.program, x, seed)
    assert all(torch.equal(a, b) for a, b in zip(direct, printed, strict=True))
    assert all((method.formula, method.source, method.cost, method.direction, method.use, method.conserves))


def test_methods_are_found_by_any_spelling() -> None:
    model, x = net("mlp")
    expected = compiled(model, x, method="sig-lid-ig")(x, target=1).relevance
    assert torch.equal(compiled(model, x, method="SIG_LID_IG")(x, target=1).relevance, expected)
    assert error(compiled(model, x, rule=LID(), seed="softmax_integrated")(x, target=1).relevance, expected) == 0


def test_a_call_may_start_elsewhere() -> None:
    """`seed=` of a call overrides that of the program, and takes tops, names and tensors."""
    model, x = net("mlp")
    explainer = compiled(model, x, rule=LRP())
    expected = compiled(model, x, rule=LRP(), seed="softmax_taylor")(x, target=1).relevance
    assert torch.equal(explainer(x, target=1, seed="softmax_taylor").relevance, expected)
    assert torch.equal(explainer(x, target=1, seed=TOPS["softmax_taylor"]).relevance, expected)
    tensor = torch.eye(4, dtype=torch.float64)[[1, 1]]
    assert torch.equal(explainer(x, seed=tensor).relevance, explainer(x, target=1).relevance)


# Sets composed of others --------------------------------------------------------------------------------------------------


def test_compose_is_the_composite_it_spells_out() -> None:
    """By pattern and by operator: z+ in convolutions, epsilon elsewhere, flat in the first layer."""
    model, x = net("max pool")
    seed = randn(2, 4, seed=5)
    by_op = compose({aten.convolution: ZPlus()}, default=LRP())
    assert torch.equal(explained(model, x, by_op, seed), explained(model, x, EpsilonPlus(), seed))
    by_name = compose({"0": Flat(), "3": ZPlus()}, default=LRP())
    assert torch.equal(explained(model, x, by_name, seed), explained(model, x, frpc.rules.EpsilonPlusFlat(), seed))
    first_wins = compose({"0": Flat(), aten.convolution.default: ZPlus()}, default=LRP())
    assert torch.equal(explained(model, x, first_wins, seed), explained(model, x, by_name, seed))
    assert error(explained(model, x, by_op, seed), explained(model, x, by_name, seed)) > 0.01


def test_patterns_take_in_what_lies_inside() -> None:
    model, x = net("residual")
    seed = randn(2, 4, seed=5)
    inside = compose({"2": ZPlus()}, default=LRP())
    spelled = compose({"2.body.*": ZPlus()}, default=LRP())
    assert torch.equal(explained(model, x, inside, seed), explained(model, x, spelled, seed))
    assert error(explained(model, x, inside, seed), explained(model, x, LRP(), seed)) > 0.01


def test_the_table_shows_which_rule_each_node_got() -> None:
    model, x = net("max pool")
    explainer = frpc.compile(
        model, x, rule=compose({"0": ZBox(low=-4.0, high=4.0), aten.max_pool2d: LRP(), "3": ZPlus()}, default=LRP())
    )
    rows = {line.split()[0]: line for line in explainer.table().splitlines() if line.strip()}
    text = "\n".join(rows.values())
    assert re.search(r"convolution.*z_box", text) and re.search(r"convolution.*z_plus", text)
    assert len(re.findall(r"\bepsilon\b", text)) == 2, text


def test_products_by_module() -> None:
    """Gate and Half name how a product is shared, module by module."""

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] * x[:, 2:]

    model, x = nn.Sequential(Product()).eval(), randn(2, 4)
    one = torch.ones(2, 2, dtype=torch.float64)
    gate, half = (explained(model, x, compose({"0": chosen}), one) for chosen in (Gate(), Half()))
    assert error(half, torch.cat([x[:, :2] * x[:, 2:] / 2] * 2, 1)) <= 1e-15
    assert error(gate, torch.cat([x[:, :2] * x[:, 2:], torch.zeros(2, 2)], 1)) <= 1e-15
    pool, y = net("max pool")
    seed = randn(2, 4)
    assert torch.equal(explained(pool, y, compose({aten.max_pool2d: WinnerTakesAll()}), seed), explained(pool, y, FRP(), seed))


# What is refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "sig-lid-gi"}, r"method='sig-lid-gi' is unknown; .*sig-lid-ig.*frpc\.methods\(\) lists all"),
    "unknown seed": (
        {"seed": "softmax_taylr"},
        r"seed='softmax_taylr' is unknown; .*softmax_taylor.*, or give a tensor like the output",
    ),
    "method beside rule": (
        {"method": "lid-ig", "rule": LRP()},
        r"Give rule= or method=, not both: method='lid-ig' already chooses a rule set",
    ),
    "place for no constants": (
        {"rule": LRP(), "bias": "receptive_field"},
        r"LRP does not track constants, so there is nothing to distribute",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_compile(name: str) -> None:
    model, x = net("mlp")
    options, message = REFUSED[name]
    with pytest.raises(OptionError, match=message):
        compiled(model, x, **options)


def test_options_of_rule_sets() -> None:
    for make, message in (
        (lambda: LID(steps=0), "steps=0: give at least one point"),
        (lambda: SoftmaxIntegrated(0), "steps=0: the path needs at least one point"),
        (lambda: RectifiedGradient(q=1.0), r"q=1\.0: the fraction to set to 0 must be in \[0, 1\)"),
        (lambda: RectifiedGradient(q=-0.1), r"q=-0\.1"),
        (lambda: LID("mean"), r"reference='mean' is unknown; choose zero or blur, or give tensors \(frpc\.data_mean"),
        (lambda: LID([]), 'reference= takes "zero", "blur", a tensor'),
        (lambda: FRP(product="quarter"), "product='quarter' is unknown"),
        (lambda: frpc.data_mean([]), "needs at least one sample"),
    ):
        with pytest.raises(OptionError, match=message):
            make()


def test_a_reference_of_another_shape() -> None:
    model, x = net("max pool")
    with pytest.raises(
        ShapeError, match=r"The reference has shape \[2, 5, 6\] per sample, but input 'input_?1?' has \[2, 6, 6\]"
    ):
        compiled(model, x, rule=LID(randn(1, 2, 5, 6)))


def test_sets_that_do_not_go_together() -> None:
    """Values and increments, relevance and plain gradients mean different things by a multiplier."""
    for one, base in ((LID(), LRP()), (LRP(), LID()), (Gradient(times_input=False), Gradient()), (LID("blur"), LID())):
        with pytest.raises(OptionError, match=r"at '0' and .* cannot be combined: one explains values, the other increments"):
            compose({"0": one}, default=base)
    with pytest.raises(OptionError, match=r"compose takes patterns or operators -> rule sets, not '0' -> str"):
        compose({"0": "flat"})


def test_the_box_is_checked_inside_a_composition() -> None:
    model, x = net("max pool")
    explainer = frpc.compile(model, x.clamp(0, 1), rule=compose({"0": ZBox()}, default=LRP()))
    with pytest.raises(InputError, match="z-box"):
        explainer(x.clamp(0, 1) * 3, target=0)
