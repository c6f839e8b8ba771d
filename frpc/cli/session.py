"""What every command shares: where it prints, how it reports errors, and its exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from frpc.errors import CompileError, FrpcError

__all__ = [
    "BAD_INPUT",
    "GAPS",
    "INTERNAL",
    "Bias",
    "BiasOption",
    "Dtype",
    "DtypeOption",
    "JsonOption",
    "Order",
    "Session",
    "ThreadsOption",
    "prints_to_stderr",
    "session",
]

GAPS, BAD_INPUT, INTERNAL = 1, 2, 70  # 70 is EX_SOFTWARE of sysexits.h; typer itself uses 2 for a bad command line


class Dtype(StrEnum):
    """Precision of the whole computation."""

    float32 = "float32"
    float64 = "float64"


class Bias(StrEnum):
    """Where the share of the constants goes."""

    uniform = "uniform"
    receptive_field = "receptive_field"
    separate = "separate"


class Order(StrEnum):
    """What channels are sorted by."""

    relevance = "relevance"
    activation = "activation"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice if left out.")]
BiasOption = Annotated[
    Bias,
    typer.Option(help="The constants' share of the output: spread evenly, over the receptive field, or returned beside the map."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the whole computation.")]


@dataclass(frozen=True)
class Session:
    """One command's way to speak.

    Attributes:
        console: text for people on stdout; silent under ``--json``.
        as_json: whether stdout gets one JSON object and nothing else.
    """

    console: Console
    as_json: bool

    def finish(self, result: Mapping[str, Any]) -> None:
        """Prints the command's result, if it is wanted as JSON."""
        if self.as_json:
            typer.echo(json.dumps(result, indent=2, allow_nan=False))

    def progress(self) -> Progress:
        """A progress bar on stderr, which leaves with its work; none where nobody watches."""
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        silent = self.as_json or not console.is_terminal
        return Progress(*columns, console=console, transient=True, disable=silent)


@contextmanager
def session(as_json: bool, threads: int | None = None) -> Iterator[Session]:
    """Runs a command's body; turns what it raises into a message and an exit code.

    An :class:`FrpcError` is bad input (2), unless frpc found itself wrong; anything else is a defect (70) and shows
    its traceback. Under ``--json`` the error is the JSON object.
    """
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        yield Session(Console(quiet=as_json, highlight=False, soft_wrap=True), as_json)
    except CompileError as error:
        _report(error, as_json, INTERNAL)
    except FrpcError as error:
        _report(error, as_json, BAD_INPUT)
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:  # the last place where a defect can still be reported with its exit code
        traceback.print_exc(file=sys.stderr)
        _report(error, as_json, INTERNAL)


@contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Keeps what libraries print (torch.hub announces downloads) out of a command's stdout."""
    with redirect_stdout(sys.stderr):
        yield


def _report(error: Exception, as_json: bool, code: int) -> None:
    kind = type(error).__name__
    if as_json:
        typer.echo(json.dumps({"error": {"kind": kind, "message": str(error), "exit_code": code}}, indent=2))
    defect = "\nThis is a defect of frpc; please report it with the lines above." if code == INTERNAL else ""
    typer.echo(f"{kind}: {error}{defect}", err=True)
    raise typer.Exit(code) from error
