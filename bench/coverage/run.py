"""``python -m bench coverage``: which models are tried, what is kept, what is said at the end."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.coverage.driver import PRELOAD, Record, read_records, run_all
from bench.coverage.probe import work
from bench.coverage.suites import SUITES, load
from bench.machine import machine, open_console

__all__ = ["RESULTS", "missing_ops", "results_file", "run"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "captum", "zennit", "lxt")


def results_file(suite: str, peers: bool = False) -> Path:
    """Where a suite's records are."""
    return RESULTS / f"coverage_{suite}{'_peers' if peers else ''}.jsonl"


def run(suite: str, only: str, again: bool, misses: bool, jobs: int, limit: float, memory_gb: float, peers: bool) -> int:
    """Tries the models that have no record yet, or all that are asked for again; returns 1 if a model tried is not ``ok``."""
    console, file = open_console(), results_file(suite, peers)
    known = read_records(file)
    asked = [name for name in load(suite).names() if re.search(only, name)]
    names = [name for name in asked if again or name not in known or (misses and known[name].get("status") != "ok")]
    console.print(f"{suite}: {len(names)} models to try, {len(asked) - len(names)} of {len(asked)} have a record")
    one = functools.partial(work, suite, memory_gb, peers)
    preload = (*PRELOAD, SUITES[suite]) if suite in SUITES else PRELOAD
    found = run_all(names, one, file, note(), jobs, limit, console, preload=preload)
    records = {name: record for name, record in read_records(file).items() if name in asked}
    summary(console, suite, records)
    return int(any(record.get("status", "ok") != "ok" for record in found.values()))


def note() -> dict[str, Any]:
    """What is noted in every record."""
    here = machine(1)
    return {
        "commit": here["commit"],
        "uncommitted_changes": here["uncommitted_changes"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": here["versions"] | {library: found for library in LIBRARIES if (found := _version(library))},
        "cpu": f"{here['cpu']}, {here['threads']} thread",
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_ops(records: Mapping[str, Record]) -> list[tuple[str, int, list[str]]]:
    """Returns every cause of a gap with the models it stops, the most frequent first."""
    models: dict[str, list[str]] = {}
    for name, record in records.items():
        for cause in record.get("missing", ()):
            models.setdefault(cause, []).append(name)
    return sorted(((cause, len(names), names) for cause, names in models.items()), key=lambda found: (-found[1], found[0]))


def summary(console: Console, suite: str, records: Mapping[str, Record]) -> None:
    """Prints how many models there are of each status, and what is missing."""
    statuses = Counter(record.get("status", "tried") for record in records.values())
    console.print(f"{suite}: {len(records)} models, " + ", ".join(f"{n} {status}" for status, n in statuses.most_common()))
    for cause, count, names in missing_ops(records):
        console.print(f"  {count:>3} models: {cause}   ({', '.join(names[:4])}{', ...' if count > 4 else ''})")
    for name, record in records.items():
        if record.get("status") in ("raised", "inexact", "crashed", "timeout", "not built"):
            console.print(f"  {name}: {record['status']}: {record.get('error', '')} {record['reason'].splitlines()[0][:110]}")
