"""How the price of all maps of a layer grows with the image's side, the layer's depth and the number of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import Spread, interleave, machine, make_table, open_console, write_record
from bench.nets import CONVOLUTIONS, THESIS
from bench.neurons import Case, prepare

__all__ = ["run"]

DEPTH_SIDE = 32
WIDTHS = (0.25, 0.5, 1.0)
CELLS = 16  # that the dense algorithm runs on

Setting = tuple[str, str, str, int, float]  # what grows, its value, layer, side, width


def settings(sides: Sequence[int]) -> Iterator[Setting]:
    """Every point, each part growing one thing and keeping the others as in the thesis."""
    for side in sides:
        yield "side", str(side), "conv2", side, 1.0
    smallest = min(DEPTH_SIDE, max(sides))
    for layer in CONVOLUTIONS:
        yield "depth", layer, layer, smallest, 1.0
    for width in WIDTHS:
        yield "channels", f"{width:g} x", "conv2", smallest, width


def measure(setting: Setting, rounds: int, limit: float) -> dict[str, Any]:
    """Times one point: the net's forward pass, frpc, and the dense algorithm on a sample of cells."""
    grows, value, layer, side, width = setting
    case: Case = prepare(THESIS, layer, side, sample=CELLS, limit=limit, width=width)
    maps = case.maps()
    ways: dict[str, Callable[[], object]] = {
        "forward": case.forward,
        "frpc": case.maps,
        "dense": lambda: case.columns(case.cells),
    }
    times = interleave(ways, rounds, f"{grows} {value}")
    times["dense"] = [t * case.x[0, 0].numel() / len(case.cells) for t in times["dense"]]
    ratios = [t / f for t, f in zip(times["frpc"], times["forward"], strict=True)]
    return {
        "grows": grows,
        "value": value,
        "layer": case.layer,
        "side": side,
        "width": width,
        "neurons": len(maps),
        "window": [g.side for g in maps.window],
        "strategy": maps.plan.strategy,
        "flops": next(c.flops for c in maps.plan.candidates if c.strategy == maps.plan.strategy),
        "map_bytes": maps.nbytes(),
        "residual": float(maps.residual().max()),
        "seconds": {name: asdict(Spread.of(found)) for name, found in times.items()},
        "ratio": asdict(Spread.of(ratios)),
        "dense_scaled_from_cells": len(case.cells),
    }


def show(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """Prints one row for each point."""
    heads = ("neurons", "window", "MB", "GFLOP", "forward ms", "maps ms", "ratio", "GFLOP/s", "dense s", "faster", "residual")
    table = make_table("grows", "to", "by", *heads, left=3)
    for r in results:
        seconds = {name: found["median"] for name, found in r["seconds"].items()}
        table.add_row(
            r["grows"],
            r["value"],
            r["strategy"],
            f"{r['neurons']:,}",
            "x".join(map(str, r["window"])),
            f"{r['map_bytes'] / 1e6:.0f}",
            f"{r['flops'] / 1e9:.3g}",
            f"{1e3 * seconds['forward']:.1f}",
            f"{1e3 * seconds['frpc']:.1f}",
            f"{r['ratio']['median']:.2f}",
            f"{r['flops'] / seconds['frpc'] / 1e9:.0f}",
            f"{seconds['dense']:.3g}",
            f"{seconds['dense'] / seconds['frpc']:.3g} x",
            f"{r['residual']:.0e}",
        )
    console.print(table)
    console.print(
        f"dense: the thesis's algorithm, scaled from {CELLS} cells, without the layer's values and without laying out the maps"
    )


def run(sides: Sequence[int], limit: float, threads: int, rounds: int, file: Path | None) -> int:
    """Measures every point."""
    console, where = open_console(), machine(threads)
    console.width = max(console.width, 140)
    results = [measure(setting, rounds, limit) for setting in settings(sides)]
    show(console, results)
    write_record(console, file, "neurons growth", {"rounds": rounds}, where, results)
    return 0
