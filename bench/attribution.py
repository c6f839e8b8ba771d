"""What explaining one target costs, in units of the model's own eager forward pass.

Three ways run in the same rounds on the same input: the model's forward pass under ``inference_mode``, the explainer under
``inference_mode``, and input times gradient by autograd, the cheapest map that other libraries give. Each round measures
every way once, in an order that turns from round to round, and takes their ratio there, so that a machine that slows down
slows all of them. Nothing is timed before the explainer's output and account have been found right.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, used for memory, is talkative; read when torch is imported

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import frpc
from bench.machine import Spread, interleave, machine, make_table, open_console, write_record
from frpc.pretrained import build_model, recipe

__all__ = ["run"]

FORWARD, EXPLAIN, GRADIENT = "forward", "frpc", "x * gradient"
OUTPUT_BOUND, CONSERVATION_BOUND = 1e-4, 1e-6  # float32: relative to the largest output, and to sum|V|
GOAL = 2.3


@dataclass(frozen=True)
class Case:
    """One net, compiled, with the ways to run it."""

    name: str
    model: nn.Module
    x: Tensor
    target: Tensor
    explainer: frpc.Explainer
    compile_seconds: float

    @property
    def ways(self) -> dict[str, Callable[[], object]]:
        return {FORWARD: self.forward, EXPLAIN: self.explain, GRADIENT: self.gradient}

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.x)

    def explain(self) -> frpc.Explanation:
        with torch.inference_mode():
            return self.explainer(self.x, target=self.target)

    def gradient(self) -> Tensor:
        x = self.x.detach().requires_grad_()
        explained = self.model(x).gather(1, self.target[:, None]).sum()
        (gradient,) = torch.autograd.grad(explained, x)
        return gradient * self.x


def prepare(name: str, batch: int) -> Case:
    """Builds a net with random weights and compiles it; what is timed does not depend on the weights' values."""
    torch.manual_seed(0)
    model = build_model(name).requires_grad_(False)  # the peer then computes the input's gradient and no others
    side = recipe(name).crop
    x = torch.randn(batch, 3, side, side)
    start = time.perf_counter()
    explainer = frpc.compile(model, (x,))
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        target = model(x).argmax(1)
    return Case(name, model, x, target.clone(), explainer, seconds)


def gate(case: Case) -> dict[str, float]:
    """Compares the explainer's output with the model's and sums its map.

    Raises:
        AssertionError: if either is off by more than rounding.
    """
    output, explained = case.forward(), case.explain()
    assert isinstance(explained.relevance, Tensor)
    maps = explained.relevance.double().flatten(1)
    logits = explained.output.double().gather(1, case.target[:, None])[:, 0]
    errors = {
        "output": float((explained.output - output).abs().max() / output.abs().max()),
        "conservation": float(((maps.sum(1) - logits).abs() / maps.abs().sum(1)).max()),
    }
    if not (errors["output"] <= OUTPUT_BOUND and errors["conservation"] <= CONSERVATION_BOUND):
        raise AssertionError(f"{case.name} is wrong, so it is not timed: {errors}")
    return errors


def peak_memory(way: Callable[[], object]) -> int:
    """Returns the largest sum of tensor bytes alive at once in one call, beyond what was there before it.

    Scratch memory that oneDNN keeps to itself is not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def report(case: Case, errors: dict[str, float], times: dict[str, list[float]]) -> dict[str, Any]:
    """Collects everything known about one net, ready for JSON."""
    ratios = {name: [t / f for t, f in zip(times[name], times[FORWARD], strict=True)] for name in times}
    return {
        "net": case.name,
        "input": list(case.x.shape),
        "errors": errors,
        "compile_seconds": case.compile_seconds,
        "refusals": len(case.explainer.refusals),
        "ways": {
            name: {
                "seconds": asdict(Spread.of(times[name])),
                "ratio": asdict(Spread.of(ratios[name])),
                "peak_bytes": peak_memory(case.ways[name]),
                "rounds": times[name],
            }
            for name in times
        },
    }


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each net and way."""
    table = make_table("net", "way", "ms a call", "min–max", "ratio", "IQR", "min–max", "peak MB", "compile s", left=2)
    for result in results:
        for name, way in result["ways"].items():
            seconds, ratio = way["seconds"], way["ratio"]
            table.add_row(
                result["net"] if name == FORWARD else "",
                name,
                f"{1e3 * seconds['median']:.1f}",
                f"{1e3 * seconds['least']:.1f}–{1e3 * seconds['most']:.1f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low_quartile']:.2f}–{ratio['high_quartile']:.2f}",
                f"{ratio['least']:.2f}–{ratio['most']:.2f}",
                f"{way['peak_bytes'] / 1e6:.0f}",
                f"{result['compile_seconds']:.1f}" if name == EXPLAIN else "",
            )
    console.print(table)
    for result in results:
        errors, ratio = result["errors"], result["ways"][EXPLAIN]["ratio"]["median"]
        verdict = "within" if ratio <= GOAL else "beyond"
        console.print(
            f"{result['net']}: output differs by {errors['output']:.1e}, conservation {errors['conservation']:.1e}, "
            f"ratio {ratio:.2f}, {verdict} the goal of {GOAL}"
        )


def run(nets: Sequence[str], batch: int, threads: int, rounds: int, file: Path | None) -> int:
    """Runs the benchmark; returns 1 if a net's median ratio is beyond the goal."""
    console, where = open_console(), machine(threads)
    results = []
    for name in nets:
        case = prepare(name, batch)
        errors = gate(case)
        results.append(report(case, errors, interleave(case.ways, rounds, name)))
    show(console, results)
    write_record(console, file, "attribution", {"batch": batch, "rounds": rounds, "goal": GOAL}, where, results)
    return int(any(r["ways"][EXPLAIN]["ratio"]["median"] > GOAL for r in results))
