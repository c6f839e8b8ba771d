"""Saving: the compiled programs of an explainer, and the tensors they hold, as one file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frpc.capture.batch import place_of
from frpc.capture.export import InputSpec
from frpc.core.graph import describe, first_result
from frpc.core.lineage import Lineage
from frpc.driver.calling import InputKinds
from frpc.driver.pipeline import Compiled
from frpc.driver.programs import Programs
from frpc.errors import OptionError, ProgramFileError
from frpc.files.constants import check_calls, write_entries
from frpc.files.container import write
from frpc.files.gather import Gathered, gather
from frpc.files.graphs import write_program
from frpc.files.operators import DTYPES
from frpc.files.questions import question_of, write_question, write_top
from frpc.files.values import FaultError, write_value
from frpc.rules.sets.ruleset import RuleSet

__all__ = ["named_tensors", "save"]

Saved = tuple[int, Compiled]  # which signature, and the program


def save(programs: Programs, path: str | Path, columns: bool, weights: str) -> Path:
    """Writes what an explainer has compiled; see :meth:`frpc.Explainer.save`."""
    if weights not in ("stored", "reference"):
        raise OptionError(f'weights={weights!r} is unknown; choose "stored" or "reference".')
    with programs.reading_graphs():
        return _save(programs, Path(path), columns, weights)


def _save(programs: Programs, target: Path, columns: bool, weights: str) -> Path:
    programs.first_prepared()
    if type(programs.options.rules).check is not RuleSet.check:
        raise ProgramFileError(f"{programs.options.rules.name} has a custom check of inputs, which a file cannot contain.")
    signatures = list(programs.prepared_models)
    for signature in signatures:
        for many in (False, True) if columns else (False,):
            programs.compiled_for(signature, programs.query_with(columns=many))
    saved = [(signatures.index(s), found) for (s, query), found in programs.compiled.items() if question_of(query) is not None]
    _demand_samples_first(programs, saved)
    model = named_tensors(programs.model) if weights == "reference" else None
    try:
        gathered = gather(_tensors(programs, saved), lambda t: _lineage(programs, t), model)
        check_calls(gathered.entries)
        document = _document(programs, signatures, saved, gathered, weights)
    except FaultError as fault:
        raise ProgramFileError(f"{programs.model_name} cannot be saved: it contains {fault}.") from fault
    write(target, document, gathered.stored)
    return target


def _demand_samples_first(programs: Programs, saved: Sequence[Saved]) -> None:
    """Raises an error for programs whose maps do not have samples first: a file cannot describe another place.

    Raises:
        ProgramFileError: names the source or the layer.
    """
    for _, compiled in saved:
        inner = bool(compiled.plan.query.layers)
        for node, place in zip(compiled.plan.wanted, compiled.places, strict=True):
            if place.axis or place.outer != 1 or (place.factor != 1 and not inner):
                raise ProgramFileError(
                    f"{programs.model_name} cannot be saved: relevance of {describe(first_result(node.meta['val']))} does not "
                    f"have one entry for each sample, samples first.\n    {place_of(node)}\n  Choose another source with source=."
                )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by the names in its ``state_dict``, tied ones under each of theirs."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _lineage(programs: Programs, value: Tensor) -> Lineage | None:
    found = (prepared.ledger.lineage(value) for prepared in programs.prepared_models.values())
    return next((lineage for lineage in found if lineage is not None), None)


def _tensors(programs: Programs, saved: Sequence[Saved]) -> list[tuple[str, Tensor]]:
    held = [pair for _, compiled in saved for pair in compiled.portable.named_buffers()]
    held += [("reference", value) for _, compiled in saved for others in compiled.references for value in others]
    return held + [("bound", value) for box in programs.options.rules.boxes() for value in box if isinstance(value, Tensor)]


def _document(
    programs: Programs, signatures: Sequence[InputKinds], saved: Sequence[Saved], gathered: Gathered, weights: str
) -> dict[str, Any]:
    def constant(value: Any) -> dict[str, Any] | None:
        return {"constant": gathered.names[id(value)]} if isinstance(value, Tensor) else None

    return {
        "frpc": version("frpc"),
        "model": programs.model_name,
        "rules": programs.options.rules.name,
        "bias": programs.query.bias,
        "top": write_top(programs.query.top),
        "weights": weights,
        "names": list(programs.names or ()),
        "boxes": [[write_value(v, constant) for v in box] for box in programs.options.rules.boxes()],
        "constants": write_entries(gathered.entries),
        "signatures": [_signature(programs, signature) for signature in signatures],
        "programs": [_program(which, compiled, gathered) for which, compiled in saved],
    }


def _signature(programs: Programs, signature: InputKinds) -> dict[str, Any]:
    prepared = programs.prepared_models[signature]
    output = prepared.canonical.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    sizes = [int(n) for n in output.shape[1:]]
    return {
        "inputs": [_input(spec) for spec in prepared.captured.inputs],
        "output": {"shape": sizes, "dtype": _dtype(output.dtype), "text": describe(output)},
        "device": prepared.captured.inputs[0].device.type,
    }


def _input(spec: InputSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": _dtype(spec.dtype), "batch": spec.batch}


def _dtype(dtype: Any) -> str:
    for name, known in DTYPES.items():
        if known is dtype:
            return name
    raise FaultError(f"a tensor of {dtype}")


def _program(which: int, compiled: Compiled, gathered: Gathered) -> dict[str, Any]:
    rules = {n.name: a.rule.name for n, a in compiled.assignment.rules.items()}
    question = question_of(compiled.plan.query)
    assert question is not None
    return {
        "signature": which,
        "question": write_question(question),
        "references": [[gathered.names[id(value)] for value in others] for others in compiled.references],
        "nodes": write_program(compiled.portable, gathered.names, rules),
    }
