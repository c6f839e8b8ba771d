"""Runs scripts of the tests in Triton's interpreter, which is chosen by an environment variable before Triton is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

from places import TESTS

__all__ = ["in_interpreter"]


def in_interpreter(*arguments: str) -> str:
    """Runs a script of the tests under the interpreter and returns what it printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}"
    return done.stdout
