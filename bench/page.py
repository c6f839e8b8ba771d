"""Makes docs/benchmarks.md and its figures from the records in bench/results. The page shows only what was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import sections
from bench.plots import PLOTS, draw

__all__ = ["PAGE", "current", "read", "render", "write"]

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "bench" / "results", ROOT / "docs" / "figures"
WIDTH = 126  # of a line of text

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: the suite's name; its records are ``KEY*-cpu.json`` (``-cuda.json`` for a GPU).
        title, text: heading, and what the table means.
        command: makes a record.
        body: the table, from the records.
        gpu: ``also`` where the body takes records of a GPU beside those of the CPU, ``only`` where there are no others.
    """

    key: str
    title: str
    text: str
    command: str
    body: Callable[..., str]
    gpu: str = ""


HEAD = """\
# Benchmarks

<!-- made by `python -m bench page` from bench/results/*.json; edit neither, run the command again -->

This page shows how much time and memory frpc needs, compared with the model itself and with other libraries. Each table gives
medians of interleaved rounds: in a round each method runs once, in rotating order, and ratios are taken within the round. The
unit **forwards** is the model's own eager forward pass under `inference_mode`, in the same rounds. Nets have random weights. Maps
are checked before anything is timed: the output must be the model's, the map must sum to it, and if a net is piecewise linear,
the map must be input times gradient plus the constants' share. An empty cell was not measured. `python -m bench SUITE --base REV`
runs `attribution`, `methods`, `memory` or `compile` alternately with frpc of another commit and compares the two. """

SECTIONS = (
    Section(
        "attribution",
        "One target, and K targets",
        "The cost of explaining, in forwards, with all targets of a sample in one call. *Over its own forward* is the same "
        "time divided by frpc's own forward pass: its program without the backward part. The other columns, also in "
        "forwards, are input times gradient, the cheapest map of other libraries: by autograd, with one backward pass per "
        "target; batched, with all targets in one (`is_grads_batched`); with forward and backward pass compiled by "
        "`torch.compile`; by Captum. The last two are timed for one target only.",
        "attribution --nets resnet50,vgg16,squeezenet1_1 --targets 1,5,10",
        sections.attribution,
        "also",
    ),
    Section(
        "methods",
        "Methods",
        "The cost of every method in forwards, with quartiles. Methods of other libraries start with the library's name.",
        "methods",
        sections.methods,
    ),
    Section(
        "memory",
        "Memory",
        "The peak number of bytes in tensors during a call, without parameters and input, as PyTorch's allocator counts "
        "them. *Predicted* is `explainer.plan.peak_bytes_for(batch, columns)` divided by the measured value; the target is "
        "within 20 %.",
        "memory",
        sections.memory,
        "also",
    ),
    Section(
        "compile",
        "Compiling",
        "Seconds for each stage of `frpc.compile`, for all of it including the comparison with the model, for the first "
        "call after it, and for the first forward and backward pass through `torch.compile` with empty caches. *Nodes* is "
        "the number of nodes that carry relevance, *calls* the number of operator calls in the program.",
        "compile",
        sections.compilation,
    ),
    Section(
        "kernels",
        "Kernels",
        "Hand-written kernels on a GPU compared with the ATen operators they replace, and as a fraction of what that GPU "
        "reaches with a large matrix product and a large copy.",
        "kernels",
        sections.kernels,
        "only",
    ),
    Section(
        "gpu",
        "A GPU in one command",
        "`python -m bench gpu` runs, in under 8 minutes, everything that needs a CUDA device: kernels compared with their "
        "references and with ATen, compute-sanitizer if it is installed, CUDA graphs on several streams, ResNet-50, VGG-16, "
        "ViT-B/16 and BERT compared with autograd and Captum, bfloat16, layer maps of VGG-16's conv5_3. Each part is a "
        "separate process with a time limit, and its result is written when it ends. Re-run the command to resume; "
        "`--misses` runs failed parts again, `--only PART,PART` runs selected parts. Without a CUDA device the command says "
        "so and exits with status 2.",
        "gpu",
        sections.gpu,
        "only",
    ),
    Section(
        "neurons",
        "Every neuron of a layer",
        "All maps of a layer in one call, and how many times faster this is than other methods that compute all of them. "
        "Methods that are too slow to run completely are extrapolated from a sample of neurons or cells.",
        "neurons",
        sections.neurons,
    ),
    Section(
        "growth",
        "How that grows",
        "All maps of a layer of the thesis's AlexNet. Each part of the table varies one quantity: the image's side (all "
        "maps of conv2), the depth of the layer, the channels of all layers. *Dense* is the thesis's algorithm, "
        "extrapolated from 16 cells.",
        "neurons --growth",
        sections.growth,
    ),
    Section(
        "planner",
        "The planner's choices",
        "Every strategy that applies was run, unless it is too expensive. Target: the planner's choice takes at most 1.5 times "
        "as long as the best.",
        "neurons --planner",
        sections.planner,
    ),
    Section(
        "stream",
        "Layers that do not fit in memory",
        "The maps are computed in blocks. *Peak memory* is that of the whole process, including the model; *before* is the "
        "memory when streaming began.",
        "neurons --stream vgg16 conv3_3 --side 224",
        sections.streams,
    ),
    Section(
        "export",
        "In ONNX Runtime",
        "Exported explainers. Here a forward is one pass of the same model in ONNX Runtime.",
        "export",
        sections.export,
    ),
    Section(
        "files",
        "Program files",
        "File size, the time to load a file, and the time of the first answers in a process that has only the file.",
        "files",
        sections.files,
    ),
    Section(
        "serving",
        "Serving",
        "The two serving examples with requests at random times. Latency is measured from the moment a request was due.",
        "serving WEIGHTS",
        sections.serving,
    ),
)


def read(folder: Path = RESULTS) -> dict[str, list[Record]]:
    """The records of every file, by the file's name without the ending."""
    return {file.stem: [json.loads(file.read_text(encoding="utf-8"))] for file in sorted(folder.glob("*.json"))}


def render(records: Mapping[str, Sequence[Record]]) -> str:
    """Returns the page."""
    taken = {section.key: _of(records, section.key, "cpu") for section in SECTIONS}
    every = {key: [record for name in names for record in records[name]] for key, names in taken.items()}
    parts = [HEAD, _missed(every), _gpus(records)]
    for section in SECTIONS:
        parts.append(_section(section, records, taken[section.key]))
    return "\n".join(part for part in parts if part)


def current() -> str:
    """Returns the page as the records in bench/results make it."""
    return render(read())


def write() -> list[Path]:
    """Writes the page, and every figure there are records for; returns the files."""
    records = read()
    PAGE.write_text(render(records), encoding="utf-8")
    return [PAGE, *(draw(name, _records_for(name, records), FIGURES) for name in PLOTS if _records_for(name, records))]


def _of(records: Mapping[str, Any], key: str, device: str) -> list[str]:
    """Files of one suite: ``KEY-cpu``, ``KEY-more-cpu``."""
    return [name for name in records if name.split("-")[0] == key and name.endswith(f"-{device}")]


def _section(section: Section, records: Mapping[str, Sequence[Record]], here: Sequence[str]) -> str:
    there = _of(records, section.key, "cuda")
    shown = there if section.gpu == "only" else here
    lines = [f"## {section.title}\n", f"{textwrap.fill(section.text, WIDTH, break_on_hyphens=False)}\n"]
    if not shown:
        name = f"{section.key}-{'cuda' if section.gpu == 'only' else 'cpu'}.json"
        lines.append(f"Not measured yet. To measure, run:\n\n```sh\n{_command(section, name)}\n```\n")
        return "\n".join(lines)
    tables = [record for name in shown for record in records[name]]
    beside = [[record for name in there for record in records[name]]] if section.gpu == "also" else []
    lines.append(section.body(tables, *beside))
    for name, plot in PLOTS.items():
        if plot.suite == section.key and _records_for(name, records):
            lines.append(f"![{plot.caption}](figures/{name}.png)\n")
    files = [*here, *there] if section.gpu == "also" else shown
    lines.append("\n".join(_provenance(name, record) for name in files for record in records[name]) + "\n")
    return "\n".join(lines)


def _command(section: Section, file: str) -> str:
    return f"python -m bench {section.command} --json bench/results/{file}"


def _records_for(plot: str, records: Mapping[str, Sequence[Record]]) -> list[Record]:
    """The records a figure is drawn from; none where they hold too few points."""
    found = [record for name in _of(records, PLOTS[plot].suite, "cpu") for record in records[name]]
    return found if found and PLOTS[plot].series(found) else []


def _provenance(name: str, record: Record) -> str:
    """Says by what command, on what, when and from which commit a file was made."""
    where = record["machine"]
    cpu = f"{where['threads']} threads of {where['cores']} cores of an {where['cpu']}"
    on = where["gpu"] if name.endswith("-cuda") and where.get("gpu") else cpu
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    commit = f"commit {str(where['commit'])[:10]}{' with changes' if where['uncommitted_changes'] else ''}"
    rounds = f", {record['rounds']} rounds" if "rounds" in record else ""
    made = f" by `python -m bench {record['command']}`" if "command" in record else ""
    when = f" on {where['date']}" if "date" in where else ""
    text = f"- `{name}.json`{when}{made}: {on}{rounds}; {versions}; {commit}; load {where['load_before']:.1f} before"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _missed(every: Mapping[str, Sequence[Record]]) -> str:
    lines = sections.missed(every)
    if not lines:
        return ""
    return "Targets not met:\n\n" + "".join(f"- {line}\n" for line in lines)


def _gpus(records: Mapping[str, Any]) -> str:
    if any(name.endswith("-cuda") for name in records):
        return ""
    return "No GPU was available for these measurements: columns about GPUs are empty, and nothing in them is estimated.\n"
