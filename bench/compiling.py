"""How long compiling takes, stage by stage, and how large programs are, beside ``torch.compile`` of forward and backward pass.

Both compilers have compiled a small net before anything is timed, so that importing their parts is in no figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import frpc
from bench.case import compiled_gradient, fresh_compiler
from bench.machine import Spread, machine, make_table, open_console, timed, write_record
from bench.nets import MLP, build

__all__ = ["measure", "run"]

TOTAL, FIRST, PEER = "frpc.compile", "first call", "torch.compile"
OUTPUT_BOUND = 1e-4


def measure(net: str, rounds: int, peers: bool) -> dict[str, Any]:
    """Compiles one net several times; the peer is compiled with empty caches each time.

    Raises:
        AssertionError: if an explainer's output is wrong.
    """
    model, x = build(net)
    with torch.no_grad():
        output = model(x)
    target = output.argmax(1)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        start = time.perf_counter()
        explainer = frpc.compile(model, (x,))
        whole = time.perf_counter() - start
        for stage in explainer.stages:
            seconds.setdefault(stage.name, []).append(stage.seconds)
        seconds.setdefault(TOTAL, []).append(whole)
        seconds.setdefault(FIRST, []).append(timed(partial(explainer, x, target=target)))
        if peers:
            with fresh_compiler():
                seconds.setdefault(PEER, []).append(timed(compiled_gradient(model, x, target)))
    off = float((explainer(x, target=target).output - output).abs().max() / output.abs().max())
    if not off <= OUTPUT_BOUND:
        raise AssertionError(f"{net} is wrong, so its compilation is not reported: {off}")
    compiled = explainer.compiled(x)
    return {
        "net": net,
        "input": list(x.shape),
        "targets": 1,
        "errors": {"output": off},
        "nodes": len(compiled.assignment.rules),
        "portable_calls": _calls(compiled.portable),
        "calls": _calls(compiled.program),
        "refusals": len(compiled.refusals),
        "ways": {name: {"seconds": asdict(Spread.of(found)), "rounds": found} for name, found in seconds.items()},
    }


def _calls(program: torch.fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one column for each stage."""
    stages = list(dict.fromkeys(name for result in results for name in result["ways"]))
    table = make_table("net", "nodes", "calls", *stages)
    for result in results:
        medians = {name: way["seconds"]["median"] for name, way in result["ways"].items()}
        cells = [f"{medians[name]:.3g}" if name in medians else "" for name in stages]
        table.add_row(result["net"], str(result["nodes"]), str(result["calls"]), *cells)
    console.print(table)
    console.print("seconds, medians; what frpc.compile takes beyond its stages is the check of the program against the model")


def run(nets: Sequence[str], threads: int, rounds: int, peers: bool, file: Path | None) -> int:
    """Measures every net."""
    console, where = open_console(), machine(threads)
    results = []
    measure(MLP, 1, peers)  # imports what compilers import on first use
    for net in nets:
        with console.status(net):
            results.append(measure(net, rounds, peers))
    show(console, results)
    if peers:
        ratios = [r["ways"][PEER]["seconds"]["median"] / r["ways"][TOTAL]["seconds"]["median"] for r in results]
        console.print(f"torch.compile takes {statistics.median(ratios):.1f} x as long as frpc.compile, median of the nets")
    write_record(console, file, "compile", {"rounds": rounds, "peers": peers}, where, results)
    return 0
