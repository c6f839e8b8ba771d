"""Answering for a whole layer: the strategies, what each would cost, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assignment
from frpc.core.graph import first_result
from frpc.core.sizes import human_bytes, numel
from frpc.emit.bias import BiasPolicy
from frpc.emit.plan import total_cost
from frpc.emit.propagate import push
from frpc.errors import MemoryLimitError, OptionError
from frpc.layers.context import LayerContext, layer_context
from frpc.layers.maps import LayerMaps
from frpc.windows import Grid, Rows, skip_shut_windows, stream
from frpc.windows.run import producers, working_elements

__all__ = ["LAYER_STRATEGIES", "Candidate", "LayerPlan", "layer_maps"]

LayerStrategy = Literal["windows", "forward", "transposed"]
LAYER_STRATEGIES: tuple[LayerStrategy, ...] = ("windows", "forward", "transposed")
Pulled = Callable[[Tensor], Tensor]
"""Answers seeds at the layer, ``[K, B, *layer]``, with local pixel maps ``[K, B, H0, W0]``."""

# What the cost model takes one core pair to do; only ratios between strategies matter.
_FLOPS_PER_SECOND = 2e11
_BYTES_PER_SECOND = 1.2e10
_SECONDS_PER_CALL = 8e-6

_SMALL_RUN = 1e8  # bytes


@dataclass(frozen=True)
class Candidate:
    """One possible strategy for the layer.

    Attributes:
        strategy: ``windows``, ``forward`` (dense columns, thesis algorithm 1) or ``transposed`` (one pass a neuron).
        flops, bytes: its cost.
        seconds: the cost model's weight of the two; a comparison, not a promise.
    """

    strategy: LayerStrategy
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class LayerPlan:
    """How all neurons of a layer are answered; prints as a table.

    Attributes:
        strategy: the chosen one.
        why: the reason.
        candidates: all that can answer, cheapest first.
        ended: the operator at which windows end and why, or None.
    """

    layer: str
    strategy: LayerStrategy
    why: str
    candidates: tuple[Candidate, ...]
    ended: str | None
    working: Callable[[tuple[int, int]], float] = field(repr=False, compare=False)
    width: int

    def column_spans(self, limit: int) -> list[tuple[int, int]]:
        """Splits the layer's columns into the fewest runs whose working memory stays under ``limit`` bytes.

        A run of one column is taken however small the limit, if it needs no more than a few bands of small layers.

        Raises:
            MemoryLimitError: if even one column needs more; says how much.
        """
        for parts in range(1, self.width + 1):
            spans = list(pairwise(round(k * self.width / parts) for k in range(parts + 1)))
            if max(self.working(span) for span in spans) <= limit:
                return spans
        least = max(self.working(span) for span in spans)
        if least <= _SMALL_RUN:
            return spans
        raise MemoryLimitError(
            f"{self.layer}: one column of positions needs {human_bytes(least)}, but the limit is "
            f"{human_bytes(limit)}. Raise memory_limit, or explain single neurons with explainer.neurons()."
        )

    @property
    def heading(self) -> str:
        """The choice and its reason."""
        ended = f"\nwindows end at {self.ended}" if self.ended else ""
        return f"all neurons of {self.layer}: {self.strategy} ({self.why}){ended}"

    @property
    def memory(self) -> str:
        """What the choice needs while it runs."""
        return f"working memory {human_bytes(self.working((0, self.width)))} for all columns at one time"

    def cells(self) -> list[tuple[str, str, str, str]]:
        """The candidates as text: the names of the columns, then a row for each."""
        rows = [(c.strategy, f"{c.flops / 1e9:.2f}", f"{c.bytes / 1e9:.3f}", f"{c.seconds:.3f}") for c in self.candidates]
        return [("strategy", "GFLOP", "GB moved", "weight"), *rows]

    def __str__(self) -> str:
        table = [f"{name:<12} {flops:>12} {moved:>10} {weight:>10}" for name, flops, moved, weight in self.cells()]
        return "\n".join([self.heading, *table, self.memory])


def layer_maps(
    assignment: Assignment,
    name: str,
    layer: fx.Node,
    inputs: Sequence[Tensor],
    policy: BiasPolicy,
    strategy: str,
    memory_limit: int,
    pulled: Pulled,
) -> LayerMaps:
    """Returns the maps of every neuron of a layer.

    Args:
        assignment: rules of the graph.
        name, layer: the layer's module path and node.
        inputs: the model's inputs; exactly one.
        policy: where constants go.
        strategy: ``auto`` or a forced one.
        memory_limit: bytes the maps may take.
        pulled: answers seeds at the layer by the compiled transposed pass.

    Raises:
        InputError: for models with several inputs.
        OptionError: for an unknown strategy, or one that cannot answer for this layer.
    """
    if policy == "receptive_field":
        raise OptionError(
            'Maps of whole layers support bias="uniform" and "separate"; for "receptive_field" use explainer.neurons().'
        )
    context = layer_context(assignment, layer, inputs)
    values, bias, ended = context.values, context.bias, context.ended
    rows = None if context.rows is None else skip_shut_windows(context.rows)
    plan = _choose(context, name, rows, ended, strategy)
    produce, window = _producer(context, plan.strategy, rows, pulled)

    def channel_maps(chosen: list[int] | None) -> Tensor:
        channels = list(range(int(values.shape[1]))) if chosen is None else chosen
        local = _pull_chunks(pulled, values, [_channel_seed(values, c) for c in channels])
        share = bias.flatten(2).sum(-1) if bias.dim() > 2 else bias
        return _uniform(local.movedim(0, 1), share[:, channels], policy)

    def neuron(sample: int, index: tuple[int, ...]) -> Tensor:
        seed = torch.zeros_like(values)
        seed[(sample, *index)] = 1
        return _uniform(pulled(seed[None])[0, sample], bias[(sample, *index)], policy)

    return LayerMaps(name, values, bias, window, context.cells, policy, plan, produce, channel_maps, neuron, memory_limit)


def _uniform(local: Tensor, bias: Tensor, policy: BiasPolicy) -> Tensor:
    if policy == "separate":
        return local
    return local + (bias / (local.shape[-1] * local.shape[-2]))[..., None, None]


def _channel_seed(values: Tensor, channel: int) -> Tensor:
    seed = torch.zeros_like(values)
    seed[:, channel] = 1
    return seed


def _pull_chunks(pulled: Pulled, values: Tensor, seeds: Sequence[Tensor]) -> Tensor:
    """Answers many seeds, as many at a time as keep one activation-sized tensor near 64 MB."""
    size = max(1, min(32, (1 << 24) // max(1, values.numel())))
    chunks = [torch.stack(list(seeds[k : k + size])) for k in range(0, len(seeds), size)]
    return torch.cat([pulled(chunk) for chunk in chunks])


def _choose(context: LayerContext, name: str, rows: Rows | None, ended: str | None, strategy: str) -> LayerPlan:
    batch, cost = int(context.values.shape[0]), total_cost(context.assignment, context.nodes)
    neurons, cells = context.values[0].numel(), context.cells[0] * context.cells[1]
    calls = 4.0 * len(context.nodes)
    found = [_weigh("transposed", neurons * batch * cost.flops, neurons * batch * cost.bytes, calls * max(1.0, neurons / 32))]
    if context.one_way is None:
        found.append(_weigh("forward", cells * batch * cost.flops, cells * batch * cost.bytes, calls * max(1.0, cells / 64)))
    elif strategy in ("forward", "windows"):
        raise OptionError(
            f'strategy="{strategy}": {context.one_way} works only backwards from the output; use strategy="transposed".'
        )
    whole = float(context.values.numel() * cells * context.values.element_size())
    width = int(context.values.shape[-1]) if context.values.dim() > 2 else 1
    order = [] if rows is None else producers(rows)
    if rows is not None:
        flops, moved = sum(r.flops() for r in order), sum(r.moved() for r in order)
        size = context.values.element_size() * batch
        found.append(_weigh("windows", batch * flops, size * moved, sum(r.calls() for r in order)))
    candidates = tuple(sorted(found, key=lambda c: c.seconds))
    chosen, why = candidates[0].strategy, "the least work"
    if strategy != "auto":
        chosen, why = _forced(strategy, candidates, ended), "requested"

    def working(span: tuple[int, int]) -> float:
        if chosen != "windows" or rows is None:
            return whole * (span[1] - span[0]) / width
        return working_elements(rows, order, span) * context.values.element_size() * batch

    return LayerPlan(name, chosen, why, candidates, ended, working, width)


def _weigh(strategy: LayerStrategy, flops: float, moved: float, calls: float) -> Candidate:
    seconds = flops / _FLOPS_PER_SECOND + moved / _BYTES_PER_SECOND + calls * _SECONDS_PER_CALL
    return Candidate(strategy, flops, moved, seconds)


def _forced(strategy: str, candidates: Sequence[Candidate], ended: str | None) -> LayerStrategy:
    for candidate in candidates:
        if candidate.strategy == strategy:
            return candidate.strategy
    if strategy == "windows":
        raise OptionError(f'strategy="windows" does not work for this layer: windows end at {ended}.')
    raise OptionError(f"strategy={strategy!r} is unknown for a layer; choose auto, {', '.join(LAYER_STRATEGIES)}.")


Produce = Callable[[tuple[int, int], tuple[int, int]], Iterator[tuple[int, Tensor]]]


def _producer(
    context: LayerContext, strategy: LayerStrategy, rows: Rows | None, pulled: Pulled
) -> tuple[Produce, tuple[Grid, Grid]]:
    """Returns what yields the layer's rows of windows, and the windows' geometry."""
    height, width = context.cells
    whole = (Grid(0, 0, height), Grid(0, 0, width))
    if strategy == "windows":
        assert rows is not None
        order = producers(rows)
        return lambda span, columns: stream(rows, order, columns, span), rows.grids
    if strategy == "forward":
        chunk = _cells_at_once(context)
        return lambda span, columns: _dense_rows(context, chunk, span, columns), whole
    return lambda span, columns: _transposed_rows(context, pulled, span, columns), whole


def _cells_at_once(context: LayerContext) -> int:
    """How many input cells go forward together, so that the largest value stays near 64 MB."""
    shapes = (first_result(n.meta["val"]).shape[1:] for n in context.nodes)  # the batch may stand behind: no guard on it
    return max(1, min(64, (1 << 24) // max((numel(shape) for shape in shapes), default=1)))


def _dense_rows(
    context: LayerContext, chunk: int, span: tuple[int, int], columns: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Thesis algorithm 1: every input cell is a column of a batch that goes through the net's own operators."""
    x, source = context.x, context.assignment.sources[0]
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(1)  # [B, C, cells]
    cells = int(flat.shape[-1])
    parts = []
    for low in range(0, cells, chunk):
        index = torch.arange(low, min(low + chunk, cells))
        here = x.new_zeros([len(index), *flat.shape])
        here[torch.arange(len(index)), :, :, index] = flat[..., index].movedim(-1, 0)
        with torch.no_grad():
            carried = push(context.assignment, context.maps, {source: here.reshape([-1, *x.shape])}, context.layer)
        if carried is None:  # the layer does not depend on the input
            carried = torch.zeros_like(context.values).expand([len(index), *context.values.shape])
        parts.append(_spatial(carried)[:, :, :, slice(*span), slice(*columns)].movedim(0, -1).contiguous())
    whole = torch.cat(parts, -1).unflatten(-1, context.cells)
    yield span[0], whole


def _spatial(columns: Tensor) -> Tensor:
    """``[n, B, C, *spatial] -> [n, B, C, H, W]``."""
    if columns.dim() == 5:
        return columns
    return columns[..., None, None] if columns.dim() == 3 else columns.unsqueeze(-2)


def _transposed_rows(
    context: LayerContext, pulled: Pulled, span: tuple[int, int], columns: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """One transposed pass for every neuron, many at a time."""
    values = context.values
    channels = int(values.shape[1])
    for i in range(*span):
        seeds = []
        for c in range(channels):
            for j in range(*columns):
                seed = torch.zeros_like(values)
                place = (c,) if values.dim() == 2 else (c, j) if values.dim() == 3 else (c, i, j)
                seed[(slice(None), *place)] = 1
                seeds.append(seed)
        local = _pull_chunks(pulled, values, seeds)  # [C * w, B, H0, W0]
        yield i, local.unflatten(0, (channels, -1)).movedim(2, 0).unsqueeze(2)
