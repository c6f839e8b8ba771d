"""Tries one model in this process and returns what was found, ready for JSON."""

from __future__ import annotations

import copy
import gc
import math
import resource
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import frpc
from bench.coverage.subject import Inputs, Subject, each, settle, take
from bench.coverage.suites import load
from bench.machine import peak_rss
from frpc.canonicalize.precision import narrowed
from frpc.errors import UnsupportedOpError

__all__ = ["BOUNDS", "OUTPUT_BOUNDS", "VARIANCE_BOUNDS", "measure", "try_model", "work"]

TARGETS, CHECKED = 3, 2  # targets asked for, and samples of each
BOUNDS = {"float32": 1e-5, "float64": 1e-11}  # |sum V - y| / sum|V|
OUTPUT_BOUNDS = {"float32": 1e-4, "float64": 1e-10}  # relative to the largest output; float32's where the model casts to it
VARIANCE_BOUNDS = {"float32": 1e-6, "float64": 1e-10}  # relative L1 between a sample's map alone and in a batch
PLAIN_FACTOR = 2  # float32 may miss the bounds above by rounding: up to this many times what rounding does to plain PyTorch
NUDGES, NUDGE = 8, 1e-6  # how often, and by what share, the input is changed to see how well float32 determines a map
UNSETTLED = 1e-3  # by what share of its largest the output may change then, before batch statistics are taken from the inputs
SCALES = (1.0, 1e-10, 1e-20)
REASON_LINES = 6


def explain(explainer: frpc.Explainer, inputs: Inputs, target: tuple[int, ...]) -> frpc.Explanation:
    """Calls an explainer by position or by keyword."""
    one = target if len(target) > 1 else target[0]
    with torch.no_grad():
        return explainer(**inputs, target=one) if isinstance(inputs, dict) else explainer(*inputs, target=one)


def maps_of(explanation: frpc.Explanation) -> Tensor:
    """Returns the map of each sample as one row, ``[B, N]``, all inputs together, in float64."""
    found = explanation.relevance if isinstance(explanation.relevance, tuple) else (explanation.relevance,)
    return torch.cat([m.double().flatten(1) for m in found], 1)


def conservation(explanation: frpc.Explanation, target: tuple[int, ...]) -> float:
    """Returns the largest ``|sum V - y| / sum|V|`` of the samples; 0 where nothing reaches the output."""
    maps, explained = maps_of(explanation), explanation.output[(slice(None), *target)].double()
    lost = (maps.sum(1) - explained).abs()
    return float(torch.where(lost == 0, 0.0, lost / maps.abs().sum(1)).max())


def constants_share(explanation: frpc.Explanation) -> float:
    """Returns ``|beta| / (|beta| + sum |V - beta/N|)``, averaged over samples: beta is the constants' part of the output."""
    maps, beta = maps_of(explanation), explanation.bias.double()
    local = (maps - beta[:, None] / maps.shape[1]).abs().sum(1)
    return float((beta.abs() / (beta.abs() + local)).nan_to_num().mean())


def batch_variance(explainer: frpc.Explainer, inputs: Inputs, target: tuple[int, ...]) -> float | None:
    """Returns how far the first sample's map, made alone, is from its map in a batch: relative L1; None if batches are fixed."""
    if any(refusal.what == "a free batch size" for refusal in explainer.refusals):
        return None
    alone, together = (maps_of(explain(explainer, part, target))[0] for part in (take(inputs, slice(1)), inputs))
    return float((alone - together).abs().sum() / together.abs().sum())


def plain_rounding(subject: Subject, target: tuple[int, ...]) -> float | None:
    """Returns what rounding does to input x gradient by autograd, frpc not involved; None if no input is floating-point.

    Kernels add in another order for another batch size, and a ReLU next to 0 may fall to either side. Of the first sample's maps
    made alone, in the batch, and alone at inputs changed by a millionth, it is the largest relative L1 distance from the map in
    float64: closer than that the model's own arithmetic does not determine a map.
    """
    if not any(x.is_floating_point() for x in _tensors(subject.inputs)):
        return None
    found = (_rounding_at(subject, target, scale) for scale in SCALES)
    return next(filter(math.isfinite, found), math.inf)


def _rounding_at(subject: Subject, target: tuple[int, ...], scale: float) -> float:
    """The same with the output scaled, which changes no relative distance: gradients of random nets may leave float32's range."""
    one, exact, generator = take(subject.inputs, slice(1)), _exact(subject), torch.Generator().manual_seed(0)
    true = _plain_map(exact, take(exact.inputs, slice(1)), target, scale)
    nudged = (each(one, lambda x: _nudged(x, generator)) for _ in range(NUDGES))
    made = [_plain_map(subject, inputs, target, scale) for inputs in (one, subject.inputs, *nudged)]
    return float((torch.stack(made) - true).abs().sum(1).max() / true.abs().sum())


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns floating-point values changed by a millionth of themselves or so."""
    return x * (1 + NUDGE * torch.randn(x.shape, generator=generator)).to(x.dtype) if x.is_floating_point() else x


def is_unsettled(subject: Subject) -> bool:
    """Says whether a change of the input by a millionth changes the output by a thousandth: float32 tells little then."""
    nudged = each(subject.inputs, lambda x: _nudged(x, torch.Generator().manual_seed(0)))
    output = subject.explained(subject.inputs)
    return not bool((subject.explained(nudged) - output).abs().max() <= UNSETTLED * output.abs().max())


def rounding_of_outputs(subject: Subject, plain: Tensor, own: Tensor) -> dict[str, float]:
    """Returns how far the model's own output, and frpc's for its first samples, are from the model's in float64.

    The model's is the farthest of three that sum in other orders: in a batch, alone, and with its images channels-last.
    """
    exact = _exact(subject)
    true = exact.explained(exact.inputs)
    del exact
    last = each(subject.inputs, lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
    alone = take(subject.inputs, slice(1))
    far = [
        float((output - true[: len(output)]).abs().max() / true.abs().max())
        for output in (plain, subject.explained(alone), subject.explained(last), own)
    ]
    return {"plain_output": max(far[:-1]), "own_output": far[-1]}


def _exact(subject: Subject) -> Subject:
    """Returns the subject in float64; the model is copied."""
    return Subject(copy.deepcopy(subject.model), subject.inputs, subject.options).double()


def _plain_map(subject: Subject, inputs: Inputs, target: tuple[int, ...], scale: float) -> Tensor:
    """Returns input x gradient of the first sample, floating-point inputs together, in float64."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in _tensors(inputs)]
    floating = [x for x in leaves if x.requires_grad]
    given = dict(zip(inputs, leaves, strict=True)) if isinstance(inputs, dict) else tuple(leaves)
    with torch.enable_grad():
        explained = subject.result(given)[(slice(None), *target)].sum() * scale
        gradients = torch.autograd.grad(explained, floating, materialize_grads=True)
    return torch.cat([(x.detach() * g)[0].double().flatten() for x, g in zip(floating, gradients, strict=True)])


def measure(subject: Subject, dtype: str) -> dict[str, Any]:
    """Compiles a subject and checks it at random targets; the model's own output is computed before."""
    expected = subject.explained(subject.inputs)
    generator = torch.Generator().manual_seed(0)
    targets = [tuple(int(torch.randint(n, (), generator=generator)) for n in expected.shape[1:]) for _ in range(TARGETS)]
    record, own = _explained(subject, expected, targets, dtype)
    gc.collect()  # large models do not leave room for a copy in float64 beside what is compiled
    if dtype == "float32" and _is_beyond(record["output_float32"], OUTPUT_BOUNDS[dtype]):
        record |= rounding_of_outputs(subject, expected, own)
    if dtype == "float32" and _is_beyond(record["variance_float32"], VARIANCE_BOUNDS[dtype]):
        record["plain_rounding"] = plain_rounding(subject, targets[0])
    return record


def _explained(
    subject: Subject, expected: Tensor, targets: Sequence[tuple[int, ...]], dtype: str
) -> tuple[dict[str, Any], Tensor]:
    """Compiles and asks; returns what was found and the explainer's own output."""
    few = take(subject.inputs, slice(CHECKED))
    start = time.perf_counter()
    explainer = frpc.compile(subject.model, few, bias="uniform", **subject.options)
    seconds = time.perf_counter() - start
    found = [explain(explainer, few, target) for target in targets]
    rules = next(stage.program for stage in explainer.stages if stage.name == "assign").rules
    scale = float(expected.abs().max()) or 1.0
    record: dict[str, Any] = {
        "narrowed": bool(narrowed(explainer.stages[0].program)),
        "nodes": len(rules),
        "ops": sorted({str(n.target).removeprefix("aten.").removesuffix(".default") for n in rules}),
        "compile_seconds": seconds,
        f"output_{dtype}": float((found[0].output - expected[:CHECKED]).abs().max()) / scale,
        f"error_{dtype}": max(conservation(e, t) for e, t in zip(found, targets, strict=True)),
        f"variance_{dtype}": batch_variance(explainer, subject.inputs, targets[0]),
        "constants": sum(constants_share(e) for e in found) / len(found),
        "output_spread": float(expected.double().std() / scale),
    }
    return record, found[0].output


def _is_beyond(value: float | None, bound: float) -> bool:
    """Says whether a figure misses its bound, as one that is not finite does; None is a figure there is none of."""
    return value is not None and not value <= bound


def try_model(suite: str, name: str) -> dict[str, Any]:
    """Builds a model and tries frpc on it, in float32 and in float64.

    Returns:
        A record whose status is ``ok``; ``inexact`` (it runs, beyond a bound); ``missing`` (operators without a rule);
        ``raised``; or ``not built`` (the model itself does not run here).
    """
    start = time.perf_counter()
    try:
        subject = load(suite).build(name)
    except Exception as error:
        return {"status": "not built", **_reason(error)}
    record: dict[str, Any] = {"input": [list(x.shape[1:]) for x in _tensors(subject.inputs)]}
    if is_unsettled(subject):
        settle(subject.model, lambda: subject.explained(subject.inputs))
        record["settled"] = True
    record["parameters"] = sum(p.numel() for p in subject.model.parameters())
    try:
        single = measure(subject, "float32")
        gc.collect()
        record |= single | measure(subject.double(), "float64") | {"compile_seconds": single["compile_seconds"]}
    except UnsupportedOpError as error:
        record |= {"status": "missing", "missing": _gaps(error), **_reason(error)}
    except Exception as error:
        record |= {"status": "raised", **_reason(error)}
    else:
        record |= _verdict(record)
    return {**record, "seconds": time.perf_counter() - start, "peak_rss": peak_rss()}


def _tensors(inputs: Inputs) -> list[Tensor]:
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def _verdict(record: dict[str, Any]) -> dict[str, str]:
    """Holds the numbers against their bounds; what is not finite is beyond every bound."""
    outputs = dict.fromkeys(OUTPUT_BOUNDS, OUTPUT_BOUNDS["float32"]) if record["narrowed"] else OUTPUT_BOUNDS
    figures = record | {"output_float32": record.get("own_output", record["output_float32"])}
    beyond = [
        f"{what} {figures[f'{what}_{dtype}']:.1e} in {dtype}, bound {bound:.0e}"
        for what, bounds in (
            ("error", BOUNDS),
            ("output", _with_rounding(outputs, record.get("plain_output"))),
            ("variance", _with_rounding(VARIANCE_BOUNDS, record.get("plain_rounding"))),
        )
        for dtype, bound in bounds.items()
        if _is_beyond(figures[f"{what}_{dtype}"], bound)  # no variance where batches are fixed
    ]
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[key] = None
    return {"status": "inexact", "reason": "; ".join(beyond)} if beyond else {"status": "ok"}


def _with_rounding(bounds: Mapping[str, float], plain: float | None) -> dict[str, float]:
    """Returns the bounds, float32's no smaller than rounding allows."""
    return {**bounds, "float32": max(bounds["float32"], PLAIN_FACTOR * (plain or 0.0))}


def _reason(error: Exception) -> dict[str, str]:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return {"error": type(error).__name__, "reason": "\n".join(lines[:REASON_LINES])}


def _gaps(error: UnsupportedOpError) -> dict[str, int]:
    """Counts the nodes of each cause."""
    return dict(Counter(f"{gap.op} — {gap.reason}" for gap in error.gaps))


def limit_memory(gigabytes: float) -> None:
    """Makes a model that is too large fail with a message, and this process the first to go if memory runs out."""
    size = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    adjust = Path("/proc/self/oom_score_adj")
    if adjust.exists():
        adjust.write_text("1000")


def work(suite: str, memory_gb: float, peers: bool, name: str) -> dict[str, Any]:
    """Tries one model, in a process of its own."""
    limit_memory(memory_gb)
    gc.disable()  # looking for cycles through traced graphs again and again takes an eighth of the time
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if peers:
        from bench.coverage.peers import try_peers

        return try_peers(suite, name)
    return try_model(suite, name)
