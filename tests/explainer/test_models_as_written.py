"""Models in all styles of writing and modes: the same maps, in every mode of autograd and thread, and the model left alone."""

from __future__ import annotations

import copy
import operator
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from explained_nets import Net, agrees, conserves, explainer, images, net, randn, settled
from frpc.errors import CompileError, TrainingModeError
from frpc.optimize import passes as optimize

# What the explainer is made of ------------------------------------------------------------------------------------------


def test_the_program_holds_only_aten_operators() -> None:
    arithmetic = {operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv}
    for node in explainer("receptive_field").program.graph.nodes:
        assert node.op not in ("call_module", "call_method")
        if node.op == "call_function" and node.target not in arithmetic:
            assert isinstance(node.target, torch._ops.OpOverload)
            assert node.target.namespace == "aten"


def test_runs_in_every_gradient_mode_and_without_autograd() -> None:
    x = images(2)
    expected = explainer()(x, target=1)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = explainer()(x, target=1)
            assert torch.equal(out.relevance, expected.relevance)
            assert not out.output.requires_grad
            assert not out.relevance.requires_grad
    with torch.inference_mode():
        compiled = frpc.compile(net(), (x,))
        assert agrees(compiled(x.clone(), target=torch.tensor([[1], [1]])).relevance[:, 0], expected.relevance)
    assert torch.equal(compiled(x, target=1).relevance, expected.relevance)


def test_an_input_that_requires_gradients_is_fine() -> None:
    x = images(1).requires_grad_()
    out = frpc.compile(net(), (x,))(x, target=1)
    assert not out.relevance.requires_grad
    assert x.grad is None
    assert torch.equal(out.relevance, explainer()(x.detach(), target=1).relevance)


def test_the_model_is_left_as_it_was() -> None:
    model = Net().double()
    model.stem.eval()
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    hooks = {
        name: len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
        for name, part in model.named_modules()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    compiled = frpc.compile(model, (images(2),))
    compiled(images(2), target=0)
    compiled.at("block", images(2), target=0)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {
        n: len(p._forward_hooks) + len(p._forward_pre_hooks) + len(p._backward_hooks) for n, p in model.named_modules()
    } == hooks
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(list(compiled.parameters())) == 0


def test_later_changes_of_the_model_do_not_reach_the_explainer() -> None:
    model = settled(nn.Linear(4, 2))
    x = randn(2, 4)
    compiled, expected = frpc.compile(model, (x,)), model(x).detach()
    with torch.no_grad():
        model.weight.zero_()
    assert agrees(compiled(x, target=0).output, expected)


def test_a_model_in_training_mode_is_compiled_as_in_evaluation() -> None:
    model, x = copy.deepcopy(net()).train(), images(2)
    out = frpc.compile(model, (x,))(x, target=1)
    assert model.training
    assert torch.equal(out.relevance, explainer()(x, target=1).relevance)


def test_eight_threads_get_the_same_results() -> None:
    """Bit for bit, in a program that is already compiled and in one that all compile at once."""
    batches = [images(1 + i % 3, seed=i) for i in range(16)]
    expected = [explainer()(x, target=i % 5) for i, x in enumerate(batches)]
    lazy, start = frpc.compile(net()), threading.Barrier(8)

    def work(i: int) -> tuple[frpc.Explanation, frpc.Explanation]:
        if i < 8:
            start.wait()
        return explainer()(batches[i], target=i % 5), lazy(batches[i], target=i % 5)

    with ThreadPoolExecutor(8) as pool:
        for (ready, late), one in zip(pool.map(work, range(16)), expected, strict=True):
            assert torch.equal(ready.output, one.output)
            assert torch.equal(ready.relevance, one.relevance)
            assert torch.equal(late.relevance, one.relevance)
    assert len(lazy.programs.compiled) == 1


def test_without_inputs_one_program_for_each_signature() -> None:
    class Any2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)).mean((2, 3))

    model = settled(Any2d())
    lazy = frpc.compile(model)
    for shape in ((2, 1, 5, 5), (1, 1, 5, 5), (3, 1, 4, 6)):
        x = randn(*shape)
        out = lazy(x, target=1)
        assert agrees(out.output, model(x).detach())
        assert conserves(out.relevance, out.output[:, 1])
    assert len(lazy.programs.compiled) == 2
    ahead = frpc.compile(model, (randn(2, 1, 5, 5),))
    with pytest.raises(frpc.errors.ShapeError):
        ahead(randn(3, 1, 4, 6), target=1)


def test_float32_models() -> None:
    model, x = copy.deepcopy(net()).float(), images(2).float()
    out = frpc.compile(model, (x,))(x, target=3)
    assert out.relevance.dtype == torch.float32
    assert conserves(out.relevance, out.output[:, 3], 1e-6)
    assert agrees(out.relevance.double(), explainer()(x.double(), target=3).relevance, 1e-4)


# Styles of writing ------------------------------------------------------------------------------------------------------


class Modules(nn.Module):
    """Two layers with an activation of their own each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.b(self.first(self.a(x))))


class Functional(Modules):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(F.relu(F.linear(torch.relu(self.a(x)), self.b.weight, self.b.bias)), x)


class Reused(Modules):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(self.b(self.first(self.a(x))))


class InPlace(Modules):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu_()
        y = F.relu(self.b(y), inplace=True)
        y += x
        return y


class Sliced(Modules):
    """Writes to parts of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :3].relu_()
        y[:, 3:] = y[:, 3:].relu()
        y = self.b(y).clamp_(min=0)
        return y.add_(x)


@pytest.mark.parametrize("style", [Functional, Reused, InPlace, Sliced])
def test_styles_of_writing_give_the_same_map(style: type[Modules]) -> None:
    torch.manual_seed(0)
    model, x, seed = Modules().double(), randn(3, 6), randn(3, 6, seed=1)
    twin = style().double()
    twin.load_state_dict(model.state_dict())
    expected, found = (frpc.compile(m, (x,))(x.clone(), seed=seed) for m in (model, twin))
    assert agrees(found.output, expected.output, 1e-14)
    assert agrees(found.relevance, expected.relevance)
    assert agrees(found.bias, expected.bias)


def test_the_input_is_not_written_to() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).relu_()

    x = randn(2, 4)
    kept = x.clone()
    compiled = frpc.compile(Writes(), (x,))
    assert torch.equal(x, kept)
    out = compiled(x, target=0)
    assert torch.equal(x, kept)
    assert conserves(out.relevance, out.output[:, 0])


def test_a_shared_module_counts_each_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu()) + self.layer(x)

    model, x = settled(Twice()), randn(2, 4)
    out = frpc.compile(model, (x,), bias="separate")(x, target=2)
    gradient = torch.autograd.grad(model(tracked := x.clone().requires_grad_())[:, 2].sum(), tracked)[0]
    assert agrees(out.relevance, x * gradient)
    assert agrees(out.relevance.sum(1) + out.bias, out.output[:, 2])


# Training mode ----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(
        TrainingModeError, match=r"Linear cannot be copied \(.*\), so frpc cannot set a copy to evaluation mode"
    ) as error:
        frpc.compile(model, (torch.ones(1, 2),))
    assert "Remove from the module what cannot be copied (locks, files, generators)" in str(error.value)


def test_a_model_that_stays_in_training_mode() -> None:
    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), stubborn=Stubborn()))
    with pytest.raises(TrainingModeError, match="stubborn of Sequential stays in training mode after eval") as error:
        frpc.compile(model, (torch.ones(1, 2),))
    assert "train() is overridden" in str(error.value)


def test_dropout_that_is_always_on_is_named() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.layer(x), 0.5)

    with pytest.raises(TrainingModeError, match=r"test_models_as_written\.py:\d+") as error:
        frpc.compile(nn.Sequential(OrderedDict(noisy=Noisy())), (randn(1, 4).float(),))
    assert "draws random numbers in evaluation mode" in str(error.value)
    assert "return F.dropout(self.layer(x), 0.5)" in str(error.value)
    assert "noisy" in str(error.value)
    assert "Pass training=self.training to functional dropout" in str(error.value)


# ---- the check of a compiled program --------------------------------------------------------------------------------


class Chaos(nn.Module):
    """Rounding grows from layer to layer until it is the output: folding batch norm, which changes it, changes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(16))
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(64.0 * layer(x))
        return x.mean((2, 3))


def test_a_model_that_blows_rounding_up_still_compiles() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 9)
    for dtype in (torch.float32, torch.float64):
        model = Chaos().to(dtype).eval()
        found = frpc.compile(model, (x.to(dtype),))(x.to(dtype), target=0)
        with torch.no_grad():
            plain = model(x.to(dtype))
        assert float((found.output - plain).abs().max()) > 1e4 * torch.finfo(dtype).eps  # or nothing is tried here


def test_a_program_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(graph_module: torch.fx.GraphModule) -> bool:
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.abs.default
        return True

    monkeypatch.setattr("frpc.optimize.passes.PASSES", (*optimize.PASSES, break_it))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(CompileError, match=r"the compiled program's output differs from the model's by .* of its largest value"):
        frpc.compile(model, (torch.randn(4, 5),))
