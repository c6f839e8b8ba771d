"""``python -m bench gpu``: what is run, and what is said at the end."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.driver import GOOD, Part, Record, Run
from bench.gpu.parts import PARTS
from bench.machine import machine, make_table, open_console

__all__ = ["RECORD", "run", "show", "source"]

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "results" / "gpu-cuda.json"
LIBRARIES = ("triton", "captum", "transformers")
REASON = 110  # characters of a reason in the table; the file has all of it


def run(file: Path, only: Sequence[str], again: bool, misses: bool, seconds: float, parts: Sequence[Part] = PARTS) -> int:
    """Runs the parts that have no result yet.

    Returns:
        0 if every part that was asked for passed or could not run here, 1 if not, 2 if there is no CUDA device or no such part.
    """
    console = open_console()
    unknown = [name for name in only if name not in {part.name for part in parts}]
    if unknown:
        console.print(f"There is no part {', '.join(unknown)}; there are {', '.join(part.name for part in parts)}.")
        return 2
    reason = why_no_gpu()
    if reason is not None:
        console.print(f"Nothing was run: {reason}.")
        return 2
    where = machine(torch.get_num_threads())
    where["versions"] |= {library: found for library in LIBRARIES if (found := _version(library))}
    where["versions"]["cuda"] = torch.version.cuda
    same = {"source": source(), "gpu": where["gpu"], "torch": torch.__version__}
    about = {"benchmark": "gpu", "command": shlex.join(["gpu", *_options(only, again, misses)]), "machine": where}
    asked = [part for part in parts if not only or part.name in only]
    one = Run(file, about, same, seconds, console)
    one.run(asked, again or bool(only), misses)
    records = one.known()
    show(console, parts, records)
    console.print(f"results: {file.name}")
    return int(any(records.get(part.name, {}).get("status") not in GOOD for part in asked))


def why_no_gpu() -> str | None:
    """Says why nothing can run on a CUDA device, or None where it can."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        return f"the CUDA device does not work: {str(error).splitlines()[0]}"
    return None


def source() -> str:
    """A hash of every Python file that the results depend on: those of other files count as other results."""
    digest = hashlib.sha256()
    for folder in ("frpc", "kernels", "bench", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def show(console: Console, parts: Sequence[Part], records: Mapping[str, Record]) -> None:
    """Prints what each part found, and a table of all."""
    for part in parts:
        for result in records.get(part.name, {}).get("results", ()):
            if "line" in result:
                console.print(f"{part.name}: {result['line']}", markup=False)
    table = make_table("part", "shows", "result", "reason", "s", "passed", "tried", left=4)
    for part in parts:
        found = records.get(part.name, {"status": "not run", "reason": "", "seconds": 0.0, "results": []})
        passed = sum(result["status"] == "passed" for result in found["results"])
        reason = " ".join(found["reason"].split())[:REASON].replace("[", "\\[")
        table.add_row(
            part.name, part.what, found["status"], reason, f"{found['seconds']:.0f}", str(passed), str(len(found["results"]))
        )
    console.print(table)


def _options(only: Sequence[str], again: bool, misses: bool) -> list[str]:
    return [*(["--only", ",".join(only)] if only else []), *(["--again"] * again), *(["--misses"] * misses)]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
