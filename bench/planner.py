"""Whether the planner takes the best strategy: every candidate of a layer's plan is run, as far as its weight allows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import frpc
from bench.machine import machine, make_table, open_console, timed, write_record
from bench.nets import THESIS, build, layer_path
from frpc.errors import MemoryLimitError
from frpc.layers.maps import LayerMaps

__all__ = ["CASES", "run"]

CASES = {
    f"{THESIS}@32": ("conv1", "conv2", "conv3", "conv5", "classifier.1", "classifier.5"),
    "resnet18@64": ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv2", "layer4.1.conv2", "fc"),
    "squeezenet1_1@64": ("features.0", "features.3.squeeze", "features.6.expand3x3", "features.12.expand3x3"),
}
QUICK_SECONDS = 3.0  # what took longer is not repeated
GOAL = 1.5


def measure(explainer: frpc.Explainer, layer: str, x: Tensor, patience: float, limit: float, rounds: int) -> dict[str, Any]:
    """Times every candidate of one layer, the quick ones in interleaved rounds."""

    def answer(strategy: str) -> LayerMaps:
        with torch.inference_mode():
            maps = explainer.layer(layer, x, strategy=strategy, memory_limit=int(limit))
            assert maps.local.numel()  # computes them
        return maps

    plan = explainer.layer(layer, x).plan
    times: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for candidate in plan.candidates:
        if candidate.seconds > patience:
            skipped[candidate.strategy] = f"not run: {candidate.seconds:.0f} s"
            continue
        if candidate.strategy == "transposed":  # compiles its program
            explainer.layer(layer, x).channel(0)
        try:
            times[candidate.strategy] = [timed(partial(answer, candidate.strategy))]
        except MemoryLimitError as over:
            skipped[candidate.strategy] = f"not run: {str(over).split('. ')[0]}"
    quick = [s for s, found in times.items() if found[0] < QUICK_SECONDS]
    for strategy in quick:
        times[strategy].clear()  # the first call warmed it up
    for _ in range(rounds):
        for strategy in quick:
            times[strategy].append(timed(partial(answer, strategy)))
    return {
        "layer": layer,
        "chosen": plan.strategy,
        "ended": plan.ended,
        "weights": {c.strategy: c.seconds for c in plan.candidates},
        "times": times,
        "seconds": {s: statistics.median(found) for s, found in times.items()},
        "skipped": skipped,
    }


def verdict(result: dict[str, Any]) -> tuple[str, float | None]:
    """Returns the best strategy measured, and how far the chosen one is from it."""
    seconds = result["seconds"]
    if not seconds:
        return "", None
    best = min(seconds, key=lambda s: seconds[s])
    return best, seconds[result["chosen"]] / seconds[best] if result["chosen"] in seconds else None


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each candidate of each layer."""
    table = make_table("net", "layer", "strategy", "", "weight s", "measured s", "measured/weight", "chosen/best", left=4)
    for result in results:
        best, ratio = verdict(result)
        for index, (strategy, weight) in enumerate(result["weights"].items()):
            measured = result["seconds"].get(strategy)
            marks = ["chosen"] * (strategy == result["chosen"]) + ["best"] * (strategy == best)
            table.add_row(
                "" if index else result["net"],
                "" if index else result["layer"],
                strategy,
                ", ".join(marks),
                f"{weight:.4g}",
                f"{measured:.4g}" if measured is not None else result["skipped"][strategy],
                f"{measured / weight:.2f}" if measured is not None else "",
                "" if index else "?" if ratio is None else f"{ratio:.2f}",
            )
    console.print(table)


def run(cases: Sequence[str], patience: float, limit: float, threads: int, rounds: int, file: Path | None) -> int:
    """Runs ``net@side`` cases; returns 1 if a choice is beyond the goal of the best strategy measured."""
    console, where = open_console(), machine(threads)
    results = []
    for name in cases:
        net, _, rest = name.partition("@")
        side, _, only = rest.partition(":")  # net@side:layer takes one layer
        model, x = build(net, int(side))
        explainer = frpc.compile(model, bias="separate")
        layers = [only] if only else CASES[name]
        for layer in layers:
            with console.status(f"{name} {layer}"):
                found = measure(explainer, layer_path(net, layer), x, patience, limit, rounds)
            results.append({"net": name.split(":")[0], **found})
    show(console, results)
    ratios = [ratio for result in results if (ratio := verdict(result)[1]) is not None]
    if ratios:
        console.print(f"worst choice: {max(ratios):.2f} x the best strategy measured, the goal is {GOAL}")
    record = [{**r, "best": verdict(r)[0], "ratio": verdict(r)[1]} for r in results]
    write_record(console, file, "neurons planner", {"rounds": rounds, "patience": patience, "goal": GOAL}, where, record)
    return int(any(ratio > GOAL for ratio in ratios))
