"""What `frpc explain` keeps of one picture: the record, its files, and its lines on the screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from frpc.cli.session import print_table
from frpc.integrations.images import Picture
from frpc.integrations.torchvision import class_names
from frpc.plots import heatmap
from frpc.plots.outputs import OutputFolder

__all__ = ["Explained", "describe", "show", "stems", "write"]

SHOWN_CLASSES = 5


@dataclass(frozen=True, eq=False)
class Explained:
    """The maps of one picture.

    Attributes:
        method: how it was explained.
        logits: ``[O]``.
        targets: the K explained classes.
        relevance: ``[K, C, H, W]``.
        constants: ``[K]``, the constants' share of each logit; of other methods than frp what their rules leave out of the map,
            and None where they promise nothing.
        sums: ``[K]``, the sum of each map, with the constants if they are separate.
        errors: ``[K]``, ``|sum - logit| / sum|V|``; None of methods that do not explain the whole logit.
        seconds: of the one call.
    """

    method: str
    logits: Tensor
    targets: list[int]
    relevance: Tensor
    constants: list[float] | None
    sums: list[float]
    errors: list[float] | None
    seconds: float


def describe(explained: Explained) -> dict[str, Any]:
    """The strongest classes and the sums of the explained ones, ready for JSON."""
    names = class_names(len(explained.logits))
    probabilities = explained.logits.double().softmax(0)

    def entry(index: int) -> dict[str, Any]:
        logit, probability = float(explained.logits[index]), float(probabilities[index])
        return {"class": index, "name": names[index], "logit": logit, "probability": probability}

    best = explained.logits.topk(min(SHOWN_CLASSES, len(names))).indices.tolist()
    nothing = [None] * len(explained.targets)
    accounts = zip(explained.targets, explained.sums, explained.constants or nothing, explained.errors or nothing, strict=True)
    return {
        "top": [entry(index) for index in best],
        "explained": [
            entry(index) | {"sum": total, "constants": constants, "conservation_error": error}
            for index, total, constants, error in accounts
        ],
    }


def write(
    folder: OutputFolder,
    stem: str,
    picture: Picture,
    explained: Explained,
    record: dict[str, Any],
    cell: int,
    written: Sequence[Path] = (),
) -> dict[str, Any]:
    """Writes the pictures, the raw maps and the record; returns the record with the names of the files, those ``written`` too."""
    entries = record["explained"]
    titles = [_title(entry, record["bias"], explained.method) for entry in entries]
    unit = "logit" if explained.method == "frp" else explained.method
    maps = explained.relevance.cpu()
    files = [
        folder.figure(
            f"{stem}.{entry['class']}-{_slug(entry['name'])}.png",
            heatmap.overlay(picture.crop, values, title=title, unit=unit, cell=cell),
        )
        for entry, title, values in zip(entries, titles, maps, strict=True)
    ]
    if len(entries) > 1:
        named = dict(zip(titles, maps, strict=True))
        compared = heatmap.side_by_side(picture.crop, named, shared_scale=True, unit=unit, cell=cell)
        files.append(folder.figure(f"{stem}.top{len(entries)}.png", compared))
    arrays = {
        "relevance": maps.numpy(),
        "logits": explained.logits.cpu().numpy(),
        "targets": np.array(explained.targets),
    }
    if explained.constants is not None:
        arrays["constants"] = np.array(explained.constants)
    files += [*written, folder.arrays(f"{stem}.npz", **arrays), folder.path / f"{stem}.json"]
    record = record | {"files": [str(file) for file in files]}
    folder.json(f"{stem}.json", record)
    return record


def stems(paths: Sequence[Path]) -> list[str]:
    """A name for each picture's files; pictures of the same name get a number."""
    count, seen, names = Counter(path.stem for path in paths), Counter[str](), []
    for path in paths:
        seen[path.stem] += 1
        names.append(path.stem if count[path.stem] == 1 else f"{path.stem}-{seen[path.stem]}")
    return names


def show(console: Console, record: dict[str, Any]) -> None:
    """Prints one picture's strongest classes, the sums of its maps and its files."""
    console.print(f"[bold]{escape(record['image'])}[/bold]  {record['model']}")
    standard = record.get("method", "frp") == "frp"
    total = "map sum + constants" if standard and record["bias"] == "separate" else "map sum"
    last = "error" if standard else "left out"
    rows = []
    accounts = {entry["class"]: entry for entry in record["explained"]}
    shown = {entry["class"]: entry for entry in record["top"]} | accounts
    for index, entry in sorted(shown.items(), key=lambda item: -item[1]["logit"]):
        balance = ("", "")
        if index in accounts:
            left_out = "" if entry["constants"] is None else f"{entry['constants']:+.5f}"
            balance = (f"{entry['sum']:+.5f}", f"{entry['conservation_error']:.1e}" if standard else left_out)
        rows.append((str(index), entry["name"], f"{entry['logit']:+.5f}", f"{entry['probability']:.4f}", *balance))
    print_table(console, ("class", "name", "logit", "probability", total, last), rows, words=("name",))
    if "layers" in record:
        worst = sorted(record["layers"], key=lambda row: -row["error"])[:SHOWN_CLASSES]
        errors = ", ".join(f"{row['layer'] or '(top level)'} {row['error']:.1e}" for row in worst)
        console.print(f"largest errors of {len(record['layers'])} layers: {errors}", markup=False)
    seconds = record["seconds"]
    console.print(f"compiled in {seconds['compile']:.1f} s, explained in {1000 * seconds['explain']:.0f} ms")
    for file in record["files"]:
        console.print(f"  {file}", markup=False)


def _title(entry: dict[str, Any], bias: str, method: str) -> str:
    if method != "frp":
        return f"{entry['name']} ({entry['class']}), {method}"
    title = f"{entry['name']} ({entry['class']}), logit {entry['logit']:+.2f}"
    return f"{title}\n{entry['constants']:+.2f} of it from constants, not in the map" if bias == "separate" else title


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
