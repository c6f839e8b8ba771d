"""`frpc examine` and `frpc compile`: what frpc would do with a model, and the program it makes of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from frpc.cli.classifier import ModelOption, load_classifier
from frpc.cli.session import GAPS, Bias, BiasOption, Dtype, DtypeOption, JsonOption, ThreadsOption, print_table, session

__all__ = ["compile_model", "examine"]

WeightsOption = Annotated[
    str | None, typer.Option(help="A safetensors file, or DEFAULT for torchvision's weights; untrained by default.")
]


def examine(
    model: ModelOption,
    weights: WeightsOption = None,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every operator of a model with its rule, or the reason it has none. Exit code 1 if an operator has no rule."""
    with session(as_json, threads) as current:
        import frpc

        with current.progress() as progress:
            progress.add_task(f"capturing {model}", total=None)
            classifier = load_classifier(model, weights, dtype, current)
            coverage = frpc.examine(classifier.model, (classifier.example(dtype),))
        current.console.print(coverage.heading, markup=False)
        head, *cells = coverage.cells()
        print_table(current.console, head, cells, words=head)
        rows = [{key: str(value) for key, value in asdict(row).items()} for row in coverage.rows]
        current.finish({"model": model, "ok": coverage.ok, "rows": rows})
        if not coverage.ok:
            raise typer.Exit(GAPS)


def compile_model(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder for the program, its table and its plan.")],
    weights: WeightsOption = None,
    bias: BiasOption = Bias.uniform,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the program that frpc emits for a model: code, table and plan, as text."""
    with session(as_json, threads) as current:
        import frpc
        from frpc.plots.outputs import OutputFolder

        folder = OutputFolder(out)
        with current.progress() as progress:
            progress.add_task(f"compiling {model}", total=None)
            classifier = load_classifier(model, weights, dtype, current)
            start = time.perf_counter()
            explainer = frpc.compile(classifier.model, (classifier.example(dtype),), bias=bias.value)
            seconds = time.perf_counter() - start
        folder.text(f"{model}.py", explainer.code)
        folder.text(f"{model}.table.txt", f"{explainer.table()}\n")
        folder.text(f"{model}.plan.txt", f"{explainer.plan}\n")
        files = [str(path) for path in folder.files]
        current.console.print(f"compiled {model} in {seconds:.1f} s")
        for file in files:
            current.console.print(f"  {file}", markup=False)
        refusals = [str(refusal) for refusal in explainer.refusals]
        current.finish({"model": model, "seconds": seconds, "files": files, "refusals": refusals})
