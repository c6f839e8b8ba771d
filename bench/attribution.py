"""What explaining a target, or K of one input, costs in units of the model's own eager forward pass.

All ways run in the same rounds on the same input: the model's forward pass under ``inference_mode``, frpc's own forward pass (its
program without the way back), the explainer, and input times gradient by autograd, the cheapest map that other libraries give.
Each round measures every way once, in an order that turns from round to round, and takes their ratio there, so that a machine
that slows down slows all of them. Nothing is timed before the explainer's output, account and map have been found right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.case import EXPLAIN, FORWARD, GRADIENT, OWN, Case, gate, prepare, with_targets
from bench.machine import Spread, interleave, machine, make_table, open_console, peak_memory, write_record
from bench.nets import MLP

__all__ = ["goals", "missed_goals", "run"]

ONE_TARGET = ("vgg16", "resnet50", "squeezenet1_0", "squeezenet1_1")


def goals(net: str, batch: int, targets: int) -> dict[str, float]:
    """Returns how many calls of another way explaining may take at most, by that way: ``{"forward": 1.8}``."""
    if batch == 1 and targets == 1 and net in ONE_TARGET:
        return {FORWARD: 1.8, OWN: 2.1}
    if batch == 1 and targets == 10 and net == "resnet50":
        return {FORWARD: 8.0}
    if batch == 1 and targets == 1 and net == MLP:
        return {GRADIENT: 0.7}
    return {}


def report(case: Case, errors: dict[str, float], times: dict[str, list[float]], ways: dict[str, Any]) -> dict[str, Any]:
    """Collects everything known about one question, ready for JSON."""
    targets = case.columns.shape[1]
    over = {name: asdict(Spread.of(_ratios(times[EXPLAIN], times[name]))) for name in times if name != EXPLAIN}
    return {
        "net": case.name,
        "input": list(case.x.shape),
        "targets": targets,
        "errors": errors,
        "compile_seconds": case.compile_seconds,
        "refusals": len(case.explainer.refusals),
        "goals": goals(case.name, len(case.x), targets),
        "explaining_over": over,
        "ways": {
            name: {
                "seconds": asdict(Spread.of(times[name])),
                "ratio": asdict(Spread.of(_ratios(times[name], times[FORWARD]))),
                "peak_bytes": peak_memory(ways[name]),
                "rounds": times[name],
            }
            for name in times
        },
    }


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def missed_goals(result: dict[str, Any]) -> list[str]:
    """Returns what falls short of a goal, or could not be held against it."""
    where = f"{result['net']}, {result['targets']} target{'s' * (result['targets'] > 1)}"
    missed = []
    for way, goal in result["goals"].items():
        found = result["explaining_over"].get(way, {}).get("median")
        if found is None:
            missed.append(f"{where}: {way} was not measured, the goal is {goal} of it")
        elif found > goal:
            missed.append(f"{where}: explaining takes {found:.2f} x {way}, the goal is {goal}")
    return missed


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each question and way, and what the checks found."""
    heads = ("ms a call", "min–max", "forwards", "IQR", "min–max", "frpc is", "peak MB", "compile s")
    table = make_table("net", "input", "K", "way", *heads, left=4)
    for result in results:
        for name, way in result["ways"].items():
            seconds, ratio, first = way["seconds"], way["ratio"], name == FORWARD
            table.add_row(
                result["net"] if first else "",
                "x".join(map(str, result["input"])) if first else "",
                str(result["targets"]) if first else "",
                name,
                f"{1e3 * seconds['median']:.3g}",
                f"{1e3 * seconds['least']:.3g}–{1e3 * seconds['most']:.3g}",
                f"{ratio['median']:.2f}",
                f"{ratio['low_quartile']:.2f}–{ratio['high_quartile']:.2f}",
                f"{ratio['least']:.2f}–{ratio['most']:.2f}",
                "" if name == EXPLAIN else f"{result['explaining_over'][name]['median']:.2f} x",
                f"{way['peak_bytes'] / 1e6:.4g}",
                f"{result['compile_seconds']:.1f}" if name == EXPLAIN else "",
            )
    console.print(table)
    for result in results:
        errors = ", ".join(f"{what} {error:.1e}" for what, error in result["errors"].items())
        verdict = "no goal" if not result["goals"] else "short of a goal" if missed_goals(result) else "within the goals"
        console.print(f"{result['net']}, K = {result['targets']}: {verdict}; errors: {errors}")


def run(
    nets: Sequence[str],
    batches: Sequence[int],
    targets: Sequence[int],
    device: str,
    threads: int,
    rounds: int,
    peers: bool,
    file: Path | None,
) -> int:
    """Runs the benchmark; returns 1 if a goal is missed."""
    console, where = open_console(), machine(threads)
    results = []
    for name in nets:
        for batch in batches:
            compiled = prepare(name, batch, device)
            for count in targets:
                case = with_targets(compiled, count)
                errors, ways = gate(case), case.ways(peers)
                title = f"{name}, batch {batch}, K {count}"
                results.append(report(case, errors, interleave(ways, rounds, title), ways))
    show(console, results)
    missed = [line for result in results for line in missed_goals(result)]
    for line in missed:
        console.print(f"short of the goal: {line}")
    settings = {"batches": list(batches), "targets": list(targets), "device": device, "rounds": rounds}
    write_record(console, file, "attribution", settings, where, results)
    return int(bool(missed))
