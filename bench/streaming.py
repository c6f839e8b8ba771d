"""Streaming all maps of a layer that does not fit in memory: time, rate, peak memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import frpc
from bench.machine import machine, open_console, peak_rss, write_record
from bench.nets import build, layer_path
from frpc.core.sizes import human_bytes
from frpc.layers.maps import LayerMaps

__all__ = ["run"]


@dataclass
class Tally:
    """What streaming found; ``seconds`` leaves out the checks."""

    seconds: float = 0.0
    checks: float = 0.0
    neurons: int = 0
    blocks: int = 0
    residual: float | None = None


def consume(maps: LayerMaps, limit: int, rows: int | None, check: bool) -> Tally:
    """Streams a layer, or its first ``rows`` blocks, and lets every block go."""
    tally, start = Tally(), time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("neurons"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(maps.name), *columns, transient=True) as progress, torch.inference_mode():
        task = progress.add_task(maps.name, total=len(maps))
        for block in maps.blocks(limit):
            tally.neurons += block.values.numel()
            tally.blocks += 1
            if check:
                begun = time.perf_counter()
                tally.residual = max(tally.residual or 0.0, float(block.residual().max()))
                tally.checks += time.perf_counter() - begun
            progress.update(task, completed=tally.neurons)
            del block  # or it would be held while the next one is computed
            if tally.blocks == rows:
                break
    tally.seconds = time.perf_counter() - start - tally.checks
    return tally


def run(
    net: str, layer: str, side: int, batch: int, limit: float, rows: int | None, check: bool, threads: int, file: Path | None
) -> int:
    """Streams one layer and prints what it took."""
    console, where = open_console(), machine(threads)
    model, x = build(net, side, batch)
    start = time.perf_counter()
    with torch.inference_mode():
        maps = frpc.compile(model, bias="separate").layer(layer_path(net, layer), x, memory_limit=int(limit))
    prepared, before = time.perf_counter() - start, peak_rss()
    console.print(f"{maps!r}\n{maps.plan}\ncapture and layer values: {prepared:.1f} s, peak RSS so far {human_bytes(before)}")
    tally = consume(maps, int(limit), rows, check)
    share = tally.neurons / len(maps)
    flops = next(c.flops for c in maps.plan.candidates if c.strategy == maps.plan.strategy)
    result: dict[str, Any] = {
        "net": net,
        "layer": maps.name,
        "input": list(x.shape),
        "strategy": maps.plan.strategy,
        "neurons": tally.neurons,
        "neurons_of_layer": len(maps),
        "blocks": tally.blocks,
        "map_bytes": maps.nbytes(),
        "flops": flops * share,
        "seconds": tally.seconds,
        "seconds_of_layer_estimated": None if share == 1 else tally.seconds / share,
        "gflop_per_second": flops * share / tally.seconds / 1e9,
        "check_seconds": tally.checks,
        "worst_residual": tally.residual,
        "peak_rss_before": before,
        "peak_rss": peak_rss(),
    }
    about = "" if share == 1 else f" (scaled to the whole layer: about {tally.seconds / share:.1f} s)"
    console.print(
        f"{tally.neurons:,} of {len(maps):,} neurons in {tally.blocks} blocks: {tally.seconds:.2f} s{about}, "
        f"{result['gflop_per_second']:.0f} GFLOP/s by the plan, peak RSS {human_bytes(result['peak_rss'])}"
    )
    if tally.residual is not None:
        console.print(f"worst residual {tally.residual:.1e}; checking took {tally.checks:.1f} s more")
    write_record(console, file, "neurons stream", {"batch": batch, "limit_bytes": int(limit), "rows": rows}, where, [result])
    return 0
