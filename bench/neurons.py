"""What the maps of every neuron of a layer cost, in units of the net's own eager forward pass, beside other ways to get them.

All ways run in the same rounds on the same net and input: the net's forward pass under ``inference_mode``, frpc, the thesis's
dense algorithm, and what autograd offers. The autograd peers stop at the layer, so they do not pay for what lies behind it.
A way too slow to run whole is timed on a sample of the neurons or input cells and scaled; the table says so. Nothing is timed
before frpc's maps have been found to sum to the neurons' values and to agree with the dense algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap

import frpc
from bench.machine import Spread, interleave, machine, make_table, open_console, write_record
from bench.nets import THESIS, build, layer_path
from bench.thesis import algorithm_one
from frpc.emit.propagate import push
from frpc.errors import OptionError
from frpc.layers.context import LayerContext, layer_context
from frpc.layers.maps import LayerMaps

__all__ = ["run"]

FORWARD, FRPC, DENSE = "forward", "frpc", "dense, in chunks"
LITERAL = "dense, as the thesis writes it"
JACREV, JVP, CAPTUM = "jacrev", "vmap(jvp)", "Captum loop"
RESIDUAL_BOUND, AGREEMENT_BOUND = 1e-5, 1e-5  # float32: relative to sum|V| of each neuron
CHUNK = 64  # columns that go through the net together
CAPTUM_SAMPLE = 16
DENSE_WEIGHT, DENSE_BYTES = 30.0, 2e9  # beyond either the dense algorithm runs on a sample of cells
GOAL_RATIO = 3.0
GOAL_FASTER = {LITERAL: 100.0, DENSE: 100.0, JACREV: 5000.0, CAPTUM: 5000.0}


class _Stop(Exception):  # noqa: N818 - it stops a forward pass where nothing is wrong
    def __init__(self, value: Tensor) -> None:
        self.value = value


class UpTo(nn.Module):
    """A model that ends at one of its layers and returns that layer's output."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        def stop(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            raise _Stop(output)

        handle = self.layer.register_forward_hook(stop)
        try:
            self.model(x)
        except _Stop as stopped:
            return stopped.value
        finally:
            handle.remove()
        raise AssertionError("the model does not run its layer")


@dataclass(frozen=True)
class Way:
    """One way to the maps.

    Attributes:
        call: does the work on ``sample`` of ``whole`` units.
        unit: what is sampled.
        differs: how far its maps are from frpc's, relative L1, or None where there is nothing to compare.
        missing: why it cannot run, or empty.
    """

    call: Callable[[], Any]
    sample: int = 1
    whole: int = 1
    unit: str = ""
    differs: float | None = None
    missing: str = ""

    @property
    def factor(self) -> float:
        return self.whole / self.sample


@dataclass(frozen=True)
class Case:
    """One layer of a net at one input, and the samples that slow ways run on."""

    net: str
    layer: str
    model: nn.Module
    x: Tensor
    explainer: frpc.Explainer
    memory_limit: int
    context: LayerContext
    neurons: tuple[Tensor, ...] = field(repr=False)  # index along each axis, [n] each
    cells: Tensor = field(repr=False)  # flat positions in the input, [n]

    def forward(self) -> Tensor:
        with torch.inference_mode():
            return self.model(self.x)

    def maps(self, strategy: str = "auto") -> LayerMaps:
        with torch.inference_mode():
            maps = self.explainer.layer(self.layer, self.x, strategy=strategy, memory_limit=self.memory_limit)
            assert maps.local.numel()  # computes them
        return maps

    def columns(self, cells: Tensor) -> Tensor:
        """The thesis's algorithm on some cells, ``[n, B, *layer]``, without the layer's values and the maps' layout."""
        source = self.context.assignment.sources[0]
        with torch.inference_mode():
            parts = [
                push(self.context.assignment, self.context.maps, {source: one_cell_each(self.x, chunk)}, self.context.layer)
                for chunk in cells.split(CHUNK)
            ]
        return torch.cat([part for part in parts if part is not None])


def one_cell_each(x: Tensor, cells: Tensor) -> Tensor:
    """Copies of the input of which each keeps one cell, ``[n, *x.shape]``."""
    flat = x.flatten(2)
    here = x.new_zeros([len(cells), *flat.shape])
    here[torch.arange(len(cells)), :, :, cells] = flat[..., cells].movedim(-1, 0)
    return here.reshape([-1, *x.shape])


def context_of(explainer: frpc.Explainer, layer: str, x: Tensor) -> LayerContext:
    """What frpc itself starts from, to run its dense columns on some cells only."""
    prepared = explainer.programs.prepared((x,))
    query = explainer.programs.query_with(columns=True, of=layer, bias="separate")
    assignment = explainer.programs.assignment(prepared, (x,), query)
    node = assignment.layer_node(layer)
    assert node is not None
    return layer_context(assignment, node, (x,))


def prepare(net: str, layer: str, side: int, batch: int = 1, sample: int = CHUNK, limit: float = 4e9, width: float = 1.0) -> Case:
    """Builds and captures a net with random weights; what is timed does not depend on the weights' values."""
    model, x = build(net, side, batch, width)
    layer = layer_path(net, layer)
    explainer = frpc.compile(model, bias="separate")
    context = context_of(explainer, layer, x)
    sizes = tuple(context.values.shape[1:])
    chance = torch.Generator().manual_seed(0)
    neurons = torch.randperm(context.values[0].numel(), generator=chance)[:sample]
    cells = torch.randperm(x[0, 0].numel(), generator=chance)[:sample]
    return Case(net, layer, model, x, explainer, int(limit), context, torch.unravel_index(neurons, sizes), cells)


# ---- ways -------------------------------------------------------------------------------------------------------


def gate(case: Case, maps: LayerMaps) -> tuple[dict[str, float], Tensor]:
    """Checks every neuron's sum, and sampled maps against the dense algorithm.

    Returns:
        the errors, and the sampled neurons' pixel maps ``[B, k, cells]``.

    Raises:
        AssertionError: if either is off by more than rounding.
    """
    index = torch.stack(case.neurons, 1).tolist()
    pixels = torch.stack([torch.stack([maps[(b, *one)] for one in index]) for b in range(len(case.x))]).flatten(2)
    errors = {
        "residual": float(maps.residual().max()),
        "dense": difference(pixels, picked(case, case.columns(case.cells)).movedim(0, -1), case.cells),
    }
    if dense_fits(case, maps):
        local = case.maps("forward").local.reshape([*maps.values.shape, -1])
        errors["dense"] = max(errors["dense"], difference(pixels, local[(slice(None), *case.neurons)]))
    if not (errors["residual"] <= RESIDUAL_BOUND and errors["dense"] <= AGREEMENT_BOUND):
        raise AssertionError(f"{case.layer} of {case.net} is wrong, so it is not timed: {errors}")
    return errors, pixels


def difference(ours: Tensor, theirs: Tensor, cells: Tensor | None = None) -> float:
    """Returns the largest relative L1 difference of any map ``[B, k, cells]``; ``theirs`` may hold some cells only."""
    size = ours.abs().sum(-1).clamp(min=1e-30)
    here = ours if cells is None else ours[..., cells]
    return float(((here - theirs).abs().sum(-1) / size).max())


def picked(case: Case, columns: Tensor) -> Tensor:
    """The sampled neurons of columns ``[n, B, *layer]``: ``[n, B, k]``."""
    return columns[(slice(None), slice(None), *case.neurons)]


def dense_fits(case: Case, maps: LayerMaps) -> bool:
    """Says whether the dense algorithm can run whole."""
    weight = next(c.seconds for c in maps.plan.candidates if c.strategy == "forward")
    size = maps.values.numel() * case.x[0, 0].numel() * maps.values.element_size()
    return weight <= DENSE_WEIGHT and size <= min(DENSE_BYTES, case.memory_limit)


def ways_for(case: Case, maps: LayerMaps, pixels: Tensor, errors: dict[str, float]) -> dict[str, Way]:
    """Every way, checked where it can be; the peers' maps are gradient times input, frpc's own for piecewise linear nets."""
    prefix = UpTo(case.model, case.model.get_submodule(case.layer))
    neurons, cells = maps.values[0].numel(), case.x[0, 0].numel()
    if dense_fits(case, maps):
        dense = Way(lambda: case.maps("forward"), differs=errors["dense"])
    else:
        dense = Way(lambda: case.columns(case.cells), len(case.cells), cells, "cells", errors["dense"])
    ways = {FORWARD: Way(case.forward), FRPC: Way(case.maps), DENSE: dense, LITERAL: literal_way(case, maps)}

    def reverse() -> Tensor:
        return jacrev(lambda x: prefix(x)[(slice(None), *case.neurons)].sum(0), chunk_size=CHUNK)(case.x)

    def tangents() -> Tensor:
        columns = [one_cell_each(case.x, chunk) for chunk in case.cells.split(CHUNK)]
        return torch.cat([vmap(lambda t: jvp(prefix, (case.x,), (t,))[1])(chunk) for chunk in columns])

    def reverse_differs() -> float:
        return difference(pixels, (reverse() * case.x).sum(2).flatten(2).movedim(0, 1))

    def tangents_differ() -> float:
        return difference(pixels, picked(case, tangents()).movedim(0, -1), case.cells)

    ways[JACREV] = _possible(reverse, reverse_differs, len(case.neurons[0]), neurons, "neurons")
    ways[JVP] = _possible(tangents, tangents_differ, len(case.cells), cells, "cells")
    ways[CAPTUM] = captum_way(case, prefix, pixels, neurons)
    return ways


def literal_way(case: Case, maps: LayerMaps) -> Way:
    """Algorithm 1 of the thesis on all pixels at one time, for chains of layers whose columns fit in memory."""
    if len(case.x) > 1 or not dense_fits(case, maps):
        return Way(lambda: None, missing="its columns do not fit in memory")

    def call() -> Tensor:
        return algorithm_one(case.model, case.layer, case.x)

    def differs() -> float:
        columns = call()[(slice(None), *case.neurons)]  # [N, n]
        share = maps.bias[(0, *case.neurons)] / len(columns)
        ours = torch.stack([maps[(0, *one)] for one in torch.stack(case.neurons, 1).tolist()]).flatten(1)
        return difference((ours + share[:, None])[None], columns.t()[None])

    try:
        return Way(call, differs=differs())
    except OptionError as other:
        return Way(call, missing=str(other))


def captum_way(case: Case, prefix: UpTo, pixels: Tensor, neurons: int) -> Way:
    """Captum's NeuronGradient, one call a neuron."""
    try:
        from captum.attr import NeuronGradient
    except ImportError as missing:
        return Way(lambda: None, missing=f"not installed: {missing}")
    peer = NeuronGradient(prefix, prefix.layer)
    index = [tuple(one) for one in torch.stack(case.neurons, 1)[:CAPTUM_SAMPLE].tolist()]

    def loop() -> Tensor:
        return torch.stack([peer.attribute(case.x, neuron_selector=one) for one in index])

    def differs() -> float:
        return difference(pixels[:, : len(index)], (loop().detach() * case.x).sum(2).flatten(2).movedim(0, 1))

    return _possible(loop, differs, len(index), neurons, "neurons")


def _possible(call: Callable[[], Tensor], differs: Callable[[], float], sample: int, whole: int, unit: str) -> Way:
    """A peer, or the reason why it cannot answer for this net."""
    try:
        return Way(call, sample, whole, unit, differs())
    except (RuntimeError, NotImplementedError, AssertionError) as failed:
        reason = (str(failed).strip() or type(failed).__name__).splitlines()[0]
        return Way(call, missing=f"fails: {reason}")


# ---- results ----------------------------------------------------------------------------------------------------


def report(case: Case, maps: LayerMaps, errors: dict[str, float], ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Times all ways and collects everything known about the case, ready for JSON."""
    able = {name: way for name, way in ways.items() if not way.missing}
    times = interleave({name: way.call for name, way in able.items()}, rounds, f"{case.net} {case.layer}")
    scaled = {name: [t * able[name].factor for t in times[name]] for name in able}
    rows: dict[str, Any] = {name: {"missing": way.missing} for name, way in ways.items() if way.missing}
    for name, way in able.items():
        rows[name] = {
            "seconds": asdict(Spread.of(scaled[name])),
            "ratio": asdict(Spread.of([t / f for t, f in zip(scaled[name], scaled[FORWARD], strict=True)])),
            "frpc_is_faster": asdict(Spread.of([t / f for t, f in zip(scaled[name], scaled[FRPC], strict=True)])),
            "differs": way.differs,
            "sample": way.sample,
            "whole": way.whole,
            "unit": way.unit,
            "measured_rounds": times[name],
        }
    chosen = maps.plan.candidates[[c.strategy for c in maps.plan.candidates].index(maps.plan.strategy)]
    return {
        "net": case.net,
        "layer": case.layer,
        "input": list(case.x.shape),
        "neurons": len(maps),
        "window": [g.side for g in maps.window],
        "map_bytes": maps.nbytes(),
        "strategy": maps.plan.strategy,
        "flops": chosen.flops,
        "errors": errors,
        "ways": {name: rows[name] for name in ways},
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints one row for each way, and the verdict where the case has goals."""
    table = make_table("way", "seconds", "min–max", "ratio", "IQR", "frpc faster", "IQR", "differs", "measured")
    for name, way in result["ways"].items():
        if "seconds" not in way:
            table.add_row(name, *[""] * 7, way["missing"][:60])
            continue
        seconds, ratio, faster = way["seconds"], way["ratio"], way["frpc_is_faster"]
        table.add_row(
            name,
            f"{seconds['median']:.4g}",
            f"{seconds['least']:.4g}–{seconds['most']:.4g}",
            f"{ratio['median']:.4g}",
            f"{ratio['low_quartile']:.4g}–{ratio['high_quartile']:.4g}",
            "" if name in (FORWARD, FRPC) else f"{faster['median']:.4g}",
            "" if name in (FORWARD, FRPC) else f"{faster['low_quartile']:.4g}–{faster['high_quartile']:.4g}",
            "" if way["differs"] is None else f"{way['differs']:.1e}",
            f"scaled from {way['sample']} {way['unit']}" if way["whole"] > way["sample"] else "whole",
        )
    rate = result["flops"] / result["ways"][FRPC]["seconds"]["median"] / 1e9
    console.print(
        f"{result['net']} {result['layer']}, input {result['input']}: {result['neurons']:,} maps by {result['strategy']}, "
        f"windows {'x'.join(map(str, result['window']))}, {result['flops'] / 1e9:.3g} GFLOP at {rate:.0f} GFLOP/s; "
        f"worst residual {result['errors']['residual']:.1e}, sampled maps differ from dense by {result['errors']['dense']:.1e}"
    )
    console.print(table)


def missed_goals(result: dict[str, Any]) -> list[str]:
    """Returns what falls short, for the case that has goals: conv2 of the thesis's AlexNet."""
    if (result["net"], result["layer"], result["input"]) != (THESIS, layer_path(THESIS, "conv2"), [1, 3, 32, 32]):
        return []
    ways = result["ways"]
    ratio = ways[FRPC]["ratio"]["median"]
    missed = [f"ratio {ratio:.2f} > {GOAL_RATIO}"] if ratio > GOAL_RATIO else []
    for name, goal in GOAL_FASTER.items():
        faster = ways.get(name, {}).get("frpc_is_faster", {}).get("median")
        if faster is not None and faster < goal:
            missed.append(f"{faster:.0f} x faster than {name}, not {goal:.0f} x")
    return missed


def run(
    net: str,
    layers: Sequence[str],
    side: int,
    batch: int,
    sample: int,
    limit: float,
    threads: int,
    rounds: int,
    file: Path | None,
) -> int:
    """Compares frpc with its peers; returns 1 if a goal is missed."""
    console, where = open_console(), machine(threads)
    results = []
    for layer in layers:
        case = prepare(net, layer, side, batch, sample, limit)
        maps = case.maps()
        errors, pixels = gate(case, maps)
        results.append(report(case, maps, errors, ways_for(case, maps, pixels, errors), rounds))
        show(console, results[-1])
    missed = [goal for result in results for goal in missed_goals(result)]
    for goal in missed:
        console.print(f"short of the goal: {goal}")
    write_record(console, file, "neurons", {"batch": batch, "rounds": rounds}, where, results)
    return int(bool(missed))
