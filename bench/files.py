"""Program files: how large they are, how long saving and loading takes, and the first answers of what was loaded."""

from __future__ import annotations

import json as read_json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file

import frpc
from bench.machine import Spread, machine, make_table, open_console, timed, write_record

__all__ = ["run"]

# Each round is a process that knows only the file: what a service does when it starts.
LOAD = """
import json, sys, time
import torch, frpc
torch.set_num_threads(int(sys.argv[2]))
x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
times = [time.perf_counter()]
loaded = frpc.load(sys.argv[1])
times.append(time.perf_counter())
for _ in range(3):
    found = loaded(x, target=3)
    times.append(time.perf_counter())
relevance, total = found.relevance.double(), float(found.relevance.double().abs().sum())
print(json.dumps({
    "load": times[1] - times[0], "first": times[2] - times[1], "later": times[4] - times[3],
    "conservation": abs(float(relevance.sum()) - float(found.output[0, 3])) / total,
}))
"""


def measure(net: str, threads: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Saves one net with both kinds of weights, and loads it in fresh processes."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = getattr(torchvision.models, net)(weights=None).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    explainer = frpc.compile(model, (x,))
    explainer(x, target=torch.tensor([[0, 1]]))
    path, state = folder / f"{net}.frpc", folder / f"{net}.safetensors"
    seconds = timed(lambda: explainer.save(path))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, state)
    explainer.save(folder / "reference.frpc", weights="reference")
    found = [_load(path, threads) for _ in range(rounds)]
    assert all(entry["conservation"] < 1e-5 for entry in found), "a loaded explainer does not conserve"
    return {
        "net": net,
        "weights_bytes": state.stat().st_size,
        "file_bytes": path.stat().st_size,
        "reference_bytes": (folder / "reference.frpc").stat().st_size,
        "save_seconds": seconds,
        **{key: vars(Spread.of([entry[key] for entry in found])) for key in ("load", "first", "later")},
        "conservation": max(entry["conservation"] for entry in found),
    }


def _load(path: Path, threads: int) -> dict[str, float]:
    command, cores = [sys.executable, "-c", LOAD, str(path), str(threads)], {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=cores)
    found: dict[str, float] = read_json.loads(done.stdout)
    return found


def run(nets: Sequence[str], threads: int, rounds: int, json: Path | None) -> int:
    """Measures nets, shows a table, writes a record; returns an exit code."""
    where, console = machine(threads), open_console()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(net, threads, rounds, Path(folder)) for net in nets]
    table = make_table("net", "file / weights", "by reference", "save", "load", "first answer", "later", "|sum V - y| / sum|V|")
    for row in rows:
        times = [row[key] for key in ("load", "first", "later")]
        table.add_row(
            row["net"],
            f"{row['file_bytes'] / row['weights_bytes']:.4f}",
            f"{row['reference_bytes'] / 1e6:.2f} MB",
            f"{row['save_seconds']:.2f} s",
            *(f"{t['median']:.3f} s ({t['least']:.3f}-{t['most']:.3f})" for t in times),
            f"{row['conservation']:.1e}",
        )
    console.print(table)
    write_record(console, json, "files", {"rounds": rounds}, where, rows)
    return 0
