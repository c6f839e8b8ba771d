"""``python -m bench``: one command for each benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Nets = Annotated[str, typer.Option(help="thesis_mlp, thesis_alexnet, torchvision classifiers, with commas between them.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def _writable(file: Path | None) -> Path | None:
    """Raises an error if the file's folder is missing, before hours are spent on the benchmark."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}")
    return file


Json = Annotated[Path | None, typer.Option(help="Also write every number to this file.", callback=_writable)]
Base = Annotated[str, typer.Option(metavar="REV", help="Compare frpc of this commit with frpc as it is here, in turns.")]
Turns = Annotated[int, typer.Option(min=1, help="For --base: how often each is measured.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _common() -> None:
    pass


@app.command()
def attribution(
    nets: Nets = "resnet50,vgg16,squeezenet1_1",
    batch: Annotated[str, typer.Option(help="Samples a call, with commas between several sizes.")] = "1",
    targets: Annotated[str, typer.Option(help="Targets of each sample, K, with commas.")] = "1",
    device: Device = "cpu",
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds.")] = 7,
    peers: Annotated[bool, typer.Option(help="Also time torch.compile and Captum, for one target.")] = True,
    base: Base = "",
    turns: Turns = 3,
    json: Json = None,
) -> None:
    """Explaining one target, or K of one input: its price in forward passes of the model itself."""
    _compare(base, turns, json)
    from bench.attribution import run

    raise typer.Exit(run(_words(nets), _numbers(batch), _numbers(targets), device, threads, rounds, peers, json))


@app.command()
def methods(
    nets: Annotated[str, typer.Option(help="torchvision classifiers, with commas between them.")] = "resnet50,vgg16",
    only: Annotated[str, typer.Option(help="Methods, with commas; a choice of the cheap and the common ones if left out.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 1,
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 7,
    peers: Annotated[bool, typer.Option(help="Also time Captum and zennit.")] = True,
    base: Base = "",
    turns: Turns = 3,
    json: Json = None,
) -> None:
    """Cost of every method in forward passes of the model, compared with other libraries."""
    _compare(base, turns, json)
    from bench.methods import run

    raise typer.Exit(run(_words(nets), _words(only), batch, threads, rounds, peers, json))


@app.command()
def memory(
    nets: Nets = "resnet50,vgg16",
    batch: Annotated[str, typer.Option(help="Samples a call, with commas between several sizes.")] = "1,16",
    targets: Annotated[str, typer.Option(help="Targets of each sample, K, with commas.")] = "1",
    device: Device = "cpu",
    threads: Threads = 2,
    base: Base = "",
    turns: Turns = 3,
    json: Json = None,
) -> None:
    """Peak memory of one explanation, compared with autograd, Captum and the plan's prediction."""
    _compare(base, turns, json)
    from bench.memory import run

    raise typer.Exit(run(_words(nets), _numbers(batch), _numbers(targets), device, threads, json))


@app.command("compile")
def compile_(
    nets: Nets = "resnet50,vgg16",
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Compilations of each net.")] = 3,
    peers: Annotated[bool, typer.Option(help="Also time torch.compile of forward and backward pass.")] = True,
    base: Base = "",
    turns: Turns = 3,
    json: Json = None,
) -> None:
    """How long compiling takes, stage by stage, and how large programs are."""
    _compare(base, turns, json)
    from bench.compiling import run

    raise typer.Exit(run(_words(nets), threads, rounds, peers, json))


@app.command()
def kernels(
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 16,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds.")] = 7,
    only: Annotated[str, typer.Option(help="Kernels, with commas; all if left out.")] = "",
    json: Json = None,
) -> None:
    """Hand-written kernels on a CUDA device compared with ATen: time, and the fraction of the device's peak."""
    from bench.kernels import run

    raise typer.Exit(run(batch, rounds, _words(only), json))


@app.command()
def gpu(
    only: Annotated[str, typer.Option(help="Parts, with commas; all if left out.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Also parts that have a result.")] = False,
    misses: Annotated[bool, typer.Option("--misses", help="Also parts that failed.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="Time for all parts together.")] = 470.0,
    json: Annotated[Path | None, typer.Option(help="The results, and the state.", callback=_writable)] = None,
) -> None:
    """Everything that needs a CUDA device, in one command; re-run to resume."""
    from bench.gpu.run import RECORD, run

    raise typer.Exit(run(json or RECORD, _words(only), again, misses, seconds))


@app.command()
def neurons(
    net: Annotated[str, typer.Option(help="thesis_alexnet, or a torchvision classifier.")] = "thesis_alexnet",
    layers: Annotated[str, typer.Option(help="Module paths, with commas; conv1 to conv5 in thesis_alexnet.")] = "conv2",
    side: Annotated[int, typer.Option(min=8, help="Image side.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 1,
    sample: Annotated[int, typer.Option(min=1, help="Number of neurons or cells on which slow methods are timed.")] = 64,
    limit_gb: Annotated[float, typer.Option(help="Memory limit of the maps.")] = 4.0,
    growth: Annotated[bool, typer.Option("--growth", help="How cost grows with side, depth, channels.")] = False,
    sides: Annotated[str, typer.Option(help="Image sides for --growth.")] = "16,32,64",
    planner: Annotated[bool, typer.Option("--planner", help="Is the chosen strategy the best?")] = False,
    cases: Annotated[str, typer.Option(help="For --planner: net@side of the list, or any net@side:layer.")] = "",
    patience: Annotated[float, typer.Option(help="Seconds of weight up to which --planner runs a strategy.")] = 20.0,
    stream: Annotated[tuple[str, str] | None, typer.Option(help="NET LAYER: streams a layer.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="For --stream: only the first blocks.")] = None,
    check: Annotated[bool, typer.Option("--check", help="For --stream: every neuron's residual.")] = False,
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    json: Json = None,
) -> None:
    """All maps of a layer: cost compared with other methods, its growth, the planner's choices, streaming."""
    from bench import growth as growing
    from bench import neurons as compared
    from bench import planner as planning
    from bench import streaming

    limit = limit_gb * 1e9
    if stream is not None:
        code = streaming.run(*stream, side, batch, limit, rows, check, threads, json)
    elif growth:
        code = growing.run([int(s) for s in _words(sides)], limit, threads, rounds, json)
    elif planner:
        code = planning.run(_words(cases) or list(planning.CASES), patience, limit, threads, rounds, json)
    else:
        code = compared.run(net, _words(layers), side, batch, sample, limit, threads, rounds, json)
    raise typer.Exit(code)


@app.command()
def coverage(
    suite: Annotated[str, typer.Option(help="torchvision, timm, transformers or recurrent.")] = "torchvision",
    only: Annotated[str, typer.Option(help="Regular expression that models' names are searched for.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Also models that have a record.")] = False,
    misses: Annotated[bool, typer.Option("--misses", help="Also models whose record is not ok.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at one time, one thread each.")] = 2,
    limit: Annotated[float, typer.Option(help="Seconds for one model.")] = 600.0,
    memory_gb: Annotated[float, typer.Option(help="Memory for one model.")] = 10.0,
    peers: Annotated[bool, typer.Option("--peers", help="Try other libraries on the same models.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Only write docs/coverage.md from the records.")] = False,
) -> None:
    """Which models frpc covers, one process a model; finished models are skipped when it is run again."""
    from bench.coverage import page
    from bench.coverage.run import run

    if write:
        page.write()
        raise typer.Exit
    raise typer.Exit(run(suite, only, again, misses, jobs, limit, memory_gb, peers))


@app.command()
def export(
    nets: Annotated[str, typer.Option(help="torchvision classifiers, with commas between them.")] = "resnet50",
    side: Annotated[int, typer.Option(min=32, help="Image side.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 1,
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=5, help="Interleaved rounds.")] = 15,
    json: Json = None,
) -> None:
    """Explaining in ONNX Runtime: its price in ONNX Runtime's own forward passes of the same model."""
    from bench.export import run

    raise typer.Exit(run(_words(nets), side, batch, threads, rounds, json))


@app.command()
def files(
    nets: Annotated[str, typer.Option(help="torchvision classifiers, with commas between them.")] = "resnet50",
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Number of loads, each in a separate process.")] = 7,
    json: Json = None,
) -> None:
    """Program files: size relative to the weights, saving, loading in a new process, first answers."""
    from bench.files import run

    raise typer.Exit(run(_words(nets), threads, rounds, json))


@app.command()
def serving(
    weights: Annotated[Path, typer.Option(help="A safetensors file.")],
    net: Annotated[str, typer.Option(help="The torchvision classifier it is for.")] = "squeezenet1_0",
    rates: Annotated[str, typer.Option(help="Requests a second, with commas.")] = "2,4,8",
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 60.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the service.")] = 2,
    json: Json = None,
) -> None:
    """The serving examples under load: how long answers take."""
    from bench.serving import run

    raise typer.Exit(run(net, weights, [float(rate) for rate in _words(rates)], seconds, threads, json))


@app.command()
def page() -> None:
    """Writes docs/benchmarks.md and its figures from the records in bench/results."""
    from bench.page import write

    for file in write():
        typer.echo(file.name)


def _compare(base: str, turns: int, json: Path | None) -> None:
    """Where ``--base`` was given, runs this process's own command with both commits, and ends it."""
    if base:
        from bench.compare import run

        raise typer.Exit(run(base, sys.argv[1:], turns, json))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    found = [int(word) for word in _words(text)]
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r}: whole numbers from 1, with commas between them")
    return found


if __name__ == "__main__":
    app(prog_name="python -m bench")
