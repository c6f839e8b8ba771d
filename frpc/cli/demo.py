"""`frpc demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from frpc.cli.session import JsonOption, ThreadsOption, session

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet.")] = Path("frpc-demo"),
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain ten handwritten digits with a bundled net. Needs no network."""
    with session(as_json, threads) as current:
        from frpc.assets.digits import run

        result = run(out, current.console)
        _print(current.console, result)
        current.finish(result)


def _print(console: Console, result: dict[str, Any]) -> None:
    net = result["net"]
    console.print(f"{net['model']}, {net['parameters']:,} parameters, {100 * net['test_accuracy']:.2f} % of 10,000 test digits\n")
    table = Table("digit", "class", "logit", "map sum", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for digit in result["digits"]:
        for rank, (name, logit, total) in enumerate(zip(digit["classes"], digit["logits"], digit["sums"], strict=True)):
            role = ("predicted", "runner-up")[rank]
            first = str(digit["label"]) if rank == 0 else ""
            table.add_row(first, f"{name} {role}", f"{logit:+.5f}", f"{total:+.5f}")
    console.print(table)
    console.print(f"\nlargest |sum V - logit| / sum|V|: {result['conservation_error']:.1e}")
    console.print(f"look at {result['files'][0]}")
