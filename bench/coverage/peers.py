"""The same models with other libraries' methods: do they run, do they raise, and do they keep what they promise?"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.coverage.subject import Subject, take
from bench.coverage.suites import load

__all__ = ["BOUND", "METHODS", "Peer", "judge", "try_peers", "without_constants"]

BOUND = 1e-2  # |sum R - promised| / sum|R|
REASON = 300
Method = Callable[[nn.Module, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]


class _Explained(nn.Module):
    """The model as one function of one floating-point tensor, returning the explained output alone."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.output = subject.model, subject.options.get("output")
        self.others = None  # what goes with token ids
        if isinstance(subject.inputs, dict) and "input_ids" in subject.inputs:
            self.others = {name: given for name, given in subject.inputs.items() if name != "input_ids"}

    def forward(self, x: Tensor) -> Tensor:
        if self.others is None:
            result = self.model(x)
        else:
            result = self.model(inputs_embeds=x, **{name: given[: len(x)] for name, given in self.others.items()})
        if self.output is not None:
            return result[self.output]
        return next(iter(result.values())) if isinstance(result, dict) else result


def captum_lrp(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Epsilon rule everywhere, Captum's default: relevances sum to the output."""
    from captum.attr import LRP

    return LRP(model).attribute(x, target=_one(target)), _at(model, x, target)


def captum_deeplift(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rescale rule from the zero input: relevances sum to the difference of outputs."""
    from captum.attr import DeepLift

    found = DeepLift(model).attribute(x, baselines=0, target=_one(target))
    return found, _at(model, x, target) - _at(model, torch.zeros_like(x), target)


def zennit_epsilon_plus(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Epsilon in dense layers, z+ in convolutions, starting from 1: relevances sum to 1."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    kind = type(getattr(model, "model", model)).__name__
    canonizer = {"ResNet": ResNetCanonizer, "VGG": VGGCanonizer}.get(kind, SequentialMergeBatchNorm)()

    def seed(output: Tensor) -> Tensor:
        one = torch.zeros_like(output)
        one[(slice(None), *target)] = 1
        return one

    with Gradient(model=model, composite=EpsilonPlus(canonizers=[canonizer])) as attributor:
        _, found = attributor(x, seed)
    return found, torch.ones(len(x))


def lxt_attn_lrp(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """AttnLRP as lxt computes it, gradient times input of a patched model: relevances sum to the output."""
    output = model(x)[(slice(None), *target)]
    (gradient,) = torch.autograd.grad(output.sum(), x)
    return x * gradient, output


def patch_by_lxt(subject: Subject) -> None:
    """Lets lxt change the classes the model is made of, for the whole process; refused for models it has no map for."""
    from lxt.efficient import monkey_patch

    monkey_patch(sys.modules[type(subject.model).__module__])


@dataclass(frozen=True)
class Peer:
    """A method of another library.

    Attributes:
        library: the package it comes in.
        run: returns relevances, and the sum they promise, ``[B]``.
        prepare: called with one model before the one that is explained is built.
    """

    library: str
    run: Method
    prepare: Callable[[Subject], None] | None = None


METHODS: dict[str, Peer] = {
    "Captum LRP": Peer("captum", captum_lrp),
    "Captum DeepLift": Peer("captum", captum_deeplift),
    "zennit EpsilonPlus": Peer("zennit", zennit_epsilon_plus),
    "lxt AttnLRP": Peer("lxt", lxt_attn_lrp, patch_by_lxt),  # last: it changes classes for good
}


def without_constants(model: nn.Module) -> nn.Module:
    """Sets biases, batch means and shifts of norms to 0, in place: what LRP gives to them is lost by design, and not counted."""
    for part in model.modules():
        if isinstance(getattr(part, "bias", None), Tensor):
            nn.init.zeros_(part.bias)
        if isinstance(getattr(part, "running_mean", None), Tensor):
            nn.init.zeros_(part.running_mean)
    return model


def try_peers(suite: str, name: str) -> dict[str, Any]:
    """Tries every method on a model; each gets a model of its own, because some leave hooks and rules behind."""
    found: dict[str, Any] = {}
    for method, peer in METHODS.items():
        if importlib.util.find_spec(peer.library) is None:
            found[method] = {"status": "not installed"}
            continue
        try:
            subject = load(suite).build(name)
        except Exception as error:
            return {"status": "not built", "reason": str(error)[:REASON]}
        if peer.prepare is not None:
            try:
                peer.prepare(subject)
            except Exception as error:
                found[method] = {"status": "raised", "reason": _told(error), "seconds": 0.0}
                continue
            subject = load(suite).build(name)
        without_constants(subject.model)
        found[method] = judge(peer.run, subject)
    return {"status": "ok", "peers": found}


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON]


def judge(run: Method, subject: Subject) -> dict[str, Any]:
    """Runs one method on two samples and compares the sum of its relevances with the sum it promises."""
    start = time.perf_counter()
    try:
        model, x = _Explained(subject).eval(), _float_input(subject)
        with torch.no_grad():
            sizes = model(x).shape[1:]
        generator = torch.Generator().manual_seed(0)
        target = tuple(int(torch.randint(n, (), generator=generator)) for n in sizes)
        relevance, promised = run(model, x.clone().requires_grad_(), target)
    except Exception as error:
        return {"status": "raised", "reason": _told(error), "seconds": time.perf_counter() - start}
    maps = relevance.detach().double().flatten(1)
    error = float(((maps.sum(1) - promised.detach().double()).abs() / maps.abs().sum(1)).max())
    kept = error <= BOUND  # false for what is not finite
    seconds = time.perf_counter() - start
    return {"status": "ran" if kept else "off", "error": error if error < float("inf") else None, "seconds": seconds}


def _float_input(subject: Subject) -> Tensor:
    """Returns two samples of the input, or of the embeddings that token ids index."""
    inputs = take(subject.inputs, slice(2))
    if not isinstance(inputs, dict):
        return inputs[0]
    if "input_ids" not in inputs:
        return next(iter(inputs.values()))
    with torch.no_grad():
        return subject.model.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]


def _one(target: tuple[int, ...]) -> int | tuple[int, ...]:
    return target if len(target) > 1 else target[0]


def _at(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return model(x)[(slice(None), *target)]
