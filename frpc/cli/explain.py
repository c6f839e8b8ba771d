"""`frpc explain`: explains photos; writes classes, maps, pictures and the conservation error of each map."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frpc.cli.classifier import Classifier, ModelOption, load_classifier
from frpc.cli.session import Bias, BiasOption, Dtype, DtypeOption, JsonOption, Session, ThreadsOption, session
from frpc.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from frpc.cli.methods import Asker
    from frpc.cli.record import Explained
    from frpc.explainer.explainer import Explainer
    from frpc.integrations.images import Picture
    from frpc.plots.outputs import OutputFolder

__all__ = ["explain"]


@dataclass(frozen=True)
class ExplainRequest:
    """The command line of `frpc explain`; see :func:`explain`."""

    model: str
    weights: str
    images: list[Path]
    target: str
    top: int
    cell: int
    check: bool
    bias: Bias
    dtype: Dtype
    method: str
    compare: str
    layer: str | None
    scales: str


@dataclass(frozen=True, eq=False)
class PreparedPhoto:
    """One picture, ready to be explained: its input ``[1, 3, H, W]`` and the classes to explain."""

    picture: Picture
    x: Tensor
    classes: list[int]


def explain(
    model: ModelOption,
    weights: Annotated[str, typer.Option(help="A safetensors file, or DEFAULT for torchvision's. Pickle files are not read.")],
    image: Annotated[list[Path], typer.Option(help="A picture; repeat for several.")],
    target: Annotated[
        str, typer.Option(help="auto (the predicted class), a class number or name; separate several with semicolons.")
    ] = "auto",
    top: Annotated[int, typer.Option(min=1, help="With --target auto: explain the N strongest classes.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for pictures, raw maps and JSON.")] = Path("frpc-explain"),
    cell: Annotated[int, typer.Option(min=1, help="Side of the squares summed in pictures; 1 shows each pixel.")] = 4,
    method: Annotated[str, typer.Option(help="Method: frp, lid-ig, epsilon-plus, grad-cam, ...; see docs/methods.md.")] = "frp",
    compare: Annotated[str, typer.Option(help="Comma-separated methods: also draw one sheet that shows all of them.")] = "",
    layer: Annotated[str | None, typer.Option(help="Layer for class activation maps; by default the last spatial layer.")] = None,
    scales: Annotated[
        str,
        typer.Option(
            help="Explain at these layers and add the resized maps: comma-separated module paths, or s54321 for VGG nets."
        ),
    ] = "",
    check: Annotated[bool, typer.Option("--check", help="Also report conservation layer by layer.")] = False,
    bias: BiasOption = Bias.uniform,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain what a trained torchvision classifier sees in photos.

    For each photo: a picture of each map, the unrounded maps (.npz), and a JSON file with the strongest classes, the
    explained ones, how exactly each map sums to its logit, and timings. --compare adds a sheet with one column per method.
    """
    request = ExplainRequest(model, weights, image, target, top, cell, check, bias, dtype, method, compare, layer, scales)
    with session(as_json, threads) as current:
        from frpc.cli.record import show
        from frpc.plots.outputs import OutputFolder

        results = _run(request, OutputFolder(out), current)
        for result in results:
            show(current.console, result)
        current.finish({"images": results})


def _run(request: ExplainRequest, folder: OutputFolder, current: Session) -> list[dict[str, Any]]:
    from frpc.cli import record
    from frpc.cli.methods import Asker, check_methods

    method = check_methods([request.method])[0]
    compared = check_methods(request.compare.split(",")) if request.compare else []
    if request.check and method != "frp":
        raise OptionError(f"--check only works with --method frp; maps of {method} need not add up in every layer")
    results = []
    with current.progress() as progress:
        task = progress.add_task("reading", total=len(request.images) + 2)
        start = time.perf_counter()
        classifier, questions = _read(request, current)
        read = time.perf_counter()
        progress.update(task, advance=1, description="compiling")
        asker = Asker(classifier.model, request.bias.value, request.layer, request.scales)
        asker(method, questions[0].x, questions[0].classes)
        seconds = {"read": read - start, "compile": time.perf_counter() - read}
        progress.update(task, advance=1)
        for stem, question in zip(record.stems(request.images), questions, strict=True):
            progress.update(task, description=f"explaining {question.picture.path.name}")
            explained = _answer(asker, method, question, request.bias)
            entry = _settings(request, classifier, question) | record.describe(explained)
            entry["seconds"] = seconds | {"explain": explained.seconds}
            if request.check:
                entry["layers"] = _check(asker.explainer("frp", question.x), question)
            files = [_compare(asker, compared, question, folder, stem, request.cell)] if compared else []
            results.append(record.write(folder, stem, question.picture, explained, entry, request.cell, files))
            progress.update(task, advance=1)
    return results


def _compare(asker: Asker, methods: list[str], question: PreparedPhoto, folder: OutputFolder, stem: str, cell: int) -> Path:
    """One sheet: a row for each explained class, a column for each method."""
    from frpc.integrations.torchvision import class_names
    from frpc.plots.comparison import comparison

    said = {method: asker(method, question.x, question.classes) for method in methods}
    names = class_names(len(next(iter(said.values())).output))
    rows = {
        names[index]: {method: found.relevance[k].cpu() for method, found in said.items()}
        for k, index in enumerate(question.classes)
    }
    return folder.figure(f"{stem}.compare.png", comparison(question.picture.crop, rows, cell=cell))


def _read(request: ExplainRequest, current: Session) -> tuple[Classifier, list[PreparedPhoto]]:
    """Reads and checks everything first, so that bad input is found before compiling and leaves no files."""
    import torch

    from frpc.integrations.images import prepare

    if request.target != "auto" and request.top > 1:
        raise OptionError(
            f"--top {request.top} only works with --target auto; --target {request.target} already names the class to explain"
        )
    classifier = load_classifier(request.model, request.weights, request.dtype, current)
    pictures = [prepare(path, classifier.recipe) for path in request.images]
    questions = []
    with torch.inference_mode():
        for picture in pictures:
            x = picture.pixels.to(getattr(torch, request.dtype))
            questions.append(PreparedPhoto(picture, x, _choose(classifier.model(x), request.target, request.top)))
    return classifier, questions


def _choose(logits: Tensor, target: str, top: int) -> list[int]:
    from frpc.integrations.torchvision import class_index, class_names

    if target != "auto":
        return [class_index(name.strip(), class_names(logits.shape[1])) for name in target.split(";")]
    if top > logits.shape[1]:
        raise OptionError(f"--top {top}: the model has {logits.shape[1]} classes")
    best: list[int] = logits[0].topk(top).indices.tolist()
    return best


def _answer(asker: Asker, method: str, question: PreparedPhoto, bias: Bias) -> Explained:
    """Runs one method; maps of the standard method are compared with the logits they explain."""
    from frpc.cli.record import Explained

    said = asker(method, question.x, question.classes)
    constants = None if said.left_out is None else said.left_out.double()
    sums = said.relevance.double().flatten(1).sum(1)
    errors = None
    if method == "frp" and constants is not None:
        sums = sums + (constants if bias is Bias.separate else 0)
        magnitude = said.relevance.double().abs().flatten(1).sum(1)
        errors = (sums - said.output[question.classes].double()).abs() / magnitude.clamp_min(1e-300)
    return Explained(
        method,
        said.output,
        question.classes,
        said.relevance,
        None if constants is None else constants.tolist(),
        sums.tolist(),
        None if errors is None else errors.tolist(),
        said.seconds,
    )


def _check(explainer: Explainer, question: PreparedPhoto) -> list[dict[str, Any]]:
    """Conservation of every layer for the first explained class."""
    import frpc

    return [asdict(row) for row in frpc.check(explainer, question.x, target=question.classes[0]).rows]


def _settings(request: ExplainRequest, classifier: Classifier, question: PreparedPhoto) -> dict[str, Any]:
    return {
        "image": str(question.picture.path),
        "model": request.model,
        "weights": request.weights,
        "preprocessing": asdict(classifier.recipe),
        "method": request.method,
        "bias": request.bias.value,
        "dtype": request.dtype.value,
    }
