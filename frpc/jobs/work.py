"""The work of a job: a shard of pictures read, explained in batches, and put in its place. All engines run this code.

Which pictures share a batch follows from their numbers alone, so that a job that was killed gives the bits of one that was not.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from frpc.errors import ImageError, TargetError
from frpc.explainer.compile import compile
from frpc.explainer.explainer import Explainer
from frpc.integrations.images import Picture, Recipe, prepare
from frpc.integrations.torchvision import class_index, class_names
from frpc.jobs.samples import Sample, Samples
from frpc.jobs.store import Failure, Shard, Store, write_atomically

__all__ = ["Classifier", "Task", "Worker", "settings"]

CELLS = 56  # squares along a drawn map's side

Classifier: TypeAlias = tuple[nn.Module, Recipe]
"""A model in eval mode that takes ``[B, 3, crop, crop]`` and returns ``[B, classes]``, and its preprocessing."""


@dataclass(frozen=True)
class Task:
    """What every process of a job knows.

    Attributes:
        samples: the data.
        load: makes the classifier; called once in each process.
        store: the folder of the job.
        method: a name of :func:`frpc.rules.sets.methods`.
        bias: where constants go, for ``frp``.
        target: ``"top"`` for the class the model finds likeliest, ``"label"`` for the sample's, else a class's number or name.
        batch_size: pictures that run at one time.
        dtype: of the whole computation.
        pictures: whether to draw each map.
    """

    samples: Samples
    load: Callable[[], Classifier]
    store: Store
    method: str = "frp"
    bias: str = "uniform"
    target: str = "top"
    batch_size: int = 8
    dtype: torch.dtype = torch.float32
    pictures: bool = False


@dataclass(frozen=True)
class _ReadySample:
    """A picture that can be explained; ``target`` is None where the model says which class."""

    index: int
    name: str
    picture: Picture
    target: int | None


class Worker:
    """Explains shards; the model is loaded and compiled once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model, self.recipe = task.load()
        self._explainer: Explainer | None = None
        self._names: list[str] = []

    def __call__(self, number: int) -> tuple[int, int]:
        """Does one shard and returns how many samples are done, and how many failed.

        Raises:
            TargetError: the class that the task names is none of the model's.
        """
        start, stop = self.task.store.bounds(number)
        found = [self._ready(index, sample) for index, sample in enumerate(self.task.samples.read(start, stop), start)]
        ready = [one for one in found if isinstance(one, _ReadySample)]
        failures = [one for one in found if isinstance(one, Failure)]
        explained = [self._explain(ready[at : at + self.task.batch_size]) for at in range(0, len(ready), self.task.batch_size)]
        tensors = {name: torch.cat([part[name] for part in explained]) for name in (explained[0] if explained else {})}
        tensors["index"] = torch.tensor([one.index for one in ready], dtype=torch.int64)
        if ready:
            ready, tensors, more = _finite(ready, tensors)
            failures = sorted([*failures, *more], key=lambda one: one.index)
        if self.task.pictures:
            self._draw(ready, tensors)
        self.task.store.write(Shard(number, start, stop, tuple(one.name for one in ready), tensors, tuple(failures)))
        return len(ready), len(failures)

    def _ready(self, index: int, sample: Sample) -> _ReadySample | Failure:
        """Decodes one picture and reads its class; a bad sample does not stop the job."""
        if sample.content is None:
            return Failure(index, sample.name, sample.problem)
        try:
            picture = prepare(sample.name, self.recipe, sample.content)
        except ImageError as error:
            return Failure(index, sample.name, str(error))
        if self.task.target == "top":
            return _ReadySample(index, sample.name, picture, None)
        classes = self._classes(picture.pixels)
        if self.task.target != "label":
            return _ReadySample(index, sample.name, picture, class_index(self.task.target, classes))
        if sample.label is None:
            return Failure(index, sample.name, "the sample has no label")
        try:
            return _ReadySample(index, sample.name, picture, class_index(str(sample.label), classes))
        except TargetError as error:
            return Failure(index, sample.name, f"label {sample.label!r}: {error}")

    def _classes(self, pixels: Tensor) -> list[str]:
        """The names of the model's classes, one for each output."""
        if not self._names:
            x = pixels.to(self.task.dtype)
            self._names = class_names(self._compiled(x).predict(x).shape[1])
        return self._names

    def _compiled(self, x: Tensor) -> Explainer:
        if self._explainer is None:
            bias = self.task.bias if self.task.method == "frp" else None
            self._explainer = compile(self.model, (x[:1],), method=self.task.method, bias=bias)
        return self._explainer

    def _explain(self, ready: Sequence[_ReadySample]) -> dict[str, Tensor]:
        """Explains one batch: ``relevance [n, 3, H, W]``, ``output [n, classes]``, and one number each of the rest."""
        x = torch.cat([one.picture.pixels for one in ready]).to(self.task.dtype)
        explainer = self._compiled(x)
        with torch.inference_mode():
            told = [one.target for one in ready if one.target is not None]
            target = torch.tensor(told) if told else explainer.predict(x).argmax(1)
            found = explainer(x, target=target)
        assert isinstance(found.relevance, Tensor)
        return {
            "relevance": found.relevance,
            "output": found.output,
            "target": target,
            "explained": found.output.gather(1, target[:, None])[:, 0],
            "bias": found.bias,
            "sum": found.relevance.double().flatten(1).sum(1),
        }

    def _draw(self, ready: Sequence[_ReadySample], tensors: dict[str, Tensor]) -> None:
        """One picture a sample, before the shard says that it is done."""
        from frpc.plots import heatmap  # matplotlib takes longer to load than the rest

        names = class_names(tensors["output"].shape[1]) if ready else []
        cell = max(1, self.recipe.crop // CELLS)
        for row, one in enumerate(ready):
            at, explained = int(tensors["target"][row]), float(tensors["explained"][row])
            title = f"{names[at]} ({at}), logit {explained:+.2f}, {self.task.method}"
            figure = heatmap.overlay(one.picture.crop, tensors["relevance"][row], title=title, cell=cell)
            with tempfile.TemporaryDirectory() as folder:
                heatmap.save(figure, drawn := Path(folder) / "map.png")
                write_atomically(self.task.store.folder / "png" / _file_name(one), drawn.read_bytes())


def _file_name(one: _ReadySample) -> str:
    return f"{one.index:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(one.name).name)}.png"


def _finite(ready: list[_ReadySample], tensors: dict[str, Tensor]) -> tuple[list[_ReadySample], dict[str, Tensor], list[Failure]]:
    """Separates samples whose output or map is not finite."""
    whole = torch.stack([tensors[name].flatten(1).isfinite().all(1) for name in ("output", "relevance")]).all(0)
    kept = [one for one, good in zip(ready, whole.tolist(), strict=True) if good]
    bad = [one for one, good in zip(ready, whole.tolist(), strict=True) if not good]
    failures = [Failure(one.index, one.name, "the output or its map contains NaN or Inf") for one in bad]
    return kept, tensors if not bad else {name: tensor[whole] for name, tensor in tensors.items()}, failures


def settings(task: Task) -> dict[str, Any]:
    """What results depend on besides the model, for the manifest; also the number of threads, which affects rounding."""
    return {
        "data": task.samples.describe(),
        "method": task.method,
        "bias": task.bias if task.method == "frp" else None,
        "target": task.target,
        "batch_size": task.batch_size,
        "dtype": str(task.dtype).removeprefix("torch."),
        "pictures": task.pictures,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
