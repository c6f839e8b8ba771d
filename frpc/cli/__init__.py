"""The `frpc` command."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended


def main() -> None:
    """Entry point of the console script."""
    try:
        from frpc.cli.commands import app

        try:
            app()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        sys.exit(1)
