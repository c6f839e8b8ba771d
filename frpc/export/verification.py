"""Does a file say what its explainer says? Compared on fresh inputs, with other batch sizes and other targets.

A network of ReLUs or max pools is a function with edges: where a value lies within rounding of one, two programs that both
round correctly may open a gate, or choose a winner, differently, and the map jumps by more than rounding explains. The explainer
itself tells: there its own map jumps, too, when its input moves by a few roundings. So a map may be off by more than the bound
if the explainer's own jumps as far; outputs, which do not jump, may not. Fresh samples are drawn until enough of them lie off
all edges; large nets of ReLUs may have none that does, and the report says so.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpc.attribution.cam import grad_cam
from frpc.errors import InputError, VerificationError
from frpc.explainer.explainer import Explainer
from frpc.export.question import Signature, examples
from frpc.export.to_aoti import is_aoti, run_aoti
from frpc.export.to_onnx import run_onnx
from frpc.export.to_torch import run_torch_export

__all__ = ["Report", "Row", "open_file", "verify"]

Run = Callable[..., list[Tensor]]
_ROUNDINGS = (4, 8, 16, 32)  # an input is moved by so many units in the last place, each several times
_TRIES = 8


@dataclass(frozen=True)
class Row:
    """How one result of the file compares.

    Attributes:
        name: of the result.
        error: largest relative L1 of the samples that lie on no edge, ``sum|a - e| / sum|e|``; of the constants' share relative
            to the map, ``|a - e| / sum|V|``, since much cancels in it. NaN if every sample lies on one.
        edge: the largest of those that do; NaN without them.
    """

    name: str
    error: float
    edge: float


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found; prints as a table.

    Attributes:
        path: the file.
        signature: what it computes.
        rows: one for each result.
        samples: how many were compared.
        edges: how many of them lie on an edge.
        batches: the batch sizes.
        conservation: largest ``|sum V - y| / sum|V|`` in the file's own results; None if maps do not explain the whole output.
        bound: what errors were held to.
    """

    path: str
    signature: Signature
    rows: tuple[Row, ...]
    samples: int
    edges: int
    batches: tuple[int, ...]
    conservation: float | None
    bound: float

    @property
    def error(self) -> float:
        """The largest error of samples that lie on no edge; NaN if every sample lies on one."""
        return max((row.error for row in self.rows), key=lambda error: (math.isnan(error), error))

    @property
    def heading(self) -> str:
        """What was compared."""
        sizes = ", ".join(map(str, self.batches))
        return f"{self.samples} samples in batches of {sizes}; relative L1 to the explainer, bound {self.bound:g}:"

    def cells(self) -> list[tuple[str, str]]:
        """Each result and its error, as text."""
        rows = [(row.name, f"{row.error:.1e}") for row in self.rows if self.edges < self.samples]
        return rows if self.conservation is None else [*rows, ("|sum V - y| / sum|V|", f"{self.conservation:.1e}")]

    @property
    def remarks(self) -> list[str]:
        """What to know of samples on an edge of the model."""
        lines = []
        if self.edges:
            worst = max(row.edge for row in self.rows)
            lines.append(
                f"{self.edges} of the samples lie on an edge of the model, where rounding decides: there maps differ by up to "
                f"{worst:.1e}, no more than twice what the explainer's own do when its input moves by a few roundings"
            )
        if self.edges == self.samples:
            lines.append("No sample lies off all edges: maps are compared to that, and no closer.")
        return lines

    def __str__(self) -> str:
        rows = [f"  {name:<24} {error}" for name, error in self.cells()]
        return "\n".join([self.heading, *rows, *(f"  {remark}" for remark in self.remarks)])


def open_file(path: str | Path) -> tuple[Run, Signature]:
    """Opens an exported file for running: tensors in, tensors out.

    Raises:
        InputError: if it is not a file that frpc exports.
    """
    if Path(path).suffix == ".onnx":
        return run_onnx(path)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is neither an .onnx file nor a .pt2 archive.")
    return run_aoti(path) if is_aoti(path) else run_torch_export(path)


def verify(
    path: str | Path,
    explainer: Explainer,
    *,
    batches: Sequence[int] = (1, 3),
    targets: int = 2,
    bound: float = 1e-5,
    rounds: int = 8,
    seed: int = 0,
) -> Report:
    """Compares an exported file with its explainer on fresh inputs, drawn within the example's range.

    Args:
        path: the file.
        explainer: the explainer it was exported from.
        batches: batch sizes to try; a file with a fixed one is tried with that.
        targets: K, if the file takes several targets.
        bound: relative L1 that samples are held to; the module's text says what becomes of those on an edge.
        rounds: how often at most fresh samples are drawn, until as many as the batches hold lie off all edges.
        seed: of the random inputs and targets.

    Raises:
        VerificationError: if a result is further off; the message holds the report.
        InputError: if the file is of another kind, or was exported from another explainer.
    """
    run, signature = open_file(path)
    _check(signature, explainer, path)
    sizes = tuple(batches) if signature.batch is None else (signature.batch,)
    asker = _Asker(run, signature, explainer, targets, torch.Generator().manual_seed(seed))
    found: list[_Found] = []
    for _ in range(rounds):
        found += [asker.compare(batch, bound) for batch in sizes]
        if sum(int((~f.edge).sum()) for f in found) >= sum(sizes):
            break
    report = _report(str(path), signature, found, sizes, bound)
    if any(bool(f.off.any()) for f in found):
        raise VerificationError(f"{path} and its explainer give different results.\n{report}")
    return report


def _check(signature: Signature, explainer: Explainer, path: str | Path) -> None:
    mine = (explainer.model_name, explainer.rules.name, explainer.bias_policy)
    theirs = (signature.model, signature.rules, signature.bias)
    if mine != theirs:
        raise InputError(f"{path} was exported from {', '.join(theirs)} (model, rules, bias), not from {', '.join(mine)}.")


def _report(path: str, signature: Signature, found: Sequence[_Found], sizes: tuple[int, ...], bound: float) -> Report:
    errors, edge = torch.cat([f.errors for f in found], 1), torch.cat([f.edge for f in found])
    rows = (
        Row(name, _largest(error[~edge]), _largest(error[edge])) for name, error in zip(signature.outputs, errors, strict=True)
    )
    sums = [f.conservation for f in found if f.conservation is not None]
    conservation = max(sums) if sums else None
    return Report(path, signature, tuple(rows), len(edge), int(edge.sum()), sizes, conservation, bound)


def _largest(errors: Tensor) -> float:
    return float(errors.max()) if len(errors) else math.nan


@dataclass(frozen=True, eq=False)
class _Found:
    """One batch: errors ``[results, B]``, which samples lie on an edge and which are off ``[B]``, and conservation."""

    errors: Tensor
    edge: Tensor
    off: Tensor
    conservation: float | None


@dataclass(frozen=True)
class _Asker:
    """Asks a file and its explainer the same."""

    run: Run
    signature: Signature
    explainer: Explainer
    targets: int
    chance: torch.Generator

    def compare(self, batch: int, bound: float) -> _Found:
        drawn = examples(self.signature.inputs, batch, self.chance)
        inputs = [x.to(self.signature.device) for x in drawn]
        asked = self._asked(inputs)
        expected = self._explained(inputs, asked)
        found = self.run(*inputs, *(() if self.signature.question.targets == "top" else asked.values()))
        errors = self._relative(found, expected)
        far = ~(errors <= bound).all(0)
        jumps = torch.tensor([not name.startswith(("output", "values")) for name in self.signature.outputs])
        excusable = far & (errors[~jumps] <= bound).all(0)
        edge = self._edges(inputs, asked, expected, errors, excusable)
        return _Found(errors, edge, far & ~edge, self._conservation(found, asked))

    def _asked(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Arguments in addition to the inputs, by name: random classes, or a random weight for each output."""
        asked, signature = self.signature.question, self.signature
        batch = len(inputs[0])
        if asked.layer:
            return {}
        if asked.targets == "seed":
            output = self.explainer.predict(*inputs)
            return {"seed": torch.randn(output.shape, generator=self.chance, dtype=torch.float64).to(output)}
        if asked.targets == "top":
            return {"target": self.explainer.predict(*inputs).argmax(1)}
        size = [batch, self.targets] if asked.columns else [batch]
        return {"target": torch.randint(signature.classes, size, generator=self.chance).to(signature.device)}

    def _explained(self, inputs: Sequence[Tensor], asked: dict[str, Any]) -> list[Tensor]:
        """What the explainer says, in the file's order."""
        question = self.signature.question
        if question.layer:
            maps = self.explainer.layer(question.layer, *inputs, strategy="windows")
            return [maps.values, maps.local, maps.bias]
        if question.grad_cam:
            return list(grad_cam(self.explainer, inputs[0], question.grad_cam, **asked))
        if question.at:
            layers = self.explainer.at(question.at, *inputs, **asked)
            return [layers.output, *layers.layers.values()]
        found = self.explainer(*inputs, **asked)
        return [found.output, *(found.relevance if isinstance(found.relevance, tuple) else [found.relevance]), found.bias]

    def _relative(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
        """Errors of every result and sample, ``[results, B]``."""
        rows = []
        scale = torch.zeros(len(expected[0]), dtype=torch.float64)  # of the constants' share: that of the maps before it
        for name, a, e in zip(self.signature.outputs, found, expected, strict=True):
            error, size = _sizes(a.cpu().double() - e.cpu().double()), _sizes(e.cpu().double())
            scale = scale + (size if name.startswith(("relevance", "windows")) else 0)
            rows.append(error / (scale if name == "bias" else size).clamp(min=torch.finfo(torch.float64).tiny))
        return torch.stack(rows)

    def _edges(
        self, inputs: Sequence[Tensor], asked: dict[str, Tensor], expected: Sequence[Tensor], errors: Tensor, far: Tensor
    ) -> Tensor:
        """Which samples that are far off lie on an edge: the explainer's own results move at least half as far."""
        furthest = torch.zeros_like(errors[0])
        sizes = _ROUNDINGS * _TRIES if any(x.is_floating_point() for x in inputs) else ()
        for roundings in sizes:
            edge = far & (errors <= 2 * furthest).all(0)
            if bool((edge == far).all()):
                break
            moved = self._explained([self._moved(x, roundings) for x in inputs], asked)
            furthest = torch.maximum(furthest, self._relative(moved, expected).amax(0))
        return far & (errors <= 2 * furthest).all(0)

    def _moved(self, x: Tensor, roundings: int) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=self.chance, dtype=torch.float64).to(x)
        return x * (1 + roundings * torch.finfo(x.dtype).eps * noise)

    def _conservation(self, found: Sequence[Tensor], asked: dict[str, Tensor]) -> float | None:
        """Largest ``|sum V - y| / sum|V|`` of the file's own results, if maps explain the whole output."""
        question, target = self.signature.question, asked.get("target")
        if target is None or question.at or question.grad_cam or not self.explainer.rules.account.constants:
            return None
        output, *maps, bias = (r.double().cpu() for r in found)
        lead = target.dim()
        index = target.cpu() if lead == 2 else target.cpu()[:, None]
        explained = output.gather(1, index).reshape(target.shape)
        whole = torch.stack([m.flatten(lead).sum(-1) for m in maps]).sum(0)
        size = torch.stack([m.abs().flatten(lead).sum(-1) for m in maps]).sum(0)
        if self.signature.bias == "separate":
            whole, size = whole + bias, size + bias.abs()
        return float(((whole - explained).abs() / size.clamp(min=torch.finfo(torch.float64).tiny)).max())


def _sizes(x: Tensor) -> Tensor:
    """``sum|x|`` of each sample."""
    return x.abs().flatten(1).sum(1) if x.dim() > 1 else x.abs()
