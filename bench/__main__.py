"""``python -m bench``: one command for each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _common() -> None:
    pass


@app.command()
def attribution(
    nets: Annotated[str, typer.Option(help="torchvision classifiers, with commas between them.")] = "resnet50,vgg16",
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write every number to this file.")] = None,
) -> None:
    """Explaining one target: its price in forward passes of the model itself."""
    from bench.attribution import run

    raise typer.Exit(run([name.strip() for name in nets.split(",") if name.strip()], batch, threads, rounds, json))


if __name__ == "__main__":
    app(prog_name="python -m bench")
