"""What a method costs, in units of the model's own eager forward pass, beside the same method of other libraries.

All ways run in the same rounds on the same input. Nothing is timed before the explainer's output has been found right, and, where
a method conserves, its account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import frpc
from bench.machine import Spread, interleave, machine, make_table, open_console, write_record
from bench.nets import build

__all__ = ["run"]

FORWARD = "forward"
OURS = (
    "frp", "gradient-input", "lrp-epsilon", "lid-taylor", "lid-ig", "lid-ig steps=10", "sig-lid-ig", "z-plus", "alpha2-beta1",
    "gamma", "epsilon-plus", "epsilon-plus-flat", "epsilon-alpha2-beta1-flat", "epsilon-gamma-box", "deep-taylor",
    "guided-backprop",
)  # fmt: skip
SPECIAL: dict[str, Callable[[], frpc.rules.RuleSet]] = {
    "lid-ig steps=10": lambda: frpc.rules.LID(steps=10),
    "epsilon-gamma-box": lambda: frpc.rules.EpsilonGammaBox(low=-10.0, high=10.0),
}
ONE, EPSILON, FLAT = 1.8, 1.9, 3.0
PASS, COMPOSITE = 2.3, 3.5
GOALS = {
    "frp": ONE, "gradient-input": ONE, "lrp-epsilon": EPSILON, "lid-taylor": PASS, "lid-ig": PASS, "z-plus": COMPOSITE,
    "epsilon-plus": COMPOSITE, "epsilon-plus-flat": FLAT, "epsilon-alpha2-beta1-flat": COMPOSITE,
    "epsilon-gamma-box": COMPOSITE,
}  # fmt: skip
EXACT_OVER_TAYLOR = 1.2
OUTPUT_BOUND, ACCOUNT_BOUND = 1e-4, 1e-5  # float32: relative to the largest output, and to sum|R|


@dataclass(frozen=True)
class Case:
    """One net and what explains it."""

    net: str
    model: nn.Module
    x: Tensor
    target: Tensor
    explainers: dict[str, frpc.Explainer]
    compile_seconds: dict[str, float]

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.x)

    def ways(self, peers: bool) -> dict[str, Callable[[], object]]:
        def ours(explainer: frpc.Explainer) -> Callable[[], object]:
            def call() -> object:
                with torch.inference_mode():
                    return explainer(self.x, target=self.target)

            return call

        found: dict[str, Callable[[], object]] = {FORWARD: self.forward}
        found |= {name: ours(explainer) for name, explainer in self.explainers.items()}
        return found | (peer_ways(self) if peers else {})


def peer_ways(case: Case) -> dict[str, Callable[[], object]]:
    """The same methods by other libraries, where those are installed and run on the net."""
    x, target = case.x, int(case.target[0])
    found: dict[str, Callable[[], object]] = {}
    try:
        from captum.attr import LRP, DeepLift, InputXGradient

        found["Captum InputXGradient"] = lambda: InputXGradient(case.model).attribute(x.clone().requires_grad_(), target=target)
        found["Captum LRP"] = lambda: LRP(case.model).attribute(x.clone().requires_grad_(), target=target)
        found["Captum DeepLift"] = lambda: DeepLift(case.model).attribute(x.clone().requires_grad_(), target=target)
    except ImportError:
        pass
    try:
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlusFlat

        def flat() -> object:
            with Gradient(model=case.model, composite=EpsilonPlusFlat()) as attributor:
                return attributor(
                    x.clone().requires_grad_(), lambda out: nn.functional.one_hot(case.target, out.shape[1]).float()
                )

        found["zennit EpsilonPlusFlat"] = flat
    except ImportError:
        pass
    return {name: way for name, way in found.items() if _runs(way)}


def _runs(way: Callable[[], object]) -> bool:
    """A peer that cannot explain this net is left out; the coverage page says which nets those are."""
    try:
        way()
    except (RuntimeError, TypeError, AssertionError):
        return False
    return True


def prepare(net: str, names: Sequence[str], batch: int) -> Case:
    """Builds a net with random weights, ReLUs as modules of their own for the peers' sake, and compiles every method."""
    model, x = build(net, batch=batch)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with torch.inference_mode():
        output = model(x)
    explainers, seconds = {}, {}
    for name in names:
        start = time.perf_counter()
        rule = SPECIAL[name]() if name in SPECIAL else None
        explainers[name] = frpc.compile(model, (x,), rule=rule, method=None if rule else name)
        seconds[name] = time.perf_counter() - start
        found = explainers[name](x, target=output.argmax(1))
        assert isinstance(found.relevance, Tensor)
        off = float((found.output - output).abs().max() / output.abs().max())
        lost = float(found.bias.abs().max() / found.relevance.double().abs().sum()) if name in ("lid-ig", "deeplift") else 0.0
        if not (off <= OUTPUT_BOUND and lost <= ACCOUNT_BOUND):
            raise AssertionError(f"{name} on {net} is wrong, so it is not timed: output {off:.1e}, account {lost:.1e}")
    return Case(net, model, x, output.argmax(1).clone(), explainers, seconds)


def report(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """Collects everything known about one net, ready for JSON."""
    ways = {
        name: {
            "seconds": asdict(Spread.of(found)),
            "ratio": asdict(Spread.of([t / f for t, f in zip(found, times[FORWARD], strict=True)])),
            "compile_seconds": case.compile_seconds.get(name),
            "goal": GOALS.get(name),
        }
        for name, found in times.items()
    }
    result: dict[str, Any] = {"net": case.net, "input": list(case.x.shape), "ways": ways}
    if {"lid-ig", "lid-taylor"} <= times.keys():
        pairs = zip(times["lid-ig"], times["lid-taylor"], strict=True)
        result["exact_over_taylor"] = asdict(Spread.of([exact / taylor for exact, taylor in pairs]))
    return result


def show(console: Console, result: dict[str, Any]) -> list[str]:
    """Prints one row for each way; returns the goals that are missed."""
    table = make_table("method", "ms a call", "min–max", "forwards", "IQR", "goal", "compile s")
    missed = []
    for name, way in result["ways"].items():
        seconds, ratio, goal = way["seconds"], way["ratio"], way["goal"]
        if goal is not None and ratio["median"] > goal:
            missed.append(f"{result['net']} {name}: {ratio['median']:.2f} forwards, the goal is {goal}")
        table.add_row(
            name,
            f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['least']:.1f}–{1e3 * seconds['most']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low_quartile']:.2f}–{ratio['high_quartile']:.2f}",
            "" if goal is None else f"{goal}",
            "" if way["compile_seconds"] is None else f"{way['compile_seconds']:.1f}",
        )
    console.print(f"{result['net']}, input {result['input']}")
    console.print(table)
    if exact := result.get("exact_over_taylor"):
        console.print(
            f"LID exact over LID-Taylor: {exact['median']:.2f} ({exact['low_quartile']:.2f}–{exact['high_quartile']:.2f})"
        )
        if exact["median"] > EXACT_OVER_TAYLOR:
            missed.append(f"{result['net']}: LID exact is {exact['median']:.2f} x LID-Taylor, the goal is {EXACT_OVER_TAYLOR}")
    return missed


def run(nets: Sequence[str], names: Sequence[str], batch: int, threads: int, rounds: int, peers: bool, file: Path | None) -> int:
    """Runs the benchmark; returns 1 if a goal is missed."""
    console, where = open_console(), machine(threads)
    results, missed = [], []
    for net in nets:
        case = prepare(net, names or OURS, batch)
        results.append(report(case, interleave(case.ways(peers), rounds, net)))
        missed += show(console, results[-1])
    for line in missed:
        console.print(f"short of the goal: {line}")
    write_record(console, file, "methods", {"batch": batch, "rounds": rounds}, where, results)
    return int(bool(missed))
