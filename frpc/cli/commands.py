"""The commands of `frpc`. Each imports torch only when it runs, so that ``frpc --help`` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from frpc.cli.doctor import demo, doctor
from frpc.cli.explain import explain
from frpc.cli.explain_text import explain_text
from frpc.cli.export import export
from frpc.cli.inspect import compile_model, examine
from frpc.cli.map import map_data
from frpc.cli.neurons import neurons

__all__ = ["app"]

app = typer.Typer(
    name="frpc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile a PyTorch model into a program that returns its output and an exactly conserving relevance map.\n\n"
    "Exit codes: 0 success, 1 the examined model has operators without a rule, 2 bad input, 3 some samples of a data set failed, "
    "70 a bug in frpc.",
)
app.command()(demo)
app.command()(explain)
app.command("explain-text")(explain_text)
app.command()(neurons)
app.command("map")(map_data)
app.command()(examine)
app.command("compile")(compile_model)
app.command()(export)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from frpc import __version__

        typer.echo(f"frpc {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
