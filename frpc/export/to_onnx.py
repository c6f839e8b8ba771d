"""ONNX files, for ONNX Runtime and everything else that reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from frpc.core.torch_compat import trace_lock
from frpc.errors import ExportError, InputError, require
from frpc.explainer.explainer import Explainer
from frpc.export.blocked import ONNX_REWRITES
from frpc.export.question import Question, Signature, Targets
from frpc.export.traced import traced
from frpc.export.translations import translations

__all__ = ["METADATA", "OPSET", "onnx", "run_onnx"]

OPSET = 18
METADATA = "frpc"  # the key of the signature in the file's metadata


def onnx(
    explainer: Explainer,
    path: str | Path,
    inputs: Sequence[Tensor] | None = None,
    *,
    targets: Targets = "one",
    at: Sequence[str] = (),
    grad_cam: str = "",
    layer: str = "",
) -> Signature:
    """Writes the explainer as an ONNX file: ``(*inputs, target) -> (output, relevance, bias)``, standard operators only.

    Args:
        explainer, path, inputs, targets, at, grad_cam, layer: as for :func:`~frpc.export.torch_export`. Weights of more than 2 GB
            go to a file beside it.

    Raises:
        PackageError: without the extra ``frpc[export]``.
        ExportError: if an operator cannot be written in ONNX.
        InputError, OptionError, LayerNameError: see :func:`frpc.export.traced.traced`.
    """
    for name in ("onnx", "onnxscript"):
        require(name, "export", "Writing ONNX files")
    program, signature = traced(explainer, Question(targets, tuple(at), grad_cam, layer), inputs, ONNX_REWRITES)
    made = _translated(program, signature)
    foreign = {f"{node.domain}::{node.op_type}" for node in made.model.graph.all_nodes() if node.domain not in ("", "ai.onnx")}
    if foreign or made.model.functions:
        raise ExportError(f"The ONNX file of {signature.model} would need non-standard operators: {sorted(foreign)}")
    made.model.metadata_props[METADATA] = signature.to_json()
    made.save(str(path))
    return signature


def _translated(program: ExportedProgram, signature: Signature) -> Any:
    """Translates a traced program.

    The exporter's own rewriting takes longest for long programs, and runtimes simplify what they load anyway.
    """
    with warnings.catch_warnings(), trace_lock:
        warnings.simplefilter("ignore")  # of its own deprecated calls
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, optimize=False,
                input_names=list(signature.names), output_names=list(signature.outputs), dynamic_shapes=signature.free,
                custom_translation_table=translations(),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{signature.model} cannot be written as ONNX: {_last_line(error)}") from error
    assert made is not None
    return made


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def run_onnx(path: str | Path, threads: int | None = None) -> tuple[Callable[..., list[Tensor]], Signature]:
    """Opens a file for running in ONNX Runtime, on the CPU.

    Raises:
        PackageError: without the extra ``frpc[export]``.
        InputError: if frpc did not write it.
    """
    runtime = require("onnxruntime", "export", "Running ONNX files")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every constant that it folds away
    options.intra_op_num_threads = threads or 0
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise InputError(f"{path} was not written by frpc.export.onnx: its metadata has no entry {METADATA!r}.")
    signature = Signature.from_json(text, path)

    def run(*given: Tensor) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(signature.names, given, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    return run, signature
