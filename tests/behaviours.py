"""What a model may do to the process that tries it. Nothing heavy is imported: every such process imports this file."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

__all__ = ["behave", "behave_in_suite"]


def behave(name: str) -> dict[str, Any]:
    """A model of each kind."""
    match name:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang" | "hang too":
            time.sleep(600)
        case "leave":
            print("something to say")
            sys.exit(3)
        case "raise":
            raise ValueError("a complaint")
    return {"status": "ok", "by": os.getpid()}


def behave_in_suite(suite: str, memory_gb: float, peers: bool, name: str) -> dict[str, Any]:
    """The same, called as a suite's models are."""
    return behave(name)
