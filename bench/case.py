"""One net, compiled, with every way to explain a target of it or K of them, behind a check that the maps are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import frpc
from bench.nets import build, is_piecewise_linear

__all__ = [
    "CAPTUM",
    "COMPILED",
    "EXPLAIN",
    "FORWARD",
    "GRADIENT",
    "GRADIENTS",
    "OWN",
    "Case",
    "Way",
    "compiled_gradient",
    "fresh_compiler",
    "gate",
    "own_forward",
    "prepare",
    "prepare_model",
    "with_targets",
]

Way = Callable[[], object]

FORWARD, OWN, EXPLAIN = "forward", "frpc forward", "frpc"
GRADIENT, GRADIENTS = "x * gradient", "x * gradient, batched"
COMPILED, CAPTUM = "torch.compile x * gradient", "Captum InputXGradient"
OUTPUT_BOUND, CONSERVATION_BOUND = 1e-4, 1e-6  # float32: relative to the largest output, and to sum|V|
# Rounding puts the inputs of a few ReLUs on the other side of 0 than in the eager model, each with all the relevance behind it:
# 5e-3 of a map of VGG-16 at 224 pixels, against float64 too, where at 64 pixels frpc and autograd have 2e-6 but for one input in
# six. A map in the wrong places is off by about 1, and what is lost on the way shows in the sum.
MAP_BOUND = 5e-2


@dataclass(frozen=True)
class Case:
    """A net, compiled, and what is asked of it.

    Attributes:
        target: ``[B]``, or ``[B, K]`` for K targets of each sample.
        own: the model's output alone as frpc computes it, or None where it cannot be taken from the program.
    """

    name: str
    model: nn.Module
    x: Tensor
    target: Tensor
    explainer: frpc.Explainer
    own: Way | None
    compile_seconds: float

    @property
    def columns(self) -> Tensor:
        """The targets as ``[B, K]``, K = 1 for one."""
        return self.target.view(len(self.x), -1)

    def ways(self, peers: bool = False) -> dict[str, Way]:
        """The ways by name; ``peers`` adds those that need another library, or a compiler."""
        found: dict[str, Way] = {FORWARD: self.forward}
        found |= {} if self.own is None else {OWN: self.own}
        found |= {EXPLAIN: self.explain, GRADIENT: self.gradient}
        if self.target.dim() == 2:
            found[GRADIENTS] = self.gradients
        elif peers:
            found |= {COMPILED: compiled_gradient(self.model, self.x, self.target), **captum_way(self)}
        return found

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.x)

    def explain(self) -> frpc.Explanation:
        with torch.inference_mode():
            return self.explainer(self.x, target=self.target)

    def gradient(self) -> Tensor:
        """Input times gradient, one backward pass a target: like the input, ``[B, K, ...]`` for K targets."""
        x = self.x.detach().requires_grad_()
        if self.target.dim() == 1:
            (gradient,) = torch.autograd.grad(self.model(x).gather(1, self.target[:, None]).sum(), x)
            return gradient * self.x
        explained = self.model(x).gather(1, self.target).sum(0)  # [K]
        last = len(explained) - 1
        maps = [torch.autograd.grad(y, x, retain_graph=k < last)[0] * self.x for k, y in enumerate(explained)]
        return torch.stack(maps, 1)

    def gradients(self) -> Tensor:
        """The same, all K targets in one batched backward pass."""
        x = self.x.detach().requires_grad_()
        explained = self.model(x).gather(1, self.target).sum(0)  # [K]
        (found,) = torch.autograd.grad(explained, x, torch.eye(len(explained), device=x.device), is_grads_batched=True)
        return found.movedim(0, 1) * self.x[:, None]


def prepare(name: str, batch: int, device: str = "cpu", side: int | None = None) -> Case:
    """Builds a net with random weights and compiles it; what is timed does not depend on the weights' values."""
    model, x = build(name, side, batch)
    return prepare_model(name, model, x, device)


def prepare_model(name: str, model: nn.Module, x: Tensor, device: str) -> Case:
    """Compiles a model no parameter of which wants a gradient: peers then compute the input's and no others."""
    model, x = model.to(device), x.to(device)
    start = time.perf_counter()
    explainer = frpc.compile(model, (x,))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        target = model(x).argmax(1)
    return Case(name, model, x, target, explainer, own_forward(explainer, x), seconds)


def with_targets(case: Case, count: int) -> Case:
    """The same net, asked about the ``count`` largest outputs of each sample; one target is ``[B]``."""
    with torch.no_grad():
        target = case.model(case.x).topk(count).indices
    return replace(case, target=target[:, 0].clone() if count == 1 else target)


def own_forward(explainer: frpc.Explainer, x: Tensor) -> Way | None:
    """The model's values alone, lowered like the whole program: what explaining adds to them is then the rest.

    None with revisions of frpc whose programs are no plain functions.
    """
    portable = explainer.compiled(x).portable
    graph = fx.Graph()
    results: Any = graph.graph_copy(portable.graph, {})
    graph.output((results[0],))  # the output comes before the relevance
    graph.eliminate_dead_code()
    program = _runnable(fx.GraphModule(portable, graph), explainer)
    if program is None:
        return None
    unused = [x] * (len(graph.find_nodes(op="placeholder")) - 1)

    def call() -> object:
        with torch.inference_mode():
            return program(x, *unused)[0]

    return call


def _runnable(values: fx.GraphModule, explainer: frpc.Explainer) -> Callable[..., Any] | None:
    """Lowers a program as the explainer's own was; ``--base`` also measures revisions that had no backends yet."""
    try:
        from frpc.optimize.backends.backends import executable, lower_program
    except ImportError:
        try:
            from frpc.driver import pipeline
            from frpc.optimize.backends import bound
        except ImportError:
            return None
        return bound.bound(pipeline.lower_program(values)[0])
    backend = explainer.programs.options.backend
    return executable(lower_program(values, backend).program, backend)


def compiled_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Way:
    """Input times gradient with forward and backward pass compiled by ``torch.compile``; the first call compiles."""
    faster = torch.compile(model)

    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(faster(leaf).gather(1, target[:, None]).sum(), leaf)
        return gradient * x

    return call


def captum_way(case: Case) -> dict[str, Way]:
    """Captum's input times gradient, where Captum is installed."""
    try:
        from captum.attr import InputXGradient
    except ImportError:
        return {}
    peer = InputXGradient(case.model)
    return {CAPTUM: lambda: peer.attribute(case.x.clone().requires_grad_(), target=case.target)}


def gate(case: Case) -> dict[str, float]:
    """Compares the explainer's output with the model's, sums its maps, and where the net is piecewise linear, compares them.

    There every map is ``x * gradient + beta / N``, beta being the constants' share of the output and N the input's size.

    Raises:
        AssertionError: if any of it is off by more than rounding.
    """
    output, explained = case.forward(), case.explain()
    assert isinstance(explained.relevance, Tensor)
    size = case.x[0].numel()
    maps = explained.relevance.double().view(*case.columns.shape, size)  # [B, K, N]
    logits = explained.output.double().gather(1, case.columns)
    scale = maps.abs().sum(-1)
    errors = {
        "output": float((explained.output - output).abs().max() / output.abs().max()),
        "conservation": float(((maps.sum(-1) - logits).abs() / scale).max()),
    }
    if case.own is not None:
        own = case.own()
        assert isinstance(own, Tensor)
        errors["output"] = max(errors["output"], float((own - output).abs().max() / output.abs().max()))
    if is_piecewise_linear(case.model):
        expected = case.gradient().double().view_as(maps) + explained.bias.double().view(*case.columns.shape, 1) / size
        errors["map"] = float(((maps - expected).abs().sum(-1) / scale).max())
    bounds = {"output": OUTPUT_BOUND, "conservation": CONSERVATION_BOUND, "map": MAP_BOUND}
    if not all(error <= bounds[name] for name, error in errors.items()):
        raise AssertionError(f"{case.name} is wrong, so it is not timed: {errors}")
    return errors


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """A block in which ``torch.compile`` knows nothing of what it compiled before, in memory or on disk."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()
