"""`frpc export`: a classifier's explainer as a file for another runtime, compared with the explainer before the command ends."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frpc.cli.classifier import Classifier, ModelOption, load_classifier
from frpc.cli.session import Bias, BiasOption, Dtype, DtypeOption, JsonOption, ThreadsOption, print_pairs, session
from frpc.errors import OptionError, OutputFolderError

if TYPE_CHECKING:
    from frpc.explainer.explainer import Explainer
    from frpc.export import Signature

__all__ = ["export"]

GRAD_CAM = "grad-cam"  # the one method that is no rule set


class Target(StrEnum):
    """The kind of file."""

    onnx = "onnx"
    aoti = "aoti"
    torch = "torch"


class TargetChoice(StrEnum):
    """What is explained."""

    one = "one"
    several = "several"
    seed = "seed"
    top = "top"


@dataclass(frozen=True)
class ExportRequest:
    """The command line of `frpc export`; see :func:`export`."""

    to: Target
    out: Path
    targets: TargetChoice
    method: str
    bias: Bias
    layer: str


def export(
    model: ModelOption,
    weights: Annotated[str, typer.Option(help="A safetensors file, or DEFAULT for torchvision's. Pickle files are not read.")],
    to: Annotated[Target, typer.Option(help="onnx (ONNX Runtime and others), aoti (AOTInductor), or torch (torch.export).")],
    out: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for the other two formats.")],
    targets: Annotated[
        TargetChoice,
        typer.Option(
            help="What the file takes: one class per sample, several, a seed (weights of the output), or nothing (the top class)."
        ),
    ] = TargetChoice.one,
    method: Annotated[
        str, typer.Option(help="Method: frp, lid-ig, epsilon-plus, ..., or grad-cam; see docs/methods.md.")
    ] = "frp",
    layer: Annotated[str, typer.Option(help="With --method grad-cam: the layer, as a module path.")] = "",
    bias: BiasOption = Bias.uniform,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a torchvision classifier with its explanations as one file for another runtime, and compare the two.

    The file takes pictures, any number at a time, and the classes to explain, and gives the logits, the maps and the constants'
    share of them. Opening a .pt2 file can run code, so open only your own.
    """
    with session(as_json, threads) as current:
        import frpc.export

        request = ExportRequest(to, out, targets, method.strip().lower(), bias, layer)
        _check(request)
        with current.progress() as progress:
            task = progress.add_task(f"compiling {model}", total=3)
            classifier = load_classifier(model, weights, dtype, current)
            explainer = _compile(classifier, dtype, request)
            progress.update(task, advance=1, description=f"writing {out.name}")
            start = time.perf_counter()
            signature = _write(explainer, request)
            seconds = time.perf_counter() - start
            progress.update(task, advance=1, description="comparing")
            report = frpc.export.verify(out, explainer, bound=1e-5 if dtype is Dtype.float32 else 1e-10)
            progress.update(task, advance=1)
        size = out.stat().st_size
        current.console.print(f"{out}: {size / 1e6:.1f} MB in {seconds:.1f} s", markup=False)
        current.console.print(f"takes {', '.join(signature.names)}; gives {', '.join(signature.outputs)}", markup=False)
        current.console.print(report.heading, markup=False)
        print_pairs(current.console, report.cells())
        for remark in report.remarks:
            current.console.print(remark, markup=False)
        results = {row.name: {"error": _known(row.error), "edge": _known(row.edge)} for row in report.rows}
        verified = {"samples": report.samples, "edges": report.edges, "bound": report.bound, "results": results}
        verified["conservation"] = report.conservation
        current.finish(
            {"file": str(out), "bytes": size, "seconds": seconds, "signature": asdict(signature), "verified": verified}
        )


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def _check(request: ExportRequest) -> None:
    suffix = ".onnx" if request.to is Target.onnx else ".pt2"
    if request.out.suffix != suffix:
        raise OptionError(f"--out {request.out}: with --to {request.to.value} the file name must end in {suffix}")
    if not request.out.parent.is_dir():
        raise OutputFolderError(f"--out {request.out}: the folder {request.out.parent} does not exist")
    if (request.method == GRAD_CAM) != bool(request.layer):
        raise OptionError("use --layer and --method grad-cam together: neither works without the other")


def _compile(classifier: Classifier, dtype: Dtype, request: ExportRequest) -> Explainer:
    import frpc

    example = (classifier.example(dtype),)
    if request.method == GRAD_CAM:
        return frpc.compile(classifier.model, example, rule=frpc.rules.Gradient(times_input=False))
    if request.method == "frp":
        return frpc.compile(classifier.model, example, bias=request.bias)
    return frpc.compile(classifier.model, example, method=request.method)


def _write(explainer: Explainer, request: ExportRequest) -> Signature:
    from frpc.export import aoti, onnx, torch_export

    write = {Target.onnx: onnx, Target.aoti: aoti, Target.torch: torch_export}[request.to]
    return write(explainer, request.out, targets=request.targets.value, grad_cam=request.layer)
