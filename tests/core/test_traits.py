"""Traits: what is said of an operator holds, what is not said is taken to be false, and passes need to know nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import frpc
from calls import Made, made
from frpc.assign.receptive import receptive_fields
from frpc.assign.signs import is_nonnegative_call
from frpc.core.graph import bind
from frpc.core.traits import NAMES, UNKNOWN, Operand, Traits, if_all
from frpc.errors import OptionError
from frpc.files.operators import may_hold, operators
from frpc.rules.table import TABLE, Affine, declare, elementwise, rule, traits_of

aten = torch.ops.aten
X = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def calls_of(trait: str) -> list[Made]:
    """The calls of operators of which something is said."""
    found = [call for call in made() if getattr(traits_of(call.op), trait)]
    assert found, f"no operator has {trait}"
    return found


def drawn(like: Tensor, seed: int, nonnegative: bool = False) -> Tensor:
    """Numbers of all sizes, zeros of either sign among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(3 * torch.randn(like.shape, generator=generator, dtype=torch.float64))
    sign = torch.ones(()) if nonnegative else torch.randn(like.shape, generator=generator).sign()
    edges = torch.tensor([0.0, -0.0, 1e-300, 1e200], dtype=torch.float64)
    chosen = edges[torch.randint(4, like.shape, generator=generator)]
    return torch.where(torch.rand(like.shape, generator=generator) < 0.15, chosen, size * sign).to(like.dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


# What is said holds -----------------------------------------------------------------------------------------------------


def test_every_operator_of_which_something_is_said_is_called() -> None:
    met = {call.op for call in made()}  # calls of real numbers
    known = {op: traits_of(op) for op in TABLE.rules if op.namespace == "aten" and not traits_of(op).complex}
    assert not [str(op) for op, traits in known.items() if op not in met and traits != UNKNOWN]


def test_results_that_are_said_to_be_nowhere_negative_are_not() -> None:
    """Whatever the operands are, but for those that are said to matter: these are nowhere negative."""
    claimed: set[OpOverload] = set()
    for call in made():
        names = list(call.operands)
        for positive in itertools.chain.from_iterable(itertools.combinations(names, n) for n in {0, 1, len(names)}):
            if not is_nonnegative_call(call.op, call.args, set(positive)):
                continue
            claimed.add(call.op)
            for seed in range(8):
                values = {n: drawn(x, 100 * seed + i, n in positive) for i, (n, x) in enumerate(call.operands.items())}
                if "self" in values and call.args["self"] is call.args.get("other"):
                    values["other"] = values["self"]  # a product with itself stays one
                assert not bool((call(values) < 0).any()), f"{call} is negative where {positive} are not"
    assert len(claimed) > 120


SIGNS: tuple[tuple[OpOverload, tuple[Any, ...], dict[str, Any], Collection[Operand], bool], ...] = (
    (aten.softplus.default, (), {}, (), True),
    (aten.softplus.default, (-1.0,), {}, (), False),
    (aten.softplus.default, (), {"beta": -1.0}, ("self",), False),
    (aten.softplus.default, (1.0, -5.0), {}, (), False),
    (aten.clamp.default, (0.0,), {}, (), True),
    (aten.clamp.default, (0.0, -1.0), {}, (), False),
    (aten.clamp.default, (), {"max": 1.0}, ("self",), True),
    (aten.clamp.default, (), {"max": -1.0}, ("self",), False),
    (aten.hardtanh.default, (), {}, (), False),
    (aten.hardtanh.default, (0.0, 6.0), {}, (), True),
    (aten.mul.Tensor, (-2.0,), {}, ("self",), False),
    (aten.mul.Tensor, (), {"other": -2.0}, ("self",), False),
    (aten.mul.Tensor, (), {"other": 2.0}, ("self",), True),
    (aten.mul.Tensor, (X,), {}, (), True),
    (aten.mul.Tensor, (-X,), {}, ("self",), False),
    (aten.add.Tensor, (X,), {"alpha": -2}, ("self", "other"), False),
    (aten.add.Tensor, (-3.0,), {}, ("self",), False),
    (aten.avg_pool2d.default, ([2, 2],), {"divisor_override": -3}, ("self",), False),
    (aten.avg_pool2d.default, ([2, 2],), {}, ("self",), True),
    (aten.constant_pad_nd.default, ([1, 1], -1.0), {}, ("self",), False),
    (aten.constant_pad_nd.default, ([1, 1],), {}, ("self",), True),
    (aten.upsample_bicubic2d.vec, ([9, 9], False, None), {}, ("input",), False),
    (aten.upsample_bilinear2d.vec, ([9, 9], False, None), {}, ("input",), True),
    (aten.div.Tensor, (X,), {}, ("self", "other"), False),
    (aten.div.Tensor, (2.0,), {}, ("self",), True),
    (aten.pow.Tensor_Scalar, (2,), {}, (), True),
    (aten.pow.Tensor_Scalar, (3,), {}, (), False),
    (aten.pow.Tensor_Scalar, (-1,), {}, ("self",), False),
    (aten.maximum.default, (X,), {}, ("other",), True),
    (aten.fmax.default, (X,), {}, ("other",), False),
    (aten.flip.default, ([1],), {}, ("self",), True),
    (aten.special_bessel_j0.default, (), {}, ("self",), False),
)


@pytest.mark.parametrize(("op", "args", "kwargs", "positive", "sign"), SIGNS, ids=lambda v: str(v)[:40])
def test_signs_are_those_of_the_call(op: OpOverload, args: Any, kwargs: Any, positive: Any, sign: bool) -> None:
    assert is_nonnegative_call(op, bind(op, (X, *args), kwargs), set(positive)) is sign


@pytest.mark.parametrize(
    "activation", [nn.Softplus(beta=-1), nn.Hardtanh(-1, 1), nn.Hardtanh(-3.0, -0.5), nn.Softplus(1.0, -5.0)], ids=str
)
def test_z_plus_sees_the_sign_of_what_a_layer_reads(activation: nn.Module) -> None:
    """``R_i = R (a_i w_i)+ / sum (a w)+``, whatever the sign of a."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=False).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    explainer = frpc.compile(nn.Sequential(activation, layer), (x,), rule=frpc.rules.ZPlus(stabilizer=1e-12))
    with torch.no_grad():
        a = activation(x)
        parts = (a * layer.weight[1]).clamp(min=0)
        expected = layer(a)[:, 1:2] * parts / (parts.sum(1, keepdim=True) + 1e-12)
    assert torch.allclose(explainer(x, target=1).relevance, expected, rtol=1e-9, atol=1e-12)


def test_gates_are_numbers_between_0_and_1_or_what_norms_and_softmax_are_made_of() -> None:
    for call in calls_of("gate"):
        at = {n: drawn(x, 3).clamp(-30, 30).abs() + 0.1 for n, x in call.operands.items()}
        result, grown, turned = (call({n: k * a for n, a in at.items()}) for k in (1, 2, -1))
        between = all(bool(((v >= 0) & (v <= 1)).all()) for v in (result, turned))
        scales = any(torch.allclose(grown, result * 2.0**k, rtol=1e-9) for k in (1.0, 0.5, -0.5, -1.0))
        exponential = torch.allclose(grown, result * result, rtol=1e-9)
        assert between or scales or exponential, call


def test_elementwise_operators_are_functions_of_one_number() -> None:
    """An element's result is the same wherever it stands."""
    for call in calls_of("elementwise"):
        (name, *others) = call.operands
        if others:
            continue  # parameters of its own for every element
        a = call.operands[name].flatten()
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(1))
        assert torch.allclose(call({name: a[order]}), call({name: a})[order], rtol=1e-13, atol=1e-15, equal_nan=True), call


def test_pointwise_operators_read_the_elements_at_their_place() -> None:
    for call in calls_of("pointwise"):
        traits = traits_of(call.op)
        named = [n for n in call.operands if n not in traits.ignores]
        for name in named[:1] if traits.elementwise else named:
            a = call.operands[name].clone()
            for at in (0, a.numel() // 2, a.numel() - 1):
                changed = a.clone().contiguous()
                changed.view(-1)[at] += 1.7
                mark = torch.zeros_like(changed, dtype=torch.bool).contiguous()
                mark.view(-1)[at] = True
                before, after = call({name: a}), call({name: changed})
                differs = before.nan_to_num(7.0) != after.nan_to_num(7.0)
                assert not bool((differs & ~mark.expand_as(before)).any()), f"{call}: {name} reaches other places"


def test_moved_elements_are_those_of_the_first_operand() -> None:
    for call in calls_of("picks"):
        listed = call.args.get("tensors")
        name = call.op._schema.arguments[0].name
        values = {n: drawn(x, 5) + torch.randn(x.shape).double() for n, x in call.operands.items() if listed or n == name}
        if not values:
            continue  # of integers
        result, given = call(values), torch.cat([v.flatten() for v in values.values()])
        assert bool(torch.isin(result, given).all()), call
        traits = traits_of(call.op)
        if traits.rearranges:
            assert torch.equal(result.flatten().sort()[0], given.sort()[0]), call
        if traits.keeps_order:
            assert torch.equal(result.flatten(), given), call


def test_views_lie_in_the_memory_of_their_operand() -> None:
    for call in calls_of("view"):
        name = call.op._schema.arguments[0].name
        if name not in call.operands:
            continue  # of integers
        a = call.operands[name].contiguous()
        assert call({name: a}).untyped_storage().data_ptr() == a.untyped_storage().data_ptr(), call


def test_casts_change_the_type_alone() -> None:
    for call in calls_of("casts"):
        a = call.operands["self"]
        assert same(call().to(a.dtype), a), call


def test_what_is_ignored_does_not_matter() -> None:
    for call in calls_of("ignores"):
        for name in set(traits_of(call.op).ignores) & set(call.operands):
            assert same(call({name: torch.full_like(call.operands[name], math.nan)}), call()), call
    like: dict[OpOverload, tuple[Any, ...]] = {
        aten.zeros_like.default: (),
        aten.ones_like.default: (),
        aten.full_like.default: (2.0,),
        aten.new_zeros.default: ([2],),
        aten.new_ones.default: ([2],),
        aten.new_full.default: ([2], 3.0),
        aten.fill.Scalar: (2.0,),
    }
    for op, rest in like.items():
        assert traits_of(op).ignores == ("self",)
        assert torch.equal(op(X, *rest), op(X * math.nan, *rest))


def test_products_are_linear_in_each_factor() -> None:
    for call in calls_of("factors"):
        for name in traits_of(call.op).factors or ():
            if name not in call.operands:
                continue
            a = call.operands[name]
            none, once, twice = (call({name: k * a}) for k in (0, 1, 2))
            assert torch.allclose(twice - none, 2 * (once - none), rtol=1e-10, atol=1e-10), call


def test_linear_operators_are_linear_as_far_as_their_choices_hold() -> None:
    step = 1e-6
    for call in calls_of("linear"):
        carried = {n: x for n, x in call.operands.items() if (n if isinstance(n, str) else n[0]) in TABLE.rules[call.op].carries}
        moves = {n: torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double() for n, x in carried.items()}
        for name in set(carried) - {"grid"}:  # the rule of a grid that carries has no term for it, and its gradient is refused
            at = [call({name: carried[name] + k * step * moves[name]}) for k in (0, 1, 2)]
            assert torch.allclose(at[2] - at[1], at[1] - at[0], rtol=1e-6, atol=1e-12), call


def test_rectifiers_are_relus_up_to_a_bound() -> None:
    a = torch.tensor([-9.0, -1.0, -1e-3, 1e-3, 0.01], dtype=torch.float64)
    met = set()
    for call in calls_of("rectifies"):
        rectifies = traits_of(call.op).rectifies
        assert rectifies is not None
        if rectifies(call.args):
            met.add(call.op)
            assert torch.equal(call({"self": a}), a.clamp(min=0)), call
        else:
            assert not torch.equal(call({"self": a}), a.clamp(min=0)), call
    assert met >= {aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}


@pytest.mark.parametrize("rules", [frpc.rules.GuidedBackprop, frpc.rules.Deconvnet, frpc.rules.RectifiedGradient])
@pytest.mark.parametrize("activation", [nn.Hardtanh(), nn.Hardtanh(-2.0, -0.1)], ids=str)
def test_what_is_no_relu_gets_its_gradient(rules: type[frpc.rules.RuleSet], activation: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x)[:, 2].sum(), x)
    explainer = frpc.compile(net, (x.detach(),), rule=rules(times_input=False))  # type: ignore[call-arg]
    assert torch.allclose(explainer(x.detach(), target=2).relevance, expected, rtol=1e-10, atol=1e-13)


# What is not said -------------------------------------------------------------------------------------------------------


def test_what_is_not_said_is_not_true() -> None:
    assert not any(getattr(UNKNOWN, name) for name in NAMES - {"in_file"})
    assert UNKNOWN.in_file == "never"
    assert traits_of(aten.special_hermite_polynomial_h.default) == UNKNOWN
    assert not may_hold("aten.special_hermite_polynomial_h.default")
    assert not is_nonnegative_call(aten.special_hermite_polynomial_h.default, {"x": X, "n": X}, {"x", "n"})


def test_implied_traits() -> None:
    assert Traits(elementwise=True).pointwise
    assert Traits(keeps_order=True) == Traits(keeps_order=True, rearranges=True, picks=True, passes_gates=True, keeps_tokens=True)
    assert not Traits(pointwise=True).elementwise and not Traits(picks=True).rearranges


def test_wrong_traits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))
    monkeypatch.setattr(TABLE, "described", dict(TABLE.described))
    with pytest.raises(OptionError, match=r"'nonegative' is not a trait of operators; nearest names: nonnegative"):
        elementwise(aten.special_entr.default, torch.special.entr, formula="", nonegative=True)
    with pytest.raises(OptionError, match="already has traits"):
        declare(aten.relu.default, gate=True)


def test_another_rule_keeps_what_is_known_but_for_being_the_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))
    before = traits_of(aten.flip.default)
    assert before.linear and before.rearranges

    @rule(aten.flip.default, override=True)
    def flip(call: Any, a: Tensor, dims: Any) -> Affine:
        return Affine({}, call.value)

    after = traits_of(aten.flip.default)
    assert after.rearranges and after.locality is before.locality and not after.linear


# One line ---------------------------------------------------------------------------------------------------------------


class Sinc(nn.Module):
    """An elementwise operator that frpc does not know, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(1.5 + torch.special.bessel_j0(self.inner(x)))


def over(a: Tensor) -> Tensor:
    """``(J0(a) - 1) / a``."""
    near = a.abs() < 1e-4
    return torch.where(near, -0.25 * a, (torch.special.bessel_j0(a) - 1.0) / torch.where(near, 1.0, a))


def test_a_new_elementwise_operator_takes_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Values, gradients, increments, LRP, signs, fields, files: all from the line with its rule."""
    op = aten.special_bessel_j0.default
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))
    monkeypatch.setattr(TABLE, "described", {k: v for k, v in TABLE.described.items() if k is not op})
    torch.manual_seed(0)
    net, x = Sinc().double(), torch.randn(2, 2, 9, 9, dtype=torch.float64)
    seed = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    with pytest.raises(frpc.UnsupportedOpError, match="special_bessel_j0"):
        frpc.compile(net, (x,))
    assert not may_hold(str(op))

    elementwise(op, over, 1.0, formula="(J0(a) - 1) / a, c = 1", in_file="programs")

    explainer = frpc.compile(net, (x,))
    found = explainer(x, seed=seed)
    with torch.no_grad():
        z = net.inner(x)
        inner = x * torch.autograd.functional.vjp(lambda u: net.outer(over(z) * net.inner(u)), x, seed)[1]
        total = (net(x) * seed).flatten(1).sum(1)
    share = (total - inner.flatten(1).sum(1)) / x[0].numel()
    assert torch.allclose(found.relevance, inner + share[:, None, None, None], rtol=1e-10, atol=1e-12)

    fields = receptive_fields(explainer.compiled(x).assignment)
    (node,) = [n for n in fields if n.target is op]
    axes = fields[node].axes
    assert axes is not None
    assert axes[0][0].tolist() == list(range(7)) and axes[0][1].tolist() == list(range(3, 10))
    assert not is_nonnegative_call(op, {"self": X}, {"self"})

    gradient = frpc.compile(net, (x,), rule=frpc.rules.Gradient(times_input=False))(x, seed=seed).relevance
    assert torch.allclose(gradient, torch.autograd.functional.vjp(net, x, seed)[1], rtol=1e-9, atol=1e-12)
    increments = frpc.compile(net, (x,), rule=frpc.rules.LID())(x, seed=seed).relevance
    change = ((net(x) - net(torch.zeros_like(x))) * seed).flatten(1).sum(1)
    assert torch.allclose(increments.flatten(1).sum(1), change, rtol=1e-9)

    loaded = frpc.load(explainer.save(tmp_path / "net.frpc"))
    assert torch.equal(loaded(x, seed=seed).relevance, found.relevance)


def test_no_file_holds_an_operator_that_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))
    monkeypatch.setattr(TABLE, "described", {k: v for k, v in TABLE.described.items() if k is not aten.special_bessel_j0.default})
    elementwise(aten.special_bessel_j0.default, over, 1.0, formula="", nonnegative=if_all("self"))
    assert "aten.special_bessel_j0.default" not in operators()
    assert operators("layout") < operators("constants") < operators()
