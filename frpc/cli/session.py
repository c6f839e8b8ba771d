"""What all commands share: where they print, how they report errors, and their exit codes."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

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
    "print_pairs",
    "print_table",
    "prints_to_stderr",
    "session",
]

GAPS, BAD_INPUT, INTERNAL = 1, 2, 70  # 70 is EX_SOFTWARE of sysexits.h; typer itself uses 2 for a bad command line

PIPE_WIDTH = 10_000  # columns; wider than any table
GAP = 2  # between columns


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
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Number of CPU threads; by default PyTorch's choice.")]
BiasOption = Annotated[
    Bias,
    typer.Option(help="The constants' share of the output: spread evenly, over the receptive field, or returned separately."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the whole computation.")]


@dataclass(frozen=True)
class Session:
    """The output of one command.

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
    """Runs a command's body; turns exceptions into a message and an exit code.

    An :class:`FrpcError` is bad input (2), unless frpc found itself wrong; anything else is a defect (70) and shows
    its traceback. Under ``--json`` the error is the JSON object.
    """
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        yield Session(_console(as_json), as_json)
    except CompileError as error:
        _report(error, as_json, INTERNAL)
    except FrpcError as error:
        _report(error, as_json, BAD_INPUT)
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:  # the last place where a defect can still be reported with its exit code
        traceback.print_exc(file=sys.stderr)
        _report(error, as_json, INTERNAL)


def _console(quiet: bool) -> Console:
    """The console of a command. Lines have no end in a pipe, unless COLUMNS gives a width."""
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ()) -> None:
    """Prints a table without cutting any cell: long cells go on in the next line, after a whole word.

    On a terminal that is too narrow for the table, each row is printed as a block, one line for each cell.

    Args:
        head: the names of the columns.
        rows: one cell for each column.
        words: the columns that hold words, aligned left; the others hold numbers, aligned right.
    """
    widths = _widths(list(zip(head, *rows, strict=True)), console.width)
    if widths is None:
        for row in rows:
            print_pairs(console, [(name, cell) for name, cell in zip(head, row, strict=True) if cell])
            console.print()
        return
    table = Table(box=None, pad_edge=False)
    for name, width in zip(head, widths, strict=True):
        table.add_column(name, justify="left" if name in words else "right", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    _print_trimmed(console, table)


def _widths(columns: Sequence[Sequence[str]], space: int) -> list[int] | None:
    """How wide each column is where all may take ``space``, gaps included; None where some word would not fit into its column."""
    widths = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    wanted = [max(map(cell_len, column)) for column in columns]
    spare = space - GAP * (len(columns) - 1) - sum(widths)
    if spare < 0:
        return None
    by_need = sorted(range(len(columns)), key=lambda at: wanted[at] - widths[at])
    for left, at in zip(range(len(columns), 0, -1), by_need, strict=True):
        more = min(wanted[at] - widths[at], spare // left)
        widths[at] += more
        spare -= more
    return widths


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns; long values go on in the next line."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    _print_trimmed(console, table)


def _print_trimmed(console: Console, table: Table) -> None:
    """Prints a table; in a pipe without the spaces that fill up its last column."""
    if console.is_terminal:
        console.print(table, soft_wrap=False)
        return
    with console.capture() as captured:
        console.print(table, soft_wrap=False)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), markup=False)


@contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Keeps what libraries print (torch.hub announces downloads) out of a command's stdout."""
    with redirect_stdout(sys.stderr):
        yield


def _report(error: Exception, as_json: bool, code: int) -> None:
    kind = type(error).__name__
    if as_json:
        typer.echo(json.dumps({"error": {"kind": kind, "message": str(error), "exit_code": code}}, indent=2))
    defect = "\nThis is a bug in frpc; please report it with the lines above." if code == INTERNAL else ""
    typer.echo(f"{kind}: {error}{defect}", err=True)
    raise typer.Exit(code) from error
