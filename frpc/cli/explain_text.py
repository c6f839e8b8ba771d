"""`frpc explain-text`: explains texts as coloured words, an HTML page and sums that add up to the output."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from frpc.cli.session import Bias, BiasOption, Dtype, DtypeOption, JsonOption, Session, ThreadsOption, prints_to_stderr, session
from frpc.errors import OptionError

if TYPE_CHECKING:
    from frpc.plots.outputs import OutputFolder
    from frpc.text import TextExplanation
    from frpc.text.directory import TextModel
    from frpc.text.sheet import Word

__all__ = ["explain_text"]


@dataclass(frozen=True)
class ExplainTextRequest:
    """The command line of `frpc explain-text`; see :func:`explain_text`."""

    model: Path
    texts: list[str]
    target: str
    source: str | None
    device: str
    max_length: int | None
    pieces: bool
    special: bool
    bias: Bias
    dtype: Dtype


def explain_text(
    model: Annotated[Path, typer.Option(help="Folder of a transformers model: config.json, tokenizer, model.safetensors.")],
    text: Annotated[list[str], typer.Option(help="A text; repeat for several.")],
    target: Annotated[
        str,
        typer.Option(help="auto (the strongest class, or the likeliest next token), or the number or name of a class or token."),
    ] = "auto",
    out: Annotated[
        Path, typer.Option(help="An HTML file, or a folder for explanation.html; a JSON file is written next to it.")
    ] = Path("frpc-text"),
    source: Annotated[
        str | None, typer.Option(help="Module whose output gets the relevance; by default the token embedding.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    max_length: Annotated[int | None, typer.Option(min=1, help="Cut texts after this many tokens.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show single tokens instead of merging them into words.")] = False,
    special: Annotated[bool, typer.Option(help="Show tokens that the tokenizer added, e.g. [CLS].")] = True,
    bias: BiasOption = Bias.uniform,
    dtype: DtypeOption = Dtype.float32,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain which words decide the output of a transformers classifier or language model.

    For each text: its words in colour, red for words that raise the output and blue for words that lower it, and the sum
    that adds up to the output. All texts go into one HTML page and one JSON file. Nothing is downloaded.
    """
    request = ExplainTextRequest(model, text, target, source, device, max_length, pieces, special, bias, dtype)
    with session(as_json, threads) as current:
        from frpc.plots.outputs import OutputFolder

        if not all(one.strip() for one in text):
            raise OptionError("--text is empty")
        folder, stem = (OutputFolder(out.parent), out.stem) if out.suffix == ".html" else (OutputFolder(out), "explanation")
        found, record = _run(request, current)
        record = _write(folder, stem, found, record, pieces)
        if not as_json:
            _show(current.console, found, record, pieces)
        current.finish(record)


def _run(request: ExplainTextRequest, current: Session) -> tuple[list[TextExplanation], dict[str, Any]]:
    import torch

    from frpc.text import directory, explain

    with current.progress() as progress, prints_to_stderr():
        task = progress.add_task("loading", total=2)
        start = time.perf_counter()
        loaded = _quietly(lambda: directory.load(request.model, dtype=getattr(torch, request.dtype), device=request.device))
        read = time.perf_counter()
        progress.update(task, advance=1, description="compiling and explaining")
        options: dict[str, Any] = {"bias": request.bias.value} | ({"source": request.source} if request.source else {})
        found = explain(
            loaded.model,
            loaded.tokenizer,
            request.texts,
            target=request.target,
            max_length=request.max_length,
            special=request.special,
            **options,
        )
        seconds = {"load": read - start, "compile and explain": time.perf_counter() - read}
        progress.update(task, advance=1)
    return found, _settings(request, loaded) | {"texts": [_describe(one) for one in found], "seconds": seconds}


def _quietly(load: Any) -> TextModel:
    """Loads without the library's progress bars and warnings; errors are still shown."""
    from frpc.text.directory import library

    logging = library().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _settings(request: ExplainTextRequest, loaded: TextModel) -> dict[str, Any]:
    return {
        "model": str(request.model),
        "architecture": loaded.architecture,
        "source": request.source or "token embedding",
        "bias": request.bias.value,
        "dtype": request.dtype.value,
        "device": request.device,
    }


def _describe(found: TextExplanation) -> dict[str, Any]:
    """One text's numbers, ready for JSON; nothing rounded."""
    return {
        "text": found.reading.text,
        "target": found.target,
        "label": found.label,
        "output": found.output,
        "sum": found.total,
        "constants": found.bias,
        "padding": found.padding,
        "conservation_error": found.error,
        "tokens_cut_off": found.reading.cut,
        "words": [_word(word) for word in found.words],
        "tokens": [_word(token) for token in found.tokens],
    }


def _word(word: Word) -> dict[str, Any]:
    return {"text": word.text, "relevance": word.relevance, "positions": list(word.tokens), "special": word.special}


def _write(folder: OutputFolder, stem: str, found: list[TextExplanation], record: dict[str, Any], pieces: bool) -> dict[str, Any]:
    """Writes the page and the record; returns the record with the names of the files."""
    from frpc.text import page

    title = f"{Path(record['model']).resolve().name}: explained texts"
    files = [folder.text(f"{stem}.html", page(found, title, pieces=pieces)), folder.path / f"{stem}.json"]
    record = record | {"files": [str(file) for file in files]}
    folder.json(f"{stem}.json", record)
    return record


def _show(console: Console, found: list[TextExplanation], record: dict[str, Any], pieces: bool) -> None:
    """Prints every text and the files."""
    for one in found:
        console.print(one.to_rich(pieces), soft_wrap=False)
        console.print()
    seconds = record["seconds"]
    console.print(f"loaded in {seconds['load']:.1f} s, compiled and explained in {seconds['compile and explain']:.1f} s")
    for file in record["files"]:
        console.print(f"  {file}", markup=False)
