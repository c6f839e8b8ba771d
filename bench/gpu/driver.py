"""Runs parts one after another, each in a process of its own, and keeps what they found in one file.

A part writes one JSON line for each thing it tried, as soon as it has been tried; so a part that is ended leaves what it had. The
state is the file itself: what has a result there, from the same source files on the same GPU, is not run again.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

__all__ = ["FILE", "GOOD", "Part", "Record", "Run", "judge", "read", "write"]

ROOT = Path(__file__).resolve().parents[2]
FILE = "{file}"  # in a part's command: where it writes its results
TAIL = 3000  # characters kept of what a process printed
LEAST = 15.0  # seconds: with less time left no part is started
GOOD = ("passed", "skipped")
FINAL = ("passed", "failed", "timed out", "crashed")  # with such a result a part is not run again unless it is asked for

Record = dict[str, Any]


def nothing_missing() -> str | None:
    return None


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name, what: its name, and what it shows, in a few words.
        command: the interpreter's arguments, with :data:`FILE` where the name of the results' file goes.
        limit: seconds after which it is ended.
        missing: why it cannot run here, or None; a part that cannot is skipped.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit: float
    missing: Callable[[], str | None] = nothing_missing


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        file: the results, which are also the state.
        about: what the file says about itself beside the results: machine, versions, command.
        same: what a result has to agree in to count here: source files, GPU, versions.
        seconds: time for all parts together.
        said: gets one line when a part begins and ends.
    """

    file: Path
    about: Record
    same: Record
    seconds: float
    console: Console

    def known(self) -> dict[str, Record]:
        """The results of this source on this GPU, by part."""
        return {name: record for name, record in read(self.file).items() if self.counts(record)}

    def counts(self, record: Record) -> bool:
        return all(record.get(key) == value for key, value in self.same.items())

    def keep(self, record: Record) -> None:
        """Puts one part's result in the file; those of others stay."""
        write(self.file, self.about, read(self.file) | {record["part"]: record})

    def run(self, parts: Sequence[Part], again: bool = False, misses: bool = False) -> None:
        """Runs what has no result yet.

        Args:
            parts: in the order in which they run. One that was under way when an earlier run ended comes last: it may be what
                ended it.
            again: also those that have a result.
            misses: also those whose result is not good.
        """
        known, end = self.known(), time.monotonic() + self.seconds
        due = [part for part in parts if again or self._is_due(known.get(part.name), misses)]
        due.sort(key=lambda part: known.get(part.name, {}).get("status") == "running")
        for part in due:
            reason, left = part.missing(), end - time.monotonic()
            if reason is not None:
                self.keep(self._record(part, {"status": "skipped", "reason": reason, "seconds": 0.0, "results": []}))
            elif left >= LEAST:
                self._run_one(part, left)
            elif part.name not in known:
                self.keep(self._record(part, {"status": "waiting", "reason": "no time was left", "seconds": 0.0, "results": []}))

    def _is_due(self, found: Record | None, misses: bool) -> bool:
        status = "waiting" if found is None else found["status"]
        return status not in FINAL or (misses and status not in GOOD)

    def _run_one(self, part: Part, left: float) -> None:
        self.keep(self._record(part, {"status": "running", "reason": "it did not end", "seconds": 0.0, "results": []}))
        self.console.print(f"{part.name}: {part.what} (at most {min(part.limit, left):.0f} s)")
        found = self._record(part, judge(part, left))
        self.keep(found)
        self.console.print(f"  {found['status']} after {found['seconds']:.0f} s{': ' * bool(found['reason'])}{found['reason']}")

    def _record(self, part: Part, found: Record) -> Record:
        return {"part": part.name, "what": part.what, "date": datetime.date.today().isoformat(), **self.same, **found}


def judge(part: Part, left: float) -> Record:
    """Runs a part for at most ``left`` seconds and says how it ended: status, reason, seconds, results, and what it printed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        file, said = Path(name) / "results.jsonl", Path(name) / "said.txt"
        limit = min(part.limit, left)
        code = _run(part, file, said, limit)
        results = _lines(file)
        tail = _hide_folders(said.read_text(encoding="utf-8", errors="replace"))[-TAIL:].strip()
    status, reason = _ended(code, results, part.limit, cut=limit < part.limit)
    found: Record = {"status": status, "reason": reason, "seconds": time.monotonic() - start, "results": results}
    return found if status in GOOD else found | {"said": tail}


def _run(part: Part, file: Path, said: Path, limit: float) -> int | None:
    """Runs a part's process; returns its exit status, or None where it had to be ended."""
    command = [sys.executable, *(word.replace(FILE, str(file)) for word in part.command)]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with said.open("w", encoding="utf-8") as out, _told_to_stop():
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_all(process)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started: pytest's workers, a sanitizer's program."""
    with suppress(ProcessLookupError, PermissionError):  # all are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """A block in which SIGTERM ends the part too, as an interrupt from the keyboard does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(code: int | None, results: Sequence[Record], limit: float, cut: bool) -> tuple[str, str]:
    """Status and reason of a part that ended with ``code``, or was ended."""
    counts = Counter(result["status"] for result in results)
    failed = [result for result in results if result["status"] == "failed"]
    first = f"{failed[0]['what']}: {failed[0].get('reason', '')}" if failed else ""
    if code is None:
        more = f"; before that {first}" if first else ""
        return (
            ("cut short", f"the time of this run was up{more}") if cut else ("timed out", f"not done after {limit:.0f} s{more}")
        )
    if code < 0:
        return "crashed", f"died of {signal.Signals(-code).name} after {len(results)} results"
    if failed:
        return "failed", f"{len(failed)} of {len(results)}: {first}"
    if code:
        return "failed", f"ended with {code} after {len(results)} results"
    if not counts["passed"]:
        reason = next((result.get("reason", "") for result in results), "")
        return ("skipped", reason) if counts["skipped"] else ("failed", "nothing was tried")
    return "passed", ""


def _lines(file: Path) -> list[Record]:
    """What a part wrote; a last line that was cut off counts for nothing."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _hide_folders(text: str) -> str:
    """Leaves this machine's folders out of what is kept."""
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def read(file: Path) -> dict[str, Record]:
    """The results in a file, by part; none if there is no file."""
    if not file.exists():
        return {}
    return {record["part"]: record for record in json.loads(file.read_text(encoding="utf-8"))["results"]}


def write(file: Path, about: Record, records: dict[str, Record]) -> None:
    """Replaces the file in one step, so that a run that is cut short leaves a whole file."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps({**about, "results": list(records.values())}, indent=2) + "\n", encoding="utf-8")
    fresh.replace(file)
