"""What is compiled is held against the model: outputs, samples, accounts; at compile time, at first calls, or at every call."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import BatchError, CompileError, ConservationError, OptionError
from frpc.maps import Scale
from frpc.optimize import passes as optimize
from frpc.rules.table import Affine, Call

aten = torch.ops.aten


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def too_much(call: Call, a: Tensor) -> Affine:
    """A ReLU's rule, wrong by a fiftieth."""
    return Affine({"self": Scale((a > 0).to(a.dtype) * 1.02, a.shape)})


def without_constant(call: Call, a: Tensor) -> Affine:
    """A sigmoid's rule that forgets ``f(0) = 1/2``."""
    return Affine({"self": Scale((call.value - 0.5) / a, a.shape)})


def nan(call: Call, a: Tensor) -> Affine:
    return Affine({"self": Scale(call.value / a / 0, a.shape)})


def wrong() -> frpc.rules.FRP:
    return frpc.rules.FRP(overrides={aten.relu.default: too_much})


# Rules that are wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_wrong_rule_does_not_compile(dtype: torch.dtype) -> None:
    with pytest.raises(ConservationError) as error:
        frpc.compile(net(), (X,), rule=frpc.rules.FRP(overrides={aten.relu.default: without_half}), dtype=dtype)
    first, second, place, remedy = str(error.value).splitlines()
    assert re.match(r"The map does not add up: it sums to \S+, but the explained number is \S+ \(sample \d\)\.", first)
    assert first.endswith("of sum|V|; this is not a rounding error.")
    assert second.startswith("  The rule 'without_half' of aten.relu.default passes on ")
    assert place.startswith("    1   ")
    assert remedy.endswith("Fix it, or leave it out of overrides=; see docs/adding_a_rule.md.")


def without_half(call: Call, a: Tensor) -> Affine:
    """A ReLU's rule, wrong by half: more than bfloat16 rounds."""
    return Affine({"self": Scale((a > 0).to(a.dtype) * 0.5, a.shape)})


@pytest.mark.parametrize("rule", [without_constant, nan])
def test_other_wrong_rules(rule: Callable[..., Affine]) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3))
    with pytest.raises(ConservationError, match=f"The rule '{rule.__name__}' of aten.sigmoid.default"):
        frpc.compile(model, (X,), rule=frpc.rules.FRP(overrides={aten.sigmoid.default: rule}))


def test_a_wrong_rule_for_one_module_is_named_by_its_place() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(ConservationError, match=r"The rule 'too_much' of aten\.relu\.default .*\n    3   activation\.py"):
        frpc.compile(model, (X,), rule=frpc.rules.FRP(overrides={("3", aten.relu.default): too_much}))


def test_errors_that_cancel_in_the_sum_of_outputs() -> None:
    """Probabilities sum to 1 whatever the rule says; weighted differently, outputs tell."""
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[2].weight[1] = -model[2].weight[0]  # the two outputs sum to 0
    with pytest.raises(ConservationError, match="too_much"):
        frpc.compile(model, (X,), rule=wrong())


def test_lazily_compiled_programs_are_verified_at_their_first_call() -> None:
    explainer = frpc.compile(net(), rule=wrong())
    for _ in range(2):  # and refused again: nothing wrong is let through later
        with pytest.raises(ConservationError, match="The rule 'too_much'"):
            explainer(X, target=0)
    with pytest.raises(ConservationError, match="The rule 'too_much'"):
        explainer(X, target=torch.tensor([[0, 1]] * 4))
    with pytest.raises(ConservationError, match="The rule 'too_much'"):
        explainer.neurons("2", [(0,), (1,)], X)


def test_never_runs_nothing_but_the_program() -> None:
    explainer = frpc.compile(net(), (X,), rule=wrong(), verify="never")
    assert explainer.conservation is None
    out = explainer(X, target=0)
    assert not torch.allclose(out.relevance.sum(1), out.output[:, 0], rtol=1e-3)
    assert out.conservation is None


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(OptionError, match="verify='sometimes' is unknown; choose one of first, always, never"):
        frpc.compile(net(), (X,), verify="sometimes")


# Every call -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["uniform", "separate", "receptive_field"])
def test_conservation_of_every_call(bias: str) -> None:
    explainer = frpc.compile(net(), (X,), bias=bias, verify="always")
    for target in (2, torch.tensor([[0, 1], [2, 1], [1, 1], [0, 2]])):
        out = explainer(X, target=target)
        assert out.conservation is not None
        assert out.conservation.shape == out.bias.shape
        chosen = out.output[:, 2] if isinstance(target, int) else out.output.gather(1, target)
        beside = out.bias.double() if bias == "separate" else torch.zeros_like(out.bias.double())
        lost = (out.relevance.double().sum(-1) + beside - chosen.double()).abs()
        assert torch.allclose(out.conservation, lost / (out.relevance.double().abs().sum(-1) + beside.abs()), atol=1e-12)
        assert float(out.conservation.max()) <= 1e-6
    neurons = explainer.neurons("1", [(0,), (3,)], X)
    assert neurons.conservation is not None
    assert neurons.conservation.shape == (4, 2)


def test_methods_without_constants_have_no_account() -> None:
    explainer = frpc.compile(net(), (X,), rule=frpc.rules.LRP(), verify="always")
    assert explainer(X, target=0).conservation is None


def test_an_account_that_fails_later_is_refused_then() -> None:
    """A rule that is right where the example lies, and wrong elsewhere."""

    def small(call: Call, a: Tensor) -> Affine:
        return Affine({"self": Scale((a > 0).to(a.dtype) * torch.where(a > 9, 0.9, 1.0), a.shape)})

    rules = frpc.rules.FRP(overrides={aten.relu.default: small})
    always, first = (frpc.compile(net(), (X,), rule=rules, verify=v) for v in ("always", "first"))
    assert always(X, target=0).conservation is not None
    with pytest.raises(ConservationError, match="The rule 'small'"):
        always(100 * X, target=0)
    first(100 * X, target=0)  # which looks at first calls only


# Outputs ----------------------------------------------------------------------------------------------------------------


class Fickle(nn.Module):
    def __init__(self, factor: Callable[[], float]) -> None:
        super().__init__()
        self.lin, self.factor = nn.Linear(5, 2), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.factor()


FICKLE = {
    "random": (lambda: 1 + random.random(), "the model's output changes from call to call"),
    "compiling": (lambda: 2.0 if torch.compiler.is_compiling() else 1.0, "does not compute the same as the model itself"),
}


@pytest.mark.parametrize("kind", FICKLE)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
def test_outputs_are_compared_with_the_model_and_not_with_its_capture(kind: str, eager: bool) -> None:
    factor, said = FICKLE[kind]
    ask = (lambda: frpc.compile(Fickle(factor), (X,))) if eager else (lambda: frpc.compile(Fickle(factor))(X, target=0))
    with pytest.raises(CompileError, match=rf"differs from the model's by .* of its largest value .*{said}"):
        ask()


@pytest.mark.parametrize("kind", FICKLE)
def test_predictions_are_compared_too(kind: str) -> None:
    factor, said = FICKLE[kind]
    with pytest.raises(CompileError, match=rf"differs from the model's by .* of its largest value .*{said}"):
        frpc.compile(Fickle(factor)).predict(X)
    assert torch.equal(frpc.compile(net()).predict(X), net()(X))


def test_maps_by_windows_are_held_to_their_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 3))
    x = torch.randn(2, 2, 16, 16)
    right = frpc.compile(model, (x,), verify="always").neurons("2", [(1, 2, 3)], x, strategy="windows")
    assert right.conservation is not None
    assert float(right.conservation.max()) <= 1e-6
    explainer = frpc.compile(model, rule=wrong())
    for strategy in ("windows", "auto", "transposed"):
        with pytest.raises(ConservationError, match=r"Maps by windows of 2 lose|The rule 'too_much'"):
            explainer.neurons("2", [(1, 2, 3)], x, strategy=strategy)


def test_later_programs_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = frpc.compile(net(), (X,))
    explainer(X, target=0)

    def break_it(graph_module: torch.fx.GraphModule) -> bool:
        for node in graph_module.graph.nodes:
            if node.target is aten.relu.default:
                node.target = aten.abs.default
        return True

    monkeypatch.setattr("frpc.optimize.passes.PASSES", (*optimize.PASSES, break_it))
    for ask in (
        lambda: explainer(X, target=torch.tensor([[0, 1]] * 4)),
        lambda: explainer.at("0", X, target=1),
        lambda: explainer.neurons("1", [(0,)], X),
    ):
        with pytest.raises(CompileError, match=r"(output|value of 1) differs from the model's"):
            ask()


def test_the_model_runs_once_for_each_program() -> None:
    counted: list[int] = []
    model = net()
    explainer = frpc.compile(model)
    explainer.programs.model.register_forward_hook(lambda *_: counted.append(0))
    single = X[:1]
    explainer(single, target=0)
    first = len(counted)
    for _ in range(3):
        explainer(single, target=0)
    assert len(counted) == first
    explainer(X, target=0)  # several samples: are they treated apart?
    later = len(counted)
    for _ in range(3):
        explainer(X, target=0)
        explainer(single, target=0)
    assert len(counted) == later


def test_a_model_that_writes_into_its_input_is_left_to_do_so() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).relu_()

    x = X.clone()
    frpc.compile(Writes(), (x,))
    assert torch.equal(x, X)


def test_one_sample_squeezed_away() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x).squeeze()

    model, one = Squeezed().double(), X[:1].double()
    out = frpc.compile(model, (one,))(one)
    assert torch.allclose(out.output.reshape(()), model(one))
    shift = model.lin.bias.detach() / 5
    assert torch.allclose(out.relevance, one * model.lin.weight.detach() + shift)

    class Single(Squeezed):
        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.reshape(5)).squeeze()

    out = frpc.compile(Single().double(), (one,))(one)
    assert torch.allclose(out.relevance.sum(1), out.output)


# Rounding ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deep_random_nets_are_no_defects(dtype: torch.dtype) -> None:
    """Fifty layers that no one trained: what rounding leaves of the account is judged by what rounding does."""
    torch.manual_seed(0)
    layers = [part for _ in range(50) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    x = torch.randn(3, 16)
    explainer = frpc.compile(model, (x,), dtype=dtype, verify="always")
    assert explainer(x, target=1).conservation is not None


# Constants' share -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["uniform", "separate"])
def test_the_constants_share(bias: str) -> None:
    """``|b| / (|b| + sum |w x|)``, of one output."""
    model = nn.Linear(5, 1).double()
    x = X.double()
    local, constant = (x * model.weight.detach()).abs().sum(), 4 * model.bias.detach().abs()
    explainer = frpc.compile(model, (x,), bias=bias)
    assert explainer.constants_share == pytest.approx(float(constant / (constant + local)))
    assert f"constants receive {explainer.constants_share:.0%}" in repr(explainer)


def test_steps_leave_constants_alone() -> None:
    """A sign has no slope: its maps are constants, and the explainer says so."""

    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sign()

    explainer = frpc.compile(Sign(), (X,))
    assert explainer.constants_share == 1
    assert "constants receive 100%" in repr(explainer)


def test_batches_that_mix_only_where_they_are_large() -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.roll(4, 0)

    explainer = frpc.compile(Far())
    with pytest.raises(BatchError, match="One sample's result depends on the other samples"):
        explainer(torch.randn(9, 3), target=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_result_that_has_lost_its_digits_is_no_wrong_rule(dtype: torch.dtype) -> None:
    """PyTorch computes GELU as ``z (1 + erf z) / 2``: of its value at -8 rounding leaves no digit, and no rule is to blame."""
    x = torch.tensor([[-8.0, -7.5], [-6.0, -8.5]], dtype=dtype)
    for example in (x, x[:1]):
        found = frpc.compile(nn.GELU(), (example,))(x, target=0)
        assert torch.equal(found.output, nn.GELU()(x))
        assert bool((found.relevance.abs() < 1e-6).all())
