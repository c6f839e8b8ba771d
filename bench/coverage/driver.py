"""Runs one process for each model, a few at a time, and keeps what they find: a crash or a hang ends one model, not the run.

Processes are forked from one that has imported the libraries and done nothing else, so that each starts clean and at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Record", "Work", "read_records", "run_all", "write_records"]

Record = dict[str, Any]
Work = Callable[[str], Record]
PAUSE = 0.2  # seconds between looks at the running processes
TAIL = 600  # characters kept of what a crashed process said
PRELOAD = ("torch", "torchvision", "frpc", "bench.coverage.probe")


@dataclass
class _Running:
    """One model under way."""

    name: str
    process: ForkServerProcess
    folder: Path
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def kill(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.join()

    def record(self, limit: float) -> Record:
        """Reads what it found, or says how it ended."""
        found, said = self.folder / "found.json", self.folder / "said.txt"
        if found.exists():
            return dict(json.loads(found.read_text(encoding="utf-8")))
        if self.seconds > limit:
            return {"status": "timeout", "reason": f"not done after {limit:.0f} s"}
        code = self.process.exitcode or 0
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code} and no record"
        tail = said.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip() if said.exists() else ""
        return {"status": "crashed", "reason": f"{how}: {tail}"}


def _child(work: Work, name: str, folder: Path) -> None:
    """Tries one model: what it prints goes to ``said.txt``, what it finds to ``found.json`` in one step."""
    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    record = work(name)
    (folder / "part.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "part.json").replace(folder / "found.json")


def read_records(file: Path) -> dict[str, Record]:
    """Returns what is known, by model; nothing if there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if line.strip()]
    return {record["name"]: record for record in records}


def write_records(file: Path, records: Mapping[str, Record]) -> None:
    """Writes one line a model, replacing the file in one step, so that a run cut short leaves a whole file."""
    lines = [json.dumps(records[name]) for name in sorted(records)]
    fresh = file.with_suffix(".tmp")
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    fresh.replace(file)


def run_all(
    names: Sequence[str],
    work: Work,
    file: Path,
    where: Record,
    jobs: int,
    limit: float,
    console: Console,
    preload: Sequence[str] = PRELOAD,
) -> dict[str, Record]:
    """Tries the models and writes each one's record as soon as it is there.

    Args:
        names: the models, in order.
        work: tries one, in a process of its own; a function that can be pickled.
        file: where records go; those of other models in it stay.
        where: what is noted in every record: versions, commit, date.
        jobs: processes at one time.
        limit: seconds after which a process is ended.
        console: where progress is shown.
        preload: modules imported once, before the first model.

    Returns:
        The new records. After an interrupt the running processes are ended and the finished models' records are in the file.
    """
    waiting, running, done = list(names), list[_Running](), dict[str, Record]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    before = signal.signal(signal.SIGTERM, _stop)
    with (
        Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress,
        tempfile.TemporaryDirectory() as scratch,
    ):
        task = progress.add_task("", total=len(names))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), work, Path(tempfile.mkdtemp(dir=scratch)), preload))
                progress.update(task, completed=len(done), description=", ".join(r.name for r in running))
                time.sleep(PAUSE)
                for one in [r for r in running if r.process.exitcode is not None or r.seconds > limit]:
                    one.kill()
                    running.remove(one)
                    done[one.name] = {"name": one.name, **one.record(limit), **where}
                    write_records(file, read_records(file) | {one.name: done[one.name]})
                    progress.console.print(f"{one.name:<40} {done[one.name].get('status', 'done'):<10} {one.seconds:6.1f} s")
        finally:
            for one in running:
                one.kill()
            signal.signal(signal.SIGTERM, before)
    return done


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start(name: str, work: Work, folder: Path, preload: Sequence[str]) -> _Running:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=_child, args=(work, name, folder), daemon=True)
    process.start()
    return _Running(name, process, folder)
