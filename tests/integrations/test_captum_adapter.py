"""`frpc.captum`: Captum's conventions, sums that can be checked, and programs written for Captum with one line changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from families import built, error, mlp, randn, size
from frpc import rules
from frpc.errors import CompileError, InputError, OptionError, ShapeError, TargetError
from frpc.integrations.captum import (
    FRP,
    LID,
    LRP,
    DeepLift,
    InputXGradient,
    IntegratedGradients,
    Saliency,
)


class Pair(nn.Module):
    """Two explained inputs, a tensor and a number that are not: functional and reused ReLUs, a product, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, shift: Tensor | None = None, power: float = 1.0) -> Tensor:
        h = F.relu(self.first(x)) * torch.sigmoid(self.second(y))
        h = h + F.relu(h - 0.1)
        return self.last(h if shift is None else h + power * shift)


class Field(nn.Module):
    """An output of two dimensions, ``[B, 3, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


def pair() -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    return built(lambda: nn.Sequential(Pair()))[0], (randn(4, 4, seed=1), randn(4, 3, seed=2)), randn(4, 5, seed=3)


def total(attributions: tuple[Tensor, ...]) -> Tensor:
    return sum(a.flatten(1).sum(1) for a in attributions)  # type: ignore[return-value]


# What is explained ------------------------------------------------------------------------------------------------------------


def test_without_baselines_the_whole_output_is_shared():
    model, inputs, shift = pair()
    found, delta = FRP(model).attribute(inputs, target=2, additional_forward_args=(shift, 0.5), return_convergence_delta=True)
    assert isinstance(found, tuple) and [f.shape for f in found] == [x.shape for x in inputs]
    expected = model(*inputs, shift, 0.5)[:, 2].detach()
    assert float(((total(found) - expected).abs() / size(found)).max()) <= 1e-12
    assert torch.allclose(delta, total(found) - expected, atol=1e-14) and delta.shape == (4,)


@pytest.mark.parametrize(("method", "kind"), [(FRP, "number"), (FRP, "mixed"), (LID, "one"), (DeepLift, "each")])
def test_with_baselines_the_change_is_shared(method, kind):
    """``sum R = f(x) - f(baseline)`` with another baseline for each sample, and all else as it is."""
    model, inputs, shift = pair()
    each = (randn(4, 4, seed=5), randn(4, 3, seed=6))
    baselines = {
        "number": 0.3, "one": (each[0][:1], each[1][:1]), "each": each, "mixed": (each[0], 1),
    }[kind]  # fmt: skip
    there = {
        "number": tuple(torch.full_like(x, 0.3) for x in inputs), "one": tuple(b[:1].expand(4, -1) for b in each),
        "each": each, "mixed": (each[0], torch.ones_like(inputs[1])),
    }[kind]  # fmt: skip
    found, delta = method(model).attribute(inputs, baselines, [0, 2, 1, 1], (shift, 2.0), return_convergence_delta=True)
    change = (model(*inputs, shift, 2.0) - model(*there, shift, 2.0)).detach()[range(4), [0, 2, 1, 1]]
    assert float(((total(found) - change).abs() / size(found)).max()) <= 1e-12
    assert float((delta.abs() / size(found)).max()) <= 1e-12


def test_a_baseline_of_each_sample_equals_samples_explained_one_by_one():
    model, (x, y), _ = pair()
    there = randn(4, 4, seed=5)
    method = LID(model)
    together = method.attribute((x, y), (there, 0.0), target=1)
    for row in range(4):
        one = slice(row, row + 1)
        alone = method.attribute((x[one], y[one]), (there[one], 0.0), target=1)
        assert all(error(a[one], b) <= 1e-12 for a, b in zip(together, alone, strict=True))


def test_the_same_as_the_engine_with_that_reference():
    model = built(lambda: mlp(True))
    x, there = randn(3, 6, seed=3), randn(1, 6, seed=4)
    method = FRP(model)
    for found, rule in ((method.attribute(x, there, 1), rules.LID(there)), (method.attribute(x, target=1), rules.FRP())):
        assert error(found, frpc.compile(model, rule=rule)(x, target=1).relevance) <= 1e-12


def test_zero_is_a_baseline_and_none_is_not():
    """With biases f(0) is not 0: what stands at zero belongs to the whole output alone."""
    model, x = built(lambda: mlp(True)), randn(2, 6, seed=3)
    method = FRP(model)
    whole, change = (method.attribute(x, baseline, 1).sum(1) for baseline in (None, 0))
    at_zero = model(torch.zeros(1, 6, dtype=x.dtype))[:, 1]
    assert float(at_zero.detach().abs()) > 1e-2
    assert torch.allclose(whole - change, at_zero.expand(2), atol=1e-12)


def test_integrated_gradients_converge_to_the_change():
    model, inputs, shift = pair()
    method = IntegratedGradients(model)
    errors = []
    for steps in (5, 100):
        found, delta = method.attribute(inputs, 0.2, 1, (shift,), n_steps=steps, return_convergence_delta=True)
        errors.append(float((delta.abs() / size(found)).max()))
    assert errors[1] < 2e-3 < errors[0]


# Targets ----------------------------------------------------------------------------------------------------------------------


def test_targets_of_classes():
    model, inputs, _ = pair()
    method, output = FRP(model), model(*inputs)
    for one in (2, (2,), torch.tensor(2), torch.tensor([2])):
        assert torch.allclose(total(method.attribute(inputs, target=one)), output[:, 2], atol=1e-12)
    each = [2, 0, 1, 2]
    for target in (each, torch.tensor(each), [(c,) for c in each]):
        assert torch.allclose(total(method.attribute(inputs, target=target)), output[range(4), each], atol=1e-12)


def test_targets_of_fields():
    model, x = built(lambda: nn.Sequential(Field())), randn(3, 2, 5, seed=1)
    method, output = FRP(model), model(x)
    assert torch.allclose(method.attribute(x, target=(1, 4)).flatten(1).sum(1), output[:, 1, 4], atol=1e-12)
    found = method.attribute(x, target=[(0, 0), (2, 3), (0, 0)])
    assert torch.allclose(found.flatten(1).sum(1), torch.stack([output[0, 0, 0], output[1, 2, 3], output[2, 0, 0]]), atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_output_needs_no_target(shape):
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)).reshape(-1, *shape)

    model, x = built(lambda: nn.Sequential(One())), randn(3, 6, seed=1)
    found, delta = FRP(model).attribute(x, return_convergence_delta=True)
    assert torch.allclose(found.sum(1), model(x).flatten(), atol=1e-12) and float(delta.abs().max()) <= 1e-12


# Batches, types, weights ------------------------------------------------------------------------------------------------------


def test_small_batches_give_the_same():
    model, inputs, shift = pair()
    method = FRP(model)
    for target in ([0, 2, 1, 1], [(0,), (2,), (1,), (1,)]):
        whole = method.attribute(inputs, 0.1, target, (shift,), return_convergence_delta=True)
        parts = method.attribute(inputs, 0.1, target, (shift,), internal_batch_size=3, return_convergence_delta=True)
        assert all(error(a, b) <= 1e-12 for a, b in zip(whole[0], parts[0], strict=True)) and parts[1].shape == (4,)


def test_a_tensor_in_is_a_tensor_out_of_the_same_type():
    model, x = built(lambda: mlp(True)), randn(2, 6, seed=3)
    assert isinstance(FRP(model).attribute(x, target=0), Tensor)
    assert isinstance(FRP(model).attribute((x,), target=0), tuple)
    assert FRP(model.float()).attribute(x.float(), 0, 0).dtype == torch.float32
    assert not FRP(model).attribute(x.float().requires_grad_(), target=0).requires_grad


def test_fixed_arguments_are_told_apart_by_type_and_value():
    model, inputs, shift = pair()
    method = FRP(model)
    for power in (1, 1.0, 2.5, 1):
        found = method.attribute(inputs, target=0, additional_forward_args=(shift, power))
        assert torch.allclose(total(found), model(*inputs, shift, power)[:, 0], atol=1e-12)
    assert len(method._explainers) == 3


class Edges(nn.Module):
    """Nodes and the edges between them: every sample has the same graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor | None = None) -> Tensor:
        sent = self.inside(x)[:, edges[0]]
        return self.out((sent if weights is None else sent * weights[:, None]).tanh().mean(1))


@pytest.mark.parametrize("count", [1, 3, 2], ids=["one sample", "other rows than samples", "as many rows as samples"])
def test_arguments_without_samples_are_part_of_the_program(count):
    """Edges ``[2, 8]``, also of two samples; other edges in the next call are other edges."""
    model, x = built(lambda: nn.Sequential(Edges()))[0], randn(count, 5, 6, seed=4)
    gradient, whole = InputXGradient(model), FRP(model)
    for seed in (0, 1):
        edges = torch.randint(0, 5, (2, 8), generator=torch.Generator().manual_seed(seed))
        further = (edges, randn(8, seed=seed))
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf, *further)[:, 1].sum(), leaf)
        assert error(gradient.attribute(x, target=1, additional_forward_args=further), x * slope) <= 1e-12
        found = whole.attribute(x, target=1, additional_forward_args=further)
        assert float((total((found,)) - model(x, *further)[:, 1].detach()).abs().max()) <= 1e-12


def test_weights_are_those_of_the_call():
    """Trained on, the next map is of the model as it is; its mode stays."""
    model, x = built(lambda: mlp(True)).train(), randn(2, 6, seed=3)
    method = FRP(model)
    for change in (lambda: None, lambda: model[0].weight.mul_(2.0), lambda: model[0].bias.fill_(0.5)):
        with torch.no_grad():
            change()
        assert torch.allclose(method.attribute(x, target=1).sum(1), model(x)[:, 1], atol=1e-12)
    assert model.training


class Switched(nn.Module):
    """What it computes depends on an attribute that is no tensor, and on a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.column, self.factors = nn.Linear(6, 3), 0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)[:, self.column] * self.factors[0]


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in (InputXGradient, LID)]


@pytest.mark.parametrize("method", [FRP, IntegratedGradients, *SLOW])
def test_what_is_explained_is_the_function_as_it_is(method):
    """Variables, attributes and lists are no weights: nothing tells that they have changed but the function's value."""
    net, x = built(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))), randn(2, 6, seed=1)
    column = 0
    asked = method(lambda z: net(z)[:, column])
    asked.attribute(x)
    column = 2
    assert error(asked.attribute(x), method(lambda z: net(z)[:, 2]).attribute(x)) <= 1e-12

    switched = built(lambda: nn.Sequential(Switched()))[0]
    asked = method(switched)
    before = asked.attribute(x)
    switched.column = 1
    assert error(asked.attribute(x), method(switched).attribute(x)) <= 1e-12
    switched.factors[0] = -2.0
    assert error(asked.attribute(x), method(switched).attribute(x)) <= 1e-12
    switched.column, switched.factors[0] = 0, 1.0
    assert error(asked.attribute(x), before) <= 1e-12


def test_a_function_that_gives_something_else_each_time_is_refused():
    calls = iter(range(100))
    with pytest.raises(CompileError, match="output changes from call to call"):
        FRP(lambda z: z.sum(1) * (1 + next(calls))).attribute(randn(2, 6, seed=1))


def test_a_model_in_training_is_explained_in_evaluation_mode_and_left_as_it_is():
    net, x = built(lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3))), randn(2, 6, seed=1)
    expected = FRP(net).attribute(x, target=1)
    net.train()
    method = FRP(net)
    assert all(error(method.attribute(x, target=1), expected) <= 1e-12 for _ in range(2))
    assert all(part.training for part in net.modules())


def test_functions_and_bound_methods():
    model, x = built(lambda: mlp(True)), randn(2, 6, seed=3)

    def scaled(x: Tensor, by: float) -> Tensor:
        return by * model(x)

    method = FRP(scaled)
    for _ in range(2):
        found = method.attribute(x, target=1, additional_forward_args=3.0)
        assert torch.allclose(found.sum(1), 3 * model(x)[:, 1], atol=1e-12)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
    assert torch.allclose(FRP(model.forward).attribute(x, target=1).sum(1), model(x)[:, 1], atol=1e-12)


# Methods against autograd -----------------------------------------------------------------------------------------------------


def test_gradients_are_autograds():
    model, inputs, _ = pair()
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)
    for found, x, g in zip(InputXGradient(model).attribute(inputs, 1), inputs, gradients, strict=True):
        assert error(found, x * g) <= 1e-12
    for signed in (True, False):
        found = Saliency(model).attribute(inputs, 1, abs=not signed)
        assert all(error(f, g if signed else g.abs()) <= 1e-12 for f, g in zip(found, gradients, strict=True))


def test_lrp_takes_a_rule_set_and_reports_captums_delta():
    model, x = built(lambda: mlp(True)), randn(2, 6, seed=3)
    found, delta = LRP(model, rule=rules.ZPlus()).attribute(x, 1, return_convergence_delta=True)
    assert torch.allclose(delta, model(x)[:, 1] - found.sum(1), atol=1e-12)
    assert error(found, frpc.compile(model, x, rule=rules.ZPlus(), bias="separate")(x, target=1).relevance) <= 1e-12
    model[0].rule = object()
    with pytest.raises(OptionError, match=r"0 carries a rule of Captum's in \.rule"):
        LRP(model)


# What does not fit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"inputs": torch.tensor([[1, 2]])}, InputError, r"inputs\[0\] is torch.int64 \[1, 2\]; give floating-point tensors"),
        ({"baselines": (0, 0, 0)}, ShapeError, "3 baselines given for 2 inputs"),
        ({"baselines": (torch.zeros(3, 4), 0)}, ShapeError, r"baselines\[0\] has shape \[3, 4\]; inputs\[0\] is \[4, 4\]"),
        ({"target": [0, 1]}, TargetError, "target lists 2 indices for 4 samples"),
        ({"target": [0, 1, (1,), 2]}, TargetError, "give a list with an int or a tuple of ints for each sample"),
        ({"target": torch.zeros(4, 2, dtype=torch.long)}, TargetError, r"target has shape \[4, 2\]; give one index"),
        ({"target": 3}, TargetError, "Target 3 is out of range"),
        ({"target": None}, TargetError, "Give target="),
        ({"additional_forward_args": (None, object())}, InputError, r"additional_forward_args\[1\] is object"),
        ({"additional_forward_args": ([torch.zeros(4, 5)],)}, InputError, r"additional_forward_args\[0\] holds Tensor"),
        ({"internal_batch_size": 0}, OptionError, "internal_batch_size=0: give at least 1"),
    ],
)  # fmt: skip
def test_errors(arguments, kind, message):
    model, inputs, _ = pair()
    with pytest.raises(kind, match=message):
        FRP(model).attribute(**({"inputs": inputs, "target": 0} | arguments))
