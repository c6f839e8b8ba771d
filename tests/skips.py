"""Which tests may be skipped where everything in ``[test]`` is installed, and a list of those that were: hooks of pytest.

What a skipped test shows is not shown. In a clean environment only what cannot be there may be missing: a GPU, Ray, Lightning,
the data that lies beside the repository; and what is slow has a run of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["KINDS", "kind_of", "not_allowed", "reason_of", "summary"]

KINDS = {
    "GPU": re.compile(r"no CUDA device|there is a GPU|compute-sanitizer is not installed"),
    "Ray": re.compile(r"could not import 'ray'"),
    "Lightning": re.compile(r"could not import '(lightning|tensorboard)'"),
    "slow": re.compile(r"run with -m slow"),
    "shared data": re.compile(r"\.\./shared/|\b(is|are) not at .*shared"),
}


def kind_of(reason: str) -> str | None:
    """Returns which kind of skip a reason is, or None for one that is not allowed."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(reason)), None)


def reason_of(longrepr: object) -> str:
    """Returns the reason in a report's ``longrepr``: file, line and text of a skip."""
    text = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ").strip()


def not_allowed(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for every skip, name and reason, of a kind that is not allowed."""
    return [f"{name}: {reason}" for name, reason in skipped if kind_of(reason) is None]


def summary(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for every kind and reason, with how many tests it took."""
    counts = Counter((kind_of(reason) or "not allowed", reason) for _, reason in skipped)
    return [f"{kind}: {count} x {reason}" for (kind, reason), count in sorted(counts.items())]


# ---- hooks -------------------------------------------------------------------------------------------------------

_SKIPPED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail if a test is skipped for want of anything that [test] installs"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SKIPPED] = {}
    config.pluginmanager.register(_Skips(config.stash[_SKIPPED]))


class _Skips:
    """Hears of every skip, in this process or in a worker's."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found = found

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.found[report.nodeid] = reason_of(report.longrepr)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--strict-skips") and not_allowed(session.config.stash[_SKIPPED].items()):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[_SKIPPED].items()
    for line in summary(found):
        terminalreporter.write_line(f"skipped, {line}")
    if config.getoption("--strict-skips"):
        for line in not_allowed(found):
            terminalreporter.write_line(f"may not be skipped: {line}", red=True)
