"""What all benchmarks share: where they ran, how they take turns, how they keep what they found."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, used for memory, is talkative; read when torch is imported

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import frpc

__all__ = [
    "Spread",
    "interleave",
    "machine",
    "make_table",
    "open_console",
    "peak_memory",
    "peak_rss",
    "timed",
    "write_record",
]

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
    _wait()
    start = time.perf_counter()
    way()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Lets a GPU finish what it was given; calls only queue it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
            times[name].append(timed(partial(_repeat, ways[name], calls[name])) / calls[name])
    return times


def _repeat(way: Callable[[], object], count: int) -> None:
    for _ in range(count):
        way()


def _calls_for(way: Callable[[], object]) -> int:
    """Warms a way up and returns how many calls make a block."""
    for _ in range(WARM_UP):
        if timed(way) > SLOW_SECONDS:
            return 1
    return max(1, round(BLOCK_SECONDS / timed(way)))


def peak_memory(way: Callable[[], object]) -> int:
    """Returns the largest sum of tensor bytes alive at once in one call, beyond what was there before it.

    Scratch memory that oneDNN keeps to itself is not counted. On a GPU it is what PyTorch's allocator gave out there.
    """
    if torch.cuda.is_initialized():
        _wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def peak_rss() -> int:
    """Returns the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(threads: int) -> dict[str, Any]:
    """Says where and with what the numbers are made; takes ``threads`` for torch."""
    torch.set_num_threads(threads)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "frpc": frpc.__version__},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _command(words: Sequence[str]) -> str:
    """The command line after ``python -m bench``, without folders of this machine and without the record's own name."""
    named = [words[at] for at in range(len(words)) if "--json" not in (words[at], words[at - 1] if at else "")]
    return shlex.join(Path(word).name if os.sep in word else word for word in named)


def _cpu_name() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git(*arguments: str) -> str | None:
    """What git says about the package that is measured, which need not lie beside this file."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(frpc.__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def open_console() -> Console:
    """A console wide enough for the tables, which a terminal may wrap."""
    console = Console(highlight=False)
    console.width = max(console.width, 150)
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
        record = {"benchmark": benchmark, "command": _command(sys.argv[1:]), **settings, "machine": where, "results": results}
        file.write_text(json.dumps(record, indent=2) + "\n")
