"""Memory that one explanation takes beyond the parameters and the input, beside autograd and Captum, and what the plan predicts.

Measured by PyTorch's allocator: the largest sum of tensor bytes alive at once. Scratch memory that oneDNN keeps to itself is in
none of the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.case import CAPTUM, EXPLAIN, FORWARD, GRADIENT, Case, captum_way, gate, prepare, with_targets
from bench.machine import machine, make_table, open_console, peak_memory, write_record

__all__ = ["missed_goals", "run"]

NAMES = (FORWARD, EXPLAIN, GRADIENT, CAPTUM)
CALLS = 2
GOALS = {("resnet50", 16): 0.4}  # net, batch: of what autograd takes
PREDICTION_GOAL = 0.2  # how far from what was measured a prediction may be


def measure(case: Case) -> dict[str, Any]:
    """Returns the peak bytes of every way, and the plan's prediction where it makes one."""
    ways = {FORWARD: case.forward, EXPLAIN: case.explain, GRADIENT: case.gradient}
    ways |= captum_way(case) if case.target.dim() == 1 else {}  # Captum takes one target of a sample
    found = {}
    for name, way in ways.items():
        way()
        found[name] = {"peak_bytes": max(peak_memory(way) for _ in range(CALLS))}
    batch, columns = case.columns.shape
    return {
        "net": case.name,
        "input": list(case.x.shape),
        "targets": columns,
        "input_bytes": case.x.nbytes,
        "predicted_bytes": predicted(case, batch, columns),
        "goal": GOALS.get((case.name, batch)) if columns == 1 else None,
        "ways": found,
    }


def predicted(case: Case, batch: int, columns: int) -> int | None:
    """The plan's prediction for this many samples and targets, or None with revisions whose plans make none."""
    compiled = case.explainer.programs.program(
        case.explainer.programs.prepared((case.x,)),
        (case.x,),
        case.explainer.programs.query_with(columns=case.target.dim() == 2),
    )
    ask = getattr(compiled.plan, "peak_bytes_for", None)
    return None if ask is None else int(ask(batch, columns))


def missed_goals(result: dict[str, Any]) -> list[str]:
    """Returns what falls short: of the memory autograd takes, and of the prediction."""
    ways, where = result["ways"], f"{result['net']}, batch {result['input'][0]}"
    mine, missed = ways[EXPLAIN]["peak_bytes"], []
    share = mine / ways[GRADIENT]["peak_bytes"]
    if result["goal"] is not None and share > result["goal"]:
        missed.append(f"{where}: explaining takes {share:.2f} x the memory of autograd, the goal is {result['goal']}")
    if result["predicted_bytes"] is not None:
        off = result["predicted_bytes"] / mine
        if abs(off - 1) > PREDICTION_GOAL:
            missed.append(f"{where}: the plan predicts {off:.2f} x the memory, the goal is within {PREDICTION_GOAL:.0%}")
    return missed


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each net and batch."""
    table = make_table("net", "input", "K", *(f"{n} MB" for n in NAMES), "of autograd", "predicted MB", "predicted", left=3)
    for result in results:
        peaks = {name: way["peak_bytes"] for name, way in result["ways"].items()}
        guess = result["predicted_bytes"]
        table.add_row(
            result["net"],
            "x".join(map(str, result["input"])),
            str(result["targets"]),
            *(f"{peaks[name] / 1e6:.4g}" if name in peaks else "" for name in NAMES),
            f"{peaks[EXPLAIN] / peaks[GRADIENT]:.2f}",
            "" if guess is None else f"{guess / 1e6:.4g}",
            "" if guess is None else f"{guess / peaks[EXPLAIN]:.2f} x",
        )
    console.print(table)


def run(nets: Sequence[str], batches: Sequence[int], targets: Sequence[int], device: str, threads: int, file: Path | None) -> int:
    """Measures every net; returns 1 if a goal is missed."""
    console, where = open_console(), machine(threads)
    results = []
    for name in nets:
        for batch in batches:
            with console.status(f"{name}, batch {batch}"):
                compiled = prepare(name, batch, device)
                for count in targets:
                    case = with_targets(compiled, count)
                    results.append({"errors": gate(case), **measure(case)})
    show(console, results)
    missed = [line for result in results for line in missed_goals(result)]
    for line in missed:
        console.print(f"short of the goal: {line}")
    settings = {"batches": list(batches), "targets": list(targets), "device": device}
    write_record(console, file, "memory", settings, where, results)
    return int(bool(missed))
