"""The explainer as a user holds it: targets, batches, inputs, bias policies, inner layers, printing, threads, modes."""

from __future__ import annotations

import copy
import operator
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import frpc
from frpc.errors import CompileError, SourceError, TrainingModeError
from frpc.optimize import passes as optimize


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(found: Tensor, expected: Tensor, bound: float = 1e-12) -> bool:
    """Relative L1; where nothing is expected nothing may be found."""
    return found.shape == expected.shape and bool((found - expected).abs().sum() <= bound * expected.abs().sum())


def conserves(relevance: Tensor, explained: Tensor, bound: float = 1e-12) -> bool:
    """`|sum V - y| <= bound sum|V|` for every map of a stack; explained has the stack's leading shape."""
    flat = relevance.flatten(explained.dim())
    return bool(((flat.sum(-1) - explained).abs() <= bound * flat.abs().sum(-1)).all())


class Net(nn.Module):
    """A residual net with batch norm, pooling and dropout, for `[B, 3, 12, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.head(self.drop(x).flatten(1))


def settled(model: nn.Module) -> nn.Module:
    """In float64, with parameters and batch statistics drawn anew, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 2.0, generator=generator) if "var" in name else value.normal_(generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, max(0.3, parameter[0].numel() ** -0.5), generator=generator)
    return model.double().eval()


@cache
def net() -> nn.Module:
    return settled(Net())


@cache
def explainer(bias: str = "uniform") -> frpc.Explainer:
    return frpc.compile(net(), (images(1),), bias=bias)


def images(batch: int, seed: int = 0) -> Tensor:
    return randn(batch, 3, 12, 10, seed=seed)


class Maps(nn.Module):
    """An output of several dimensions, `[B, 2, 4, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


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
    with pytest.raises(SourceError, match="No carried path leads from the sources"):
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


# Looking ----------------------------------------------------------------------------------------------------------------


def test_code_is_python_that_runs() -> None:
    x, seed = images(2), randn(2, 5, seed=1)
    code, program = explainer().code, explainer().program
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    for ran, expected in zip(namespace["forward"](program, x, seed), program(x, seed), strict=True):
        assert torch.equal(ran, expected)
    assert "# ---- values: the model's forward pass" in code
    assert "# ---- relevance, from the output back" in code
    assert "f64[B, 4, 6, 5] | block.0 test_explainer.py:" in code
    assert "| rule convolution" in code
    assert "/" not in "".join(line.partition("#")[2] for line in code.splitlines())  # no folders of this machine


def test_table_names_rules_and_lines() -> None:
    lines = explainer().table().splitlines()
    assert lines[0].split() == ["node", "operator", "rule", "maps", "module", "line", "result"]
    (relu,) = [line for line in lines if line.startswith("relu_1 ")]
    assert relu.split()[1:4] == ["relu", "relu", "ReLUGate"]
    assert "test_explainer.py:" in relu
    assert any("stem.0" in line and "Conv" in line for line in lines)


def test_plan_counts_the_work() -> None:
    plan = explainer().plan
    text = str(plan)
    assert "relevance of the input for one" in text
    assert [s.strategy for s in plan.segments] == ["forward", "transposed"]
    forward = 2 * (12 * 10 * 4 * 3 * 9 + 6 * 5 * 4 * 4 * 9 + 5 * 120)
    assert forward <= plan.segments[0].cost.flops <= 1.5 * forward
    assert plan.flops == sum(s.cost.flops for s in plan.segments)


def test_every_stage_prints_and_graphs_run() -> None:
    x, seed = images(2), randn(2, 5, seed=1)
    program = explainer().program(x, seed)
    names = []
    for stage in explainer().stages:
        names.append(stage.name)
        assert stage.seconds >= 0
        assert str(stage.program)
        if not isinstance(stage.program, fx.GraphModule):
            continue
        answers = stage.program.graph.find_nodes(op="placeholder")
        if len(answers) == 1:
            assert agrees(stage.program(x), program[0])
        else:
            for ran, expected in zip(stage.program(x, seed), program, strict=True):
                assert agrees(ran, expected)
    expected = ["capture", "canonicalize", "fold batch norm", "assign", "plan", "emit", "optimize", "lower"]
    assert names == expected
    by_name = {s.name: s for s in explainer().stages}
    assert by_name["fold batch norm"].passes == ("fold_batch_norm",)
    assert "unify_convolutions" in by_name["canonicalize"].passes


def test_refusals_say_what_was_not_done() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 3, stride=2), nn.Flatten()))
    refusals = {r.what: r for r in frpc.compile(model, (images(1),)).refusals}
    copies = "stride-1 transposed convolution as a convolution"
    assert refusals.keys() == {"weights in oneDNN's own order", copies, "channels-last"}
    flip = refusals[copies]
    assert str(flip).startswith("stride-1 transposed convolution as a convolution not used at ")
    assert flip.why.startswith("oneDNN has no kernels for float64")
    single = frpc.compile(model.float(), (images(1).float(),))
    assert "stride [2, 2]" in {r.why for r in single.refusals if r.what == copies}


def test_repr() -> None:
    text = repr(explainer())
    assert text.startswith("Explainer(Net: f64[B, 3, 12, 10] -> f64[B, 5])\n  rules FRP, bias uniform, ")
    assert "nodes carry relevance" in text
    assert repr(frpc.compile(net())) == "Explainer(Net, FRP, not compiled yet: call it, or give compile() example inputs)"


def test_examine_names_rules_without_compiling() -> None:
    coverage = frpc.examine(net(), images(1))
    assert coverage.ok
    assert str(coverage).startswith("Net: ")
    assert all(row.rule and not row.fix for row in coverage.rows)
    (head,) = [row for row in coverage.rows if row.module == "head"]
    assert (head.op, head.rule, head.shape) == ("aten.linear.default", "linear", "f64[B, 5]")


def test_examine_shows_gaps() -> None:
    class Gap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x.relu())

    coverage = frpc.examine(Gap(), (randn(2, 4),))
    assert not coverage.ok
    assert "1 of 2 carrying nodes have a rule" in str(coverage)
    (row,) = [r for r in coverage.rows if not r.rule]
    assert row.source == "return torch.special.bessel_j0(x.relu())"
    assert "@frpc.rule(torch.ops.aten.special_bessel_j0.default)" in row.fix
    assert "MISSING" in str(coverage)


def test_check_reports_every_layer() -> None:
    report = frpc.check(explainer(), images(2), target=1)
    assert report.error <= 1e-12
    assert {"stem.0", "block.0", "head"} <= {row.layer for row in report.rows}
    assert max(row.error for row in report.rows) <= 1e-12
    bias = explainer()(images(2), target=1)
    assert abs(report.constants - float(bias.bias.sum() / bias.output[:, 1].sum())) <= 1e-10
    assert str(report).startswith("conservation error ")
    assert report.worst in str(report)


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
    """Bit for bit, in a program that is compiled already and in one that all compile at once."""
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
        TrainingModeError, match=r"Linear cannot be copied \(.*\), so it cannot be put into evaluation mode"
    ) as error:
        frpc.compile(model, (torch.ones(1, 2),))
    assert "Take off the module what cannot be copied (locks, files, generators)" in str(error.value)


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

    with pytest.raises(TrainingModeError, match=r"test_explainer\.py:\d+") as error:
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
