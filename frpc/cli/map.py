"""`frpc map`: explains a folder of pictures or Parquet files, in shards, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from frpc.cli.classifier import ModelOption, load_classifier
from frpc.cli.session import Bias, BiasOption, Dtype, DtypeOption, JsonOption, Session, ThreadsOption, session
from frpc.errors import OptionError, WeightsError

if TYPE_CHECKING:
    from frpc.jobs import Classifier, Summary, Task

__all__ = ["FAILED_SAMPLES", "map_data"]

FAILED_SAMPLES = 3
SHOWN = 10


class EngineChoice(StrEnum):
    """Where shards are computed."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True)
class MapRequest:
    """The command line of `frpc map`; see :func:`map_data`."""

    model: str
    weights: str
    data: Path
    out: Path
    target: str
    column: str
    label: str | None
    method: str
    bias: Bias
    batch_size: int
    shard_size: int
    dtype: Dtype
    png: bool
    engine: EngineChoice
    workers: int


@dataclass(frozen=True)
class Load:
    """Makes the classifier, in whichever process."""

    model: str
    weights: str
    dtype: Dtype

    def __call__(self) -> Classifier:
        found = load_classifier(self.model, self.weights, self.dtype, Session(Console(quiet=True), as_json=True))
        return found.model, found.recipe


def map_data(
    model: ModelOption,
    weights: Annotated[str, typer.Option(help="A safetensors file, or DEFAULT for torchvision's. Pickle files are not read.")],
    data: Annotated[Path, typer.Option(help="A folder of pictures, a Parquet file, or a folder of Parquet files.")],
    out: Annotated[Path, typer.Option(help="Folder for the maps. Re-run the same command to resume.")],
    target: Annotated[str, typer.Option(help="top (the predicted class of each picture), a class number or name.")] = "top",
    label: Annotated[str | None, typer.Option(help="Instead of --target: the Parquet column with each picture's class.")] = None,
    column: Annotated[str, typer.Option(help="The Parquet column with the pictures.")] = "image",
    method: Annotated[str, typer.Option(help="Method: frp, lid-ig, epsilon-plus, ...; see docs/methods.md.")] = "frp",
    bias: BiasOption = Bias.uniform,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of pictures in a batch.")] = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures per file; an interrupted run loses at most this many.")] = 64,
    dtype: DtypeOption = Dtype.float32,
    png: Annotated[bool, typer.Option("--png", help="Also draw each map over its picture.")] = False,
    engine: Annotated[EngineChoice, typer.Option(help="local: this process; ray: a Ray cluster.")] = EngineChoice.local,
    workers: Annotated[int, typer.Option(min=1, help="With --engine ray: number of worker processes.")] = 2,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a data set in batches; re-run to resume. Exit code 3: done, but some samples failed (see index.jsonl)."""
    with session(as_json, threads) as current:
        request = MapRequest(
            model, weights, data, out, target, column, label, method, bias, batch_size, shard_size, dtype, png, engine, workers
        )
        start = time.perf_counter()
        summary = _run(request, current)
        _show(current.console, request, summary, time.perf_counter() - start)
        current.finish(_result(request, summary))
        if summary.failures:
            raise typer.Exit(FAILED_SAMPLES)


def _run(request: MapRequest, current: Session) -> Summary:
    from frpc import jobs

    task = _task(request)
    with current.progress() as progress:
        bar = progress.add_task("explaining", total=len(task.samples))
        return jobs.run(
            task,
            _model(request),
            request.engine.value,
            request.workers,
            begin=lambda resumed: progress.update(bar, completed=resumed),
            advance=lambda done, failed: progress.update(bar, advance=done + failed),
        )


def _task(request: MapRequest) -> Task:
    """Reads the data's table of contents and checks what can be checked before a model is loaded."""
    import torch

    from frpc import jobs
    from frpc.rules.sets.methods import method_named

    if request.label is not None and request.target != "top":
        raise OptionError(f"--target {request.target} and --label {request.label} were both given; give one of them")
    if request.out.resolve().is_relative_to(request.data.resolve()):
        raise OptionError(
            f"--out {request.out} is inside --data {request.data}, so results would be read as data; choose another folder"
        )
    samples = jobs.open_samples(request.data, request.column, request.label)
    return jobs.Task(
        samples=samples,
        load=Load(request.model, request.weights, request.dtype),
        store=jobs.Store(request.out, len(samples), request.shard_size),
        method=method_named(request.method).name,
        bias=request.bias.value,
        target="label" if request.label is not None else request.target,
        batch_size=request.batch_size,
        dtype=getattr(torch, request.dtype.value),
        pictures=request.png,
    )


def _model(request: MapRequest) -> dict[str, Any]:
    """What the manifest says of the model: its name, its preprocessing, and a digest of its weights."""
    from frpc.integrations import torchvision as pretrained

    default = request.weights == "DEFAULT"
    try:
        digest = "DEFAULT" if default else _sha256(Path(request.weights))
    except OSError as error:
        raise WeightsError(f"cannot read {request.weights}: {error.strerror or error}") from error
    pretrained.build_model(request.model)  # a wrong name is said now
    return {
        "name": request.model,
        "weights": digest,
        "preprocessing": asdict(pretrained.recipe(request.model, default=default)),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _result(request: MapRequest, summary: Summary) -> dict[str, Any]:
    return {
        "out": str(request.out),
        "samples": summary.count,
        "resumed": summary.resumed,
        "failed": [asdict(failure) for failure in summary.failures],
        "damaged": list(summary.damaged),
    }


def _show(console: Console, request: MapRequest, summary: Summary, seconds: float) -> None:
    failed = len(summary.failures)
    before = f", {summary.resumed} of them before" if summary.resumed else ""
    console.print(f"{summary.count - failed} of {summary.count} samples explained{before}, in {seconds:.1f} s", markup=False)
    for problem in summary.damaged:
        console.print(f"done again: {problem}", markup=False)
    for failure in summary.failures[:SHOWN]:
        console.print(f"failed: {failure.name}: {failure.reason}", markup=False)
    if failed > SHOWN:
        console.print(f"failed: {failed - SHOWN} more, in index.jsonl", markup=False)
    console.print(f"  {request.out / 'index.jsonl'}\n  {request.out / 'shards'}", markup=False)
