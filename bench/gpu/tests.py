"""Runs tests and writes one JSON line for each as it ends: ``python -m bench.gpu.tests FILE PYTEST_ARGUMENTS``."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Recorder", "run"]

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4  # processes at one time: most of the time goes into compiling kernels, on the CPU
REASON = 400  # characters


class Recorder:
    """A plugin of pytest's that writes results down."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called with each phase of a test; setup and teardown count where they fail, or skip."""
        if report.when == "call" or not report.passed:
            self.note(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report: Any) -> None:
        """Called with each file; one that cannot be read is a failure, one that says it cannot run here is skipped."""
        if not report.passed:
            self.note(report.nodeid, report.outcome, report)

    def note(self, what: str, status: str, report: Any) -> None:
        line = {"what": what, "status": status, "seconds": getattr(report, "duration", 0.0)}
        if status != "passed":
            line["reason"] = _reason(report)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _reason(report: Any) -> str:
    """The end of what a report says: pytest puts the error there."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ").replace(str(ROOT) + os.sep, "").strip()[-REASON:]


def run(file: Path, words: list[str]) -> int:
    """Runs pytest without this project's settings, which ask for plugins that a GPU's machine need not have."""
    apart = ["-n", str(WORKERS)] if find_spec("xdist") else []
    common = ["-c", os.devnull, "--rootdir", str(ROOT), "-q", "--tb=short", "-p", "no:cacheprovider"]
    return int(pytest.main([*common, *apart, *words], plugins=[Recorder(file)]))


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
