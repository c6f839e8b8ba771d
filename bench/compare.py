"""Two commits in one benchmark: the same command, run in turns with frpc of a revision and with frpc as it is here.

Both are measured by the benchmark of this checkout. The revision lies in a worktree of its own meanwhile. Ways that are not
frpc's run in both and cannot have changed: how far theirs differ is how far any two figures may.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.case import FORWARD
from bench.machine import make_table, open_console

__all__ = ["FIGURES", "compared", "figures", "run", "without"]

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {  # benchmark -> what is compared, its unit
    "attribution": ("ratio", "forwards"),
    "methods": ("ratio", "forwards"),
    "memory": ("peak_bytes", "bytes"),
    "compile": ("seconds", "s"),
}
OWN_OPTIONS = ("--base", "--turns", "--json")
# An editable install finds frpc's modules wherever its path lacks them: the revision would be given files of this checkout.
START = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""

Key = tuple[str, str, int, str]  # net, input, targets, way


def without(words: Sequence[str], options: Sequence[str] = OWN_OPTIONS) -> list[str]:
    """Leaves options with their values out of a command line, ``--base REV`` and ``--base=REV`` alike."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif word.split("=", 1)[0] not in options:
            kept.append(word)
    return kept


def figures(record: Mapping[str, Any]) -> dict[Key, float]:
    """The figure of every way in a benchmark's record: a median, or bytes."""
    name, _ = FIGURES[record["benchmark"]]
    found: dict[Key, float] = {}
    for result in record["results"]:
        for way, numbers in result["ways"].items():
            if way == FORWARD and name == "ratio":
                continue  # 1 by definition
            value = numbers[name]
            key = (result["net"], "x".join(map(str, result["input"])), result.get("targets", 1), way)
            found[key] = value["median"] if isinstance(value, dict) else float(value)
    return found


def compared(base: Sequence[Mapping[Key, float]], here: Sequence[Mapping[Key, float]]) -> list[dict[str, Any]]:
    """One row for each figure that both have: medians and extremes over the turns, and whether the extremes overlap."""
    rows = []
    for key in base[0]:
        if not all(key in turn for turn in (*base, *here)):
            continue
        old, new = [turn[key] for turn in base], [turn[key] for turn in here]
        apart = "more" if min(new) > max(old) else "less" if max(new) < min(old) else "same"
        rows.append(
            {
                "key": key,
                "base": [statistics.median(old), min(old), max(old)],
                "here": [statistics.median(new), min(new), max(new)],
                "change": statistics.median(n / o for n, o in zip(new, old, strict=True)),
                "verdict": apart if len(old) > 1 else "",  # one turn says nothing
            }
        )
    return rows


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A revision's files below a folder, until the block ends."""
    path = folder / "base"
    _git("worktree", "add", "--detach", str(path), revision)
    try:
        yield path
    finally:
        _git("worktree", "remove", "--force", str(path))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout.strip()


def measured(words: Sequence[str], tree: Path, folder: Path) -> dict[str, Any]:
    """Runs a benchmark in a process of its own that has frpc from ``tree``, and returns its record."""
    file = folder / "record.json"
    file.unlink(missing_ok=True)
    path = os.pathsep.join(map(str, (folder / "alone", tree, tree / "kernels")))
    command = [sys.executable, "-c", START, *words, "--json", str(file)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if not file.exists():
        raise SystemExit(f"the benchmark failed with frpc of {tree.name}:\n{done.stderr.strip()}")
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def run(base: str, words: Sequence[str], turns: int, file: Path | None) -> int:
    """Compares a revision with this checkout; ``words`` is the whole command line after ``python -m bench``."""
    console, command = open_console(), without(words)
    revision = _git("rev-parse", "--verify", f"{base}^{{commit}}")
    records: dict[str, list[dict[str, Any]]] = {"base": [], "here": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "alone").mkdir()
        (folder / "alone" / "bench").symlink_to(ROOT / "bench")  # without what lies beside it
        with worktree(revision, folder) as tree:
            trees = {"base": tree, "here": ROOT}
            for turn in range(turns):
                for side in sorted(trees, reverse=bool(turn % 2)):
                    with console.status(f"turn {turn + 1} of {turns}: {side}"):
                        records[side].append(measured(command, trees[side], folder))
    rows = compared(*([figures(record) for record in records[side]] for side in ("base", "here")))
    show(console, rows, revision, FIGURES[records["base"][0]["benchmark"]][1])
    if file is not None:
        whole = {"benchmark": "compare", "command": command, "base": revision, "turns": turns, "rows": rows, "records": records}
        file.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def show(console: Console, rows: Sequence[dict[str, Any]], revision: str, unit: str) -> None:
    """Prints one row for each figure."""
    table = make_table("net", "input", "K", "way", f"{revision[:10]}, {unit}", "min–max", "here", "min–max", "change", "", left=4)
    for row in rows:
        net, size, targets, way = row["key"]
        cells = [text for side in ("base", "here") for text in _spread(row[side])]
        table.add_row(net, size, str(targets), way, *cells, f"{row['change']:.3f} x", row["verdict"])
    console.print(table)
    console.print(
        "change: here over base, median of the turns; same: the turns of both overlap (by chance, one in ten of three do not)"
    )


def _spread(numbers: Sequence[float]) -> tuple[str, str]:
    median, least, most = numbers
    return f"{median:.4g}", f"{least:.4g}–{most:.4g}"
