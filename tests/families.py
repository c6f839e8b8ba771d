"""Small networks and comparisons shared by the tests of the rule families."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

import frpc
from frpc.assign.assignment import Assignment
from frpc.core.graph import fetch
from frpc.driver import pipeline
from frpc.driver.pipeline import CompileOptions
from frpc.driver.prepare import PreparedModel
from frpc.driver.programs import Programs
from frpc.emit.plan import Plan, Query, make_plan
from frpc.emit.program import at_reference, reference_constants, run_eagerly
from frpc.emit.propagate import affine_maps, evaluate, pull, push
from frpc.rules import RuleSet
from frpc.rules.table import Affine
from frpc.rules.top import Logit, Top
from twins import Skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L1."""
    assert found.shape == expected.shape
    return float((found - expected).abs().sum() / expected.abs().sum())


def built(make: Callable[[], nn.Sequential], seed: int = 0) -> nn.Sequential:
    """A network in float64 and evaluation mode; batch statistics are no identities, biases no trifles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make().double().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(std=0.3)
                part.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(part.weight, 0.5, 1.5)
            if isinstance(getattr(part, "bias", None), Tensor):
                nn.init.normal_(part.bias, std=0.3)
    return net


def mlp(bias: bool, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 9, bias), activation(), nn.Linear(9, 7, bias), activation(), nn.Linear(7, 4, bias)
    )  # fmt: skip


def pooled(bias: bool, pool: type[nn.Module] = nn.MaxPool2d, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias), activation(), pool(2, 2),
        nn.Conv2d(4, 5, 2, bias=bias), activation(), nn.Flatten(), nn.Linear(5 * 4, 6, bias), activation(), nn.Linear(6, 4, bias),
    )  # fmt: skip


def strided(bias: bool) -> nn.Sequential:
    """Groups, a stride, overlapping pools with padding, a global average."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=2, bias=bias), nn.ReLU(), nn.MaxPool2d(3, 1, 1),
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4, bias),
    )  # fmt: skip


def residual(bias: bool, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=bias), activation(),
        Skip(nn.Conv2d(3, 3, 3, padding=1, bias=bias), activation(), nn.Conv2d(3, 3, 1, bias=bias)), activation(),
        nn.AvgPool2d(2, 2), nn.Flatten(), nn.Linear(3 * 4, 4, bias),
    )  # fmt: skip


def signed(bias: bool) -> nn.Sequential:
    """Every layer reads values of both signs."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=bias), nn.Tanh(), nn.Conv2d(3, 4, 3, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4, bias)
    )


def normed(bias: bool) -> nn.Sequential:
    """Batch norm behind its convolution, where it is merged."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 3, 2, bias=bias), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(3, 3), nn.Flatten(), nn.Linear(3, 4, bias),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[bool], nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "max pool": (pooled, (2, 6, 6)),
    "strided": (strided, (2, 6, 6)),
    "residual": (residual, (2, 6, 6)),
    "signed": (signed, (2, 6, 6)),
    "batch norm": (normed, (2, 6, 6)),
}


@functools.cache
def net(name: str, bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    """A network by name, and two samples for it, of both signs."""
    make, shape = NETS[name]
    return built(lambda: make(bias)), randn(2, *shape, seed=3)


_captured: WeakKeyDictionary[nn.Module, dict[Any, dict[Any, PreparedModel]]] = WeakKeyDictionary()


def compiled(model: nn.Module, inputs: Tensor | Sequence[Tensor], **options: Any) -> frpc.Explainer:
    """`frpc.compile(model, inputs, **options)`, the graph of a model captured once for all rules.

    For models that are told apart by their tensors; captured again where one of them is another or was written to.
    """
    explainer, given = frpc.compile(model, **options), [inputs] if isinstance(inputs, Tensor) else inputs
    with _sharing(model, explainer.programs, given):
        return explainer.compile_for(*given)


def front_of(model: nn.Module, inputs: Sequence[Tensor]) -> PreparedModel:
    """A model's graph, captured once."""
    programs = frpc.compile(model).programs
    with _sharing(model, programs, inputs):
        return programs.prepared(tuple(inputs))


@contextmanager
def _sharing(model: nn.Module, programs: Programs, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Gives programs what was captured of a model before, and keeps what they capture."""
    tensors = tuple((name, id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers()))
    asked = programs.options.output, programs.options.rules.account.gradients, programs.dtype, programs.verifying
    key = tensors, asked, tuple(len(x) for x in inputs)
    prepared_models = _captured.setdefault(model, {}).setdefault(key, {})
    programs.prepared_models.update(prepared_models)
    try:
        yield
    finally:
        prepared_models.update(programs.prepared_models)


@dataclass(frozen=True)
class Prepared:
    """A model with its rules, ready to be run by plain tensor code: what programs are traced from, without the tracing."""

    assignment: Assignment
    plan: Plan
    constants: dict[str, Any]

    def run(self, inputs: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
        """The output, the relevance of what is wanted, and what else the query asks for."""
        with torch.no_grad():
            return run_eagerly(self.assignment, self.plan, self.constants, inputs, seed)

    def maps(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Affine]:
        """The affine form of every node at an input."""
        with torch.no_grad():
            values = evaluate(self.assignment.graph_module.graph, self.constants, inputs)
            references = at_reference(self.assignment, self.constants, inputs, values)
            return affine_maps(self.assignment, values, self.assignment.rules, references=references)


def prepared(model: nn.Module, inputs: Sequence[Tensor], rule: RuleSet, top: Top | None = None, **asked: Any) -> Prepared:
    """Gives a model its rules; the graph of a model is captured once."""
    prepared = front_of(model, inputs)
    query = Query(bias="separate", top=top or Logit(), **asked)
    assignment = pipeline.assign_rules(prepared, CompileOptions(rule), query)
    module = assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    return Prepared(assignment, make_plan(assignment, query), constants | reference_constants(assignment))


def explained(model: nn.Module, x: Tensor, rule: RuleSet, seed: Tensor, top: Top | None = None) -> Tensor:
    """The map of one linear functional of the output, without what rules absorbed."""
    return prepared(model, [x], rule, top).run([x], seed)[1]


def by_sample(twin: Callable[[Tensor, Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
    """A twin's relevance of each sample, put together."""
    return torch.stack([twin(a.flatten(), b.flatten()).reshape(a.shape) for a, b in zip(x, r, strict=True)])


def both_ways(model: nn.Module, inputs: Sequence[Tensor], rule: RuleSet) -> float:
    """`|<push(u), v> - <u, pull(v)>|` over the whole net and the most over its maps, against the size of the sums."""
    ready = prepared(model, inputs, rule)
    assignment, maps = ready.assignment, ready.maps(inputs)
    result = assignment.graph_module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    columns = {n: randn(3, *x.shape, seed=k) for k, (n, x) in enumerate(zip(assignment.sources, inputs, strict=True))}
    pushed = push(assignment, maps, columns, result)
    assert pushed is not None
    seeds = randn(1, *pushed.shape[1:], seed=11)
    pulled = pull(assignment, maps, {result: seeds}, assignment.sources).multiplier
    forward = (pushed * seeds).flatten(1).sum(1)
    backward = sum((u * pulled[n]).flatten(1).sum(1) for n, u in columns.items())
    worst = float(((forward - backward).abs() / (pushed * seeds).abs().flatten(1).sum(1)).max())
    for affine in maps.values():
        for m in affine.terms.values():
            u, v = (randn(*(int(n) for n in shape), seed=k) for k, shape in enumerate((m.operand, m.result)))
            along = m.push(u) * v
            worst = max(worst, float((along.sum() - (u * m.pull(v)).sum()).abs() / along.abs().sum().clamp(min=1e-300)))
    return worst


def check_complete(
    module: nn.Module, inputs: Sequence[Tensor], references: Sequence[Tensor], rule: RuleSet, bound: float
) -> float:
    """`sum R = <seed, f(x) - f(x_ref)>`; returns the largest part that is missing, which the program reports alike."""
    with torch.no_grad():
        change = module(*inputs) - module(*(r.expand_as(x) for r, x in zip(references, inputs, strict=True)))
    seed = randn(*change.shape, seed=7).to(change.dtype)
    ready = prepared(module, inputs, rule)
    ready.constants.update({f"reference_{k}": r for k, r in enumerate(references)})
    _, *maps, reported = ready.run(inputs, seed)
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    missing = (seed * change).flatten(1).sum(1) - flat.sum(1)
    size = flat.abs().sum(1) + 1e-300
    assert bool(((missing - reported).abs() <= bound * (size + missing.abs())).all()), "what is missing is not what is reported"
    return float((missing.abs() / size).max())


def size(attributions: tuple[Tensor, ...]) -> Tensor:
    """Never 0: a ReLU that is off at both ends leaves nothing to share."""
    return sum(a.abs().flatten(1).sum(1) for a in attributions).clamp_min(1e-3)  # type: ignore[union-attr]
