"""Reading: makes an explainer from a file's document; every part is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frpc.capture.export import InputSpec
from frpc.files.constants import check_calls, computed, originals, read_entries
from frpc.files.container import fail, read
from frpc.files.graphs import MOST_NODES, read_program
from frpc.files.loaded import FileSignature, Header, LoadedExplainer, StoredProgram
from frpc.files.operators import DTYPES
from frpc.files.questions import FileQuestion, read_question, read_top
from frpc.files.saving import named_tensors
from frpc.files.values import FaultError, integer, read_value, record, sequence, show, strings, text
from frpc.optimize.backends.backends import Backend, check_backend

__all__ = ["load"]


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    mode: str = "latency",
) -> LoadedExplainer:
    """Reads an explainer saved by :meth:`frpc.Explainer.save`, in a process that knows nothing of the model.

    A file is data: programs are lists of calls of known operators, and reading one runs none of them. Everything in it is
    checked first.

    Args:
        path: the file.
        model: the serving model, for a file saved with ``weights="reference"``; or its ``state_dict``.
        state_dict: tensors by name, instead of a model.
        device: the device to run on; by default the one it was compiled for.
        backend, mode: who runs the programs; see :func:`frpc.compile`.

    Raises:
        OptionError: for an unknown backend or mode.
        ProgramFileError: the file is missing, damaged, of another version, holds anything unknown, or does not fit the model.
    """
    place, runs = Path(path), check_backend(backend, mode)
    document, tensors = read(place)
    weights = named_tensors(model) if model is not None else state_dict
    try:
        with torch.no_grad():
            return _Document(document, device).build(tensors, weights, runs)
    except FaultError as fault:
        raise fail(place, f"it contains {fault}") from fault


class _Document:
    """A file's JSON, read part by part."""

    def __init__(self, raw: dict[str, Any], device: str | torch.device | None) -> None:
        self.raw = record(
            raw,
            *[("frpc", "model", "rules", "bias", "top", "weights", "names", "boxes", "constants", "signatures", "programs")],
        )
        self.wanted = None if device is None else torch.device(device)

    def build(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, backend: Backend) -> LoadedExplainer:
        own = self._choice("weights", ("stored", "reference")) == "stored"
        if own == (weights is not None):
            raise FaultError(
                "its own weights: load it without model= or state_dict="
                if own
                else "no weights, only a reference to them: give model= or state_dict= with the weights it was compiled for"
            )
        signatures = [self._signature(s) for s in sequence(self.raw["signatures"], 100)]
        if not signatures:
            raise FaultError("no inputs")
        device = signatures[0].output.device
        entries = read_entries(self.raw["constants"], device, own)
        known = originals(entries, tensors, weights)
        check_calls(entries)
        values = computed(entries, known, device)
        sources = self._programs(signatures, values, device)
        kept = {str(n.target) for s in sources.values() for n in s.graph.find_nodes(op="get_attr")}
        kept |= {name for s in sources.values() for names in s.references for name in names}
        header = self._header(values, device)
        kept |= {value for box in header.boxes for value in box if isinstance(value, str)}
        held = {name: values[name] for name in values if name in kept}
        return LoadedExplainer(header, signatures, sources, held, backend)

    def _header(self, values: Mapping[str, Tensor], device: torch.device) -> Header:
        words = {key: text(self.raw[key]) for key in ("frpc", "model", "rules")}
        bias = self._choice("bias", ("uniform", "receptive_field", "separate"))
        boxes = tuple(self._box(b, values, device) for b in sequence(self.raw["boxes"], 100))
        return Header(**words, bias=bias, top=read_top(self.raw["top"]), names=strings(self.raw["names"]), boxes=boxes)

    def _choice(self, key: str, known: tuple[str, ...]) -> str:
        if not isinstance(self.raw[key], str) or self.raw[key] not in known:
            raise FaultError(f"{key} {show(self.raw[key])}, not one of {', '.join(known)}")
        return str(self.raw[key])

    def _box(self, raw: Any, values: Mapping[str, Tensor], device: torch.device) -> tuple[float | str, float | str]:
        def found(kind: str, name: Any) -> str:
            return _name(values, name)

        bounds = [read_value(v, found, device) for v in sequence(raw, 2)]
        if len(bounds) != 2 or not all(type(b) in (str, float, int) for b in bounds):
            raise FaultError(f"bounds of inputs {show(raw)}")
        return (bounds[0], bounds[1])

    def _signature(self, raw: Any) -> FileSignature:
        parts = record(raw, ("inputs", "output", "device"))
        if parts["device"] not in ("cpu", "cuda"):
            raise FaultError(f"the device {show(parts['device'])}")
        device = self.wanted or torch.device(parts["device"])
        if device.type == "cuda" and not torch.cuda.is_available():
            raise FaultError('programs for a CUDA device, but there is none: load it with device="cpu"')
        inputs = tuple(self._input(i, device) for i in sequence(parts["inputs"], 1000))
        if not inputs:
            raise FaultError("a program without inputs")
        output = record(parts["output"], ("shape", "dtype", "text"))
        sizes = [integer(n, 0, 2**31) for n in sequence(output["shape"], 16)]
        return FileSignature(inputs, torch.empty([0, *sizes], dtype=_dtype(output["dtype"]), device=device), text(output["text"]))

    def _input(self, raw: Any, device: torch.device) -> InputSpec:
        parts = record(raw, ("name", "shape", "dtype", "batch"))
        shape = tuple(integer(n, 0, 2**31) for n in sequence(parts["shape"], 16))
        batch = None if parts["batch"] is None else integer(parts["batch"], 1, 2**31)
        return InputSpec(text(parts["name"]), shape, _dtype(parts["dtype"]), device, batch)

    def _programs(
        self, signatures: Sequence[FileSignature], values: Mapping[str, Tensor], device: torch.device
    ) -> dict[tuple[int, FileQuestion], StoredProgram]:
        found: dict[tuple[int, FileQuestion], StoredProgram] = {}
        raw = sequence(self.raw["programs"], 1000)
        parts = [record(p, ("signature", "question", "references", "nodes")) for p in raw]
        if (count := sum(len(sequence(p["nodes"], MOST_NODES)) for p in parts)) > MOST_NODES:
            raise FaultError(f"programs of {count} nodes, more than {MOST_NODES}")
        for part in parts:
            which = integer(part["signature"], 0, len(signatures) - 1)
            key = (which, read_question(part["question"]))
            if key in found:
                raise FaultError(f"two programs for {key[1]}")
            references = tuple(tuple(_name(values, v) for v in sequence(r, 1000)) for r in sequence(part["references"], 10_000))
            found[key] = StoredProgram(read_program(part["nodes"], values.keys(), device), references)
            self._check_inputs(found[key], signatures[which])
        if missing := set(range(len(signatures))) - {which for which, _ in found}:
            raise FaultError(f"no program for inputs {min(missing)}")
        return found

    def _check_inputs(self, source: StoredProgram, signature: FileSignature) -> None:
        takes = len(source.graph.find_nodes(op="placeholder"))
        if not source.references or any(takes != len(signature.inputs) + 1 + len(others) for others in source.references):
            raise FaultError(f"a program of {takes} inputs, for {len(signature.inputs)} and a seed")


def _name(values: Mapping[str, Tensor], name: Any) -> str:
    if not isinstance(name, str) or name not in values:
        raise FaultError(f"the constant {show(name)}, which the file does not have")
    return name


def _dtype(raw: Any) -> torch.dtype:
    if not isinstance(raw, str) or raw not in DTYPES:
        raise FaultError(f"the type {show(raw)}")
    return DTYPES[raw]
