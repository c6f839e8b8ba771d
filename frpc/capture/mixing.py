"""Are samples independent, and where are they in every value? A graph is run with some samples changed.

What changes in a value then belongs to those samples. Where that contradicts every place that samples could have, they were mixed
or moved; where it reaches the result of another sample, the model does not treat samples apart.

A model need not take every number: an index may be out of range, a span may end before it begins. So samples are changed for
others of the example, whole; numbers that are not whole are moved towards 0; and what fails is not tried, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from frpc.capture.batch import FIRST, Batch, Evidence, axes_of, batches_of, fitting, place_of
from frpc.core.graph import describe, fetch, first_result

__all__ = ["NODES", "Trial", "trial"]

aten = torch.ops.aten

_COUNT = 3  # samples of a free batch: one to look at, and one before and behind it

NODES = (
    "If the first dimension counts the nodes of a graph, or other things that belong together, it is not the batch: store the "
    "graph as a buffer of the model and explain [B, nodes, features], e.g. with torch.vmap inside forward."
)


@dataclass(frozen=True)
class Trial:
    """What :func:`trial` found.

    Attributes:
        mixing: how samples depend on each other, in words; None if they do not.
        untested: why this could not be tested for all inputs; None if it could.
        samples: how many samples the example had.
        misshapen: why the output is not one result per sample, in words; None if it is.
    """

    mixing: str | None = None
    untested: str | None = None
    misshapen: str | None = None
    samples: int = 0


def trial(graph_module: fx.GraphModule, inputs: Sequence[Tensor], fixed: int | None, apart: bool = True) -> Trial:
    """Finds where samples lie in every value of a graph, and whether the result of each depends on that sample alone.

    What is found is noted as ``node.meta["samples"]``: a :class:`~frpc.capture.batch.Batch`, or in words why none is known.

    Args:
        graph_module: a canonical graph.
        inputs: example inputs of the model, of any batch size if it is free.
        fixed: the batch size, if it is fixed.
        apart: test whether samples are independent; if false, nothing is run if sizes say enough.

    Returns:
        what is wrong, if anything is.
    """
    result = graph_module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    guesses = batches_of(graph_module.graph, fixed)
    if guesses.get(result) != FIRST or not result.meta["val"].dim():
        return Trial(
            misshapen=f"The explained output {describe(result.meta['val'])} does not have one result for each sample, samples "
            f"first.\n    {place_of(result)}\n  Make the model return [B, ...], or choose another of its outputs with output=."
        )
    if fixed == 1 or not (apart or fixed is not None or any(batch.factor != 1 for batch in guesses.values())):
        return Trial()
    count = fixed or _COUNT
    base = [x.detach()[torch.arange(count, device=x.device) % x.shape[0]] for x in inputs]
    members = _members(count)
    failure: Exception | None = None
    for change in (_moved, _exchanged, _nudged):
        changed = change(inputs, base)
        varied = [not torch.equal(x, y) for x, y in zip(base, changed, strict=True)]
        if not any(varied) and change is not _nudged:
            continue
        runs = [base, *([_mixed(x, y, m) for x, y in zip(base, changed, strict=True)] for m in members)]
        try:
            seen = _Run(graph_module, runs, members, fixed, guesses)
            seen.run()
        except Exception as error:  # whatever an operator makes of numbers that it does not take
            failure = error
            continue
        return _verdict(graph_module, result, seen, inputs, varied)
    return _failed(graph_module, base, failure)


def _verdict(
    graph_module: fx.GraphModule, result: fx.Node, seen: _Run, inputs: Sequence[Tensor], varied: Sequence[bool]
) -> Trial:
    places: dict[fx.Node, Batch | None] = {}
    for node, evidence in seen.evidence.items():
        places[node] = fitting(evidence, seen.guesses.get(node))
        if places[node] is not None:
            node.meta["samples"] = places[node]
        elif evidence.seen:
            node.meta["samples"] = "it cannot be told which of its elements belong to which sample"
    if result in seen.evidence and not seen.evidence[result].allows(FIRST):
        first = next((n for n, place in places.items() if place is None and _is_computed(n)), result)
        whole = any(not x.is_floating_point() for x in inputs)
        return Trial(
            "One sample's result depends on the other samples of the batch, so no map of that sample could sum to it.\n"
            f"    {place_of(first)}\n"
            "  Make samples independent in the model; if it compares samples, store fixed partners as buffers."
            f"{' ' + NODES if whole else ''}"
        )
    still = [str(i) for i, x in enumerate(inputs) if not varied[i] and x.numel() and not seen.overridden]
    if still:
        return Trial(untested=f"input {', '.join(still)} could not be changed: give example inputs of two different samples")
    return Trial(samples=int(inputs[0].shape[0]))


def _is_computed(node: fx.Node) -> bool:
    value = first_result(node.meta.get("val"))
    return node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point() and "samples" in node.meta


def _failed(graph_module: fx.GraphModule, base: Sequence[Tensor], failure: Exception | None) -> Trial:
    """The result if every change fails: the model does not accept its samples in a batch, or not other values."""
    said = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
    try:
        with torch.no_grad():
            graph_module(*base)
    except Exception:
        return Trial(
            f"The model fails on a batch of its own example samples ({said}): the samples are not independent.\n  {NODES}"
        )
    return Trial(untested=f"the model fails with other values than the example's ({said})")


def _members(count: int) -> Tensor:
    """Which samples each run changes, ``[runs, count]``: for every two samples, some run changes only the first."""
    if count <= 4:
        return torch.eye(count, dtype=torch.bool)
    bits = [(torch.arange(count) >> bit) & 1 == 1 for bit in range((count - 1).bit_length())]
    return torch.stack([half for bit in bits for half in (bit, ~bit)])


def _mixed(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    chosen = members.to(x.device).reshape([-1, *[1] * (x.dim() - 1)])
    return torch.where(chosen, y, x)


# ---- other samples of the same kind ------------------------------------------------------------------------------------


def _partners(inputs: Sequence[Tensor], base: Sequence[Tensor], whole: bool) -> list[int | None]:
    """For each sample the index of another one in the example with different integers, or any difference; None without."""
    asked = [i for i, x in enumerate(inputs) if not (whole and x.is_floating_point())]
    found: list[int | None] = []
    for k in range(base[0].shape[0]):
        rows = range(inputs[0].shape[0])
        found.append(next((j for j in rows if any(not torch.equal(inputs[i][j], base[i][k]) for i in asked)), None))
    return found


def _taken(x: Tensor, rows: Sequence[int | None], otherwise: Tensor) -> Tensor:
    """The chosen samples of the example; ``otherwise`` if there are none."""
    return torch.stack([otherwise[k] if j is None else x[j] for k, j in enumerate(rows)]) if rows else otherwise


def _moved(inputs: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    """Real numbers nearer to 0; integers of another sample, or in another order if there is none."""
    rows = _partners(inputs, base, whole=True)
    pairs = zip(inputs, base, strict=True)
    return [0.37 * b + 0.21 if b.is_floating_point() else _taken(x.detach(), rows, _turned(b)) for x, b in pairs]


def _turned(x: Tensor) -> Tensor:
    """The same integers in another order; not on devices where an index out of range ends the process."""
    if x.device.type != "cpu" and x.dtype is not torch.bool:
        return x
    turned = x.flip(-1) if x.dim() > 1 else x
    if x.dtype is torch.bool and x.dim() > 1 and torch.equal(turned, x):
        turned = torch.cat([x[..., :-1], ~x[..., -1:]], -1)
    return turned


def _exchanged(inputs: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    """Other samples of the example, as they are."""
    rows = _partners(inputs, base, whole=False)
    return [_taken(x.detach(), rows, b) for x, b in zip(inputs, base, strict=True)]


def _nudged(inputs: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    """Real numbers nearer to 0 by a little; whole ones as they are."""
    return [b * 0.999 if b.is_floating_point() else b for b in base]


# ---- running them side by side -----------------------------------------------------------------------------------------


class _Run:
    """One graph at several inputs, node by node, so that no value is held longer than it is read.

    Attributes:
        evidence: what changed in each node's (first) result.
        overridden: embeddings were changed instead of the integers that index them.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        runs: Sequence[Sequence[Tensor]],
        members: Tensor,
        fixed: int | None,
        guesses: dict[fx.Node, Batch],
    ) -> None:
        self.module, self.runs, self.members, self.fixed, self.guesses = graph_module, runs, members, fixed, guesses
        self.evidence: dict[fx.Node, Evidence] = {}
        self.overridden = False

    def run(self) -> None:
        graph = self.module.graph
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last.items():
            done.setdefault(reader, []).append(node)
        values: dict[fx.Node, list[Any]] = {}
        feeds = [iter(run) for run in self.runs]
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "output":
                    break
                values[node] = self._values(node, values, feeds)
                if node.op != "get_attr":
                    self._note(node, [first_result(v) for v in values[node]])
                for old in done.get(node, []):
                    del values[old]

    def _values(self, node: fx.Node, values: dict[fx.Node, list[Any]], feeds: Sequence[Any]) -> list[Any]:
        if node.op == "placeholder":
            return [next(feed) for feed in feeds]
        if node.op == "get_attr":
            return [fetch(self.module, str(node.target))] * len(self.runs)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        found = []
        for held in ({n: values[n][k] for n in node.all_input_nodes} for k in range(len(self.runs))):
            args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
            found.append(target(*args, **kwargs))
        return self._embedded(node, found) if node.target is aten.embedding.default else found

    def _embedded(self, node: fx.Node, found: list[Tensor]) -> list[Tensor]:
        """If the integers that index an embedding could not be changed, changes its result."""
        guess = self.guesses.get(node)
        if self.fixed is not None or guess is None or any(not torch.equal(found[0], other) for other in found[1:]):
            return found
        self.overridden, count = True, self.members.shape[1]
        owner = torch.arange(count).repeat_interleave(guess.inner).repeat(guess.outer)
        changed = [found[0]]
        for member in self.members:
            chosen = member[owner].to(found[0].device).reshape([*[1] * guess.axis, -1, *[1] * (found[0].dim() - 1 - guess.axis)])
            changed.append(torch.where(chosen, 0.37 * found[0] + 0.21, found[0]))
        return changed

    def _note(self, node: fx.Node, found: Sequence[Any]) -> None:
        base, example = found[0], first_result(node.meta.get("val"))
        if not isinstance(base, Tensor) or not isinstance(example, Tensor) or base.layout is not torch.strided:
            return
        axes = axes_of(example, self.fixed)
        if any(other.shape != base.shape for other in found[1:]):
            return
        known, guess = self._told(base, found[1:], axes, 0.0), self.guesses.get(node)
        if known.seen and fitting(known, guess) is None and base.is_floating_point():
            # Rounding may depend on the rest of the batch: such small changes count as none.
            finite = base.nan_to_num(0.0, 0.0, 0.0)
            known = self._told(base, found[1:], axes, 16 * torch.finfo(base.dtype).eps * float(finite.abs().amax()))
        self.evidence[node] = known

    def _told(self, base: Tensor, others: Sequence[Tensor], axes: Sequence[int], slack: float) -> Evidence:
        seen = False
        places: dict[int, list[Tensor]] = {axis: [] for axis in axes}
        for other in others:
            differs = other != base
            if slack:
                differs = differs & ~((other - base).abs() <= slack)
            if base.is_floating_point() or base.is_complex():
                differs = differs & ~(torch.isnan(other) & torch.isnan(base))
            seen = seen or bool(differs.any())
            for axis in axes:
                places[axis].append(differs.movedim(axis, 0).reshape(base.shape[axis], -1).any(1).cpu())
        return Evidence({axis: torch.stack(rows) for axis, rows in places.items()}, self.members, seen)
