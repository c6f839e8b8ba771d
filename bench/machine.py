"""What all benchmarks share: where they ran, how they take turns, how they keep what they found."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import frpc

__all__ = ["Spread", "interleave", "machine", "make_table", "open_console", "peak_rss", "timed", "write_record"]

BLOCK_SECONDS = 0.3  # each measurement averages over as many calls as fill this time
WARM_UP = 3
SLOW_SECONDS = 2.0  # a way that takes longer is warm after one call


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of one measurement over the rounds."""

    median: float
    low_quartile: float
    high_quartile: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(*[values[0]] * 5)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, min(values), max(values))


def timed(way: Callable[[], object]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, list[float]]:
    """Returns seconds a call of every way, one entry a round.

    Each round measures every way once, in an order that turns from round to round.
    """
    calls = {name: _calls_for(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for index in track(range(rounds), description=title, transient=True):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                ways[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def _calls_for(way: Callable[[], object]) -> int:
    """Warms a way up and returns how many calls make a block."""
    for _ in range(WARM_UP):
        if timed(way) > SLOW_SECONDS:
            return 1
    return max(1, round(BLOCK_SECONDS / timed(way)))


def peak_rss() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(threads: int) -> dict[str, Any]:
    """Says where and with what the numbers are made; takes ``threads`` for torch."""
    torch.set_num_threads(threads)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "frpc": frpc.__version__},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_name() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def open_console() -> Console:
    """A console wide enough for the tables, which a terminal may wrap."""
    console = Console(highlight=False)
    console.width = max(console.width, 132)
    return console


def make_table(*heads: str, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns are words, the others numbers."""
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def write_record(
    console: Console, file: Path | None, benchmark: str, settings: Mapping[str, Any], where: dict[str, Any], results: Any
) -> None:
    """Prints where the numbers were made, and writes everything to ``file`` if there is one."""
    where["load_after"] = os.getloadavg()[0]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    asked = ", ".join(f"{k} {v}" for k, v in settings.items())
    console.print(f"{where['cpu']}, {where['threads']} of {where['cores']} cores, {asked}; {versions}")
    if file is not None:
        record = {"benchmark": benchmark, **settings, "machine": where, "results": results}
        file.write_text(json.dumps(record, indent=2) + "\n")
