"""An exported explainer in ONNX Runtime, beside ONNX Runtime's own forward pass of the same model.

The model alone is written by PyTorch's exporter, and both run in the same process with the same number of threads. Nothing is
timed before the file agrees with its explainer.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

import frpc
import frpc.export
from bench.machine import Spread, interleave, machine, make_table, open_console, write_record

__all__ = ["run"]

QUESTIONS = {"one": "one target", "top": "the predicted class", "several": "five targets"}


def run(nets: Sequence[str], side: int, batch: int, threads: int, rounds: int, file: Path | None) -> int:
    """Measures every net; returns the exit code."""
    console, where = open_console(), machine(threads)
    where["versions"]["onnxruntime"] = __import__("onnxruntime").__version__
    results = [_measure(net, side, batch, threads, rounds) for net in nets]
    table = make_table("net", "asked", "ms", "x forward", "quartiles", "error of output", left=2)
    for found in results:
        table.add_row(found["net"], "forward pass alone", f"{1e3 * found['forward']['median']:.1f}", "", "", "")
        for row in found["asked"]:
            ratio = row["ratio"]
            spread = f"{ratio['low_quartile']:.2f}-{ratio['high_quartile']:.2f}"
            cells = (f"{1e3 * row['seconds']['median']:.1f}", f"{ratio['median']:.2f}", spread, f"{row['output error']:.1e}")
            table.add_row("", QUESTIONS[row["targets"]], *cells)
    console.print(table)
    settings = {"side": side, "batch": batch, "rounds": rounds}
    write_record(console, file, "export", settings, where, results)
    return 0


def _measure(net: str, side: int, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(net, weights=None).eval()
    explainer = frpc.compile(model, (torch.randn(1, 3, side, side),))
    x = torch.randn(batch, 3, side, side).numpy()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        ways: dict[str, Callable[[], object]] = {"forward": _forward(model, here / "plain.onnx", x, threads)}
        errors = {}
        for targets in QUESTIONS:
            path = here / f"{targets}.onnx"
            frpc.export.onnx(explainer, path, targets=targets)  # type: ignore[arg-type]
            errors[targets] = _errors(frpc.export.verify(path, explainer, batches=(1,)))
            ways[targets] = _explained(path, targets, x, threads)
        times = interleave(ways, rounds, net)
    forward = times.pop("forward")
    asked = [
        {
            "targets": targets,
            **errors[targets],
            "seconds": vars(Spread.of(seconds)),
            "ratio": vars(Spread.of([s / f for s, f in zip(seconds, forward, strict=True)])),
        }
        for targets, seconds in times.items()
    ]
    return {"net": net, "forward": vars(Spread.of(forward)), "asked": asked}


def _errors(report: frpc.export.Report) -> dict[str, Any]:
    """How far the file is from its explainer: the output, and the map of samples on no edge of the model, and of those on one."""
    (output,) = (row for row in report.rows if row.name == "output")
    (maps,) = (row for row in report.rows if row.name == "relevance")
    found = {
        "output error": max(e for e in (output.error, output.edge) if not math.isnan(e)),
        "error": None if math.isnan(maps.error) else maps.error,
        "error on edges": None if math.isnan(maps.edge) else maps.edge,
    }
    return {**found, "edges": report.edges, "samples": report.samples}


def _forward(model: nn.Module, path: Path, x: Any, threads: int) -> Callable[[], object]:
    """The model alone, as PyTorch's own exporter writes it."""
    free = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(2, *x.shape[1:]),), dynamic_shapes=({0: free},))
    made: Any = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False, input_names=["x"])
    made.save(str(path))
    session = _session(path, threads)
    return lambda: session.run(None, {"x": x})


def _explained(path: Path, targets: str, x: Any, threads: int) -> Callable[[], object]:
    session = _session(path, threads)
    feed = {session.get_inputs()[0].name: x}
    if targets != "top":
        feed["target"] = np.zeros(len(x) if targets == "one" else (len(x), 5), np.int64)
    return lambda: session.run(None, feed)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
