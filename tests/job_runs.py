"""Jobs over made pictures, and processes that are killed while they do them; in a module that those processes can import."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from frpc import jobs
from frpc.integrations.images import Recipe

__all__ = [
    "RECIPE", "Deadly", "child", "contents", "killed_until_done", "load", "make_folder", "picture", "processes", "seconds_of",
    "task_of",
]  # fmt: skip

RECIPE = Recipe(resize=20, crop=16)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(196, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def load() -> jobs.Classifier:
    torch.manual_seed(0)
    return Tiny().eval(), RECIPE


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def make_folder(path: Path, count: int) -> Path:
    """Pictures in two folders, one of them no picture."""
    for at in range(count):
        file = path / ("a" if at % 3 else "b") / f"{at:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(at) if at != 2 else b"no picture")
    return path


def task_of(data: Path, out: Path, size: int = 4, **changes: Any) -> jobs.Task:
    samples = jobs.open_samples(data, label=changes.pop("label", None))
    arguments = {"batch_size": 3, **changes}
    return jobs.Task(samples, load, jobs.Store(out, len(samples), size), **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished job but the lock, by name."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


# Kills -----------------------------------------------------------------------------------------------------------------------


def child(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    jobs.run(task_of(data, out, size=2), {"name": "tiny"})


def killed_until_done(start: Callable[[Path], Any], folder: Path, kills: int, longest: float) -> list[Path]:
    """Kills a process at random moments, again and again, and lets it end; begins again where it ended by itself too early.

    A quarter of the moments lie anywhere, the others a little after a new shard is there, when there is something to lose.
    """
    chance, done, outs = random.Random(0), 0, [folder / "0"]
    while True:
        process = start(outs[-1])
        if done >= kills:
            process.join()
        elif chance.random() < 0.25:
            process.join(chance.uniform(0, longest))
        else:
            before = shards_in(outs[-1])
            while process.exitcode is None and shards_in(outs[-1]) == before:
                process.join(0.01)
            process.join(chance.uniform(0, longest / 20))
        process.kill()  # does nothing to one that has ended
        process.join()
        if process.exitcode == -signal.SIGKILL:
            done += 1
            continue
        assert process.exitcode in (0, 3), process.exitcode
        if done >= kills:
            return outs
        outs.append(folder / str(len(outs)))


def shards_in(out: Path) -> int:
    return len(list(out.glob("shards/*.safetensors")))


def seconds_of(out: Path) -> float:
    """How long a finished job worked: from its first file to its last."""
    return (out / "index.jsonl").stat().st_mtime - (out / "manifest.json").stat().st_mtime


def processes(module: str) -> Any:
    """Starts processes quickly, from one that has loaded everything and does nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "frpc.explainer.compile", "torch._dynamo.source", "job_runs"])
    return context


@dataclass(frozen=True)
class Deadly:
    """Kills the process that reads the third shard for the first time."""

    samples: jobs.Samples
    marker: Path

    def __len__(self) -> int:
        return len(self.samples)

    def describe(self) -> dict[str, Any]:
        return self.samples.describe()

    def read(self, start: int, stop: int) -> list[jobs.Sample]:
        if start == 8 and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.samples.read(start, stop)
