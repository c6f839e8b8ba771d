"""A model made ready for any question: captured, in canonical form, and tried on samples."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.canonicalize import passes as canonicalize
from frpc.canonicalize.precision import rounding
from frpc.capture.batch import FIRST, batches_of, place_of
from frpc.capture.export import Captured, capture, check_decisive, tensors_of
from frpc.capture.mixing import NODES, Trial, trial
from frpc.core.editor import Editor
from frpc.core.graph import describe, empty_like, first_result
from frpc.core.lineage import Ledger
from frpc.core.reasons import failure, itself
from frpc.core.stages import Stage, copy_graph, named, run_passes
from frpc.errors import BatchError, FrpcError, ShapeError

aten = torch.ops.aten

__all__ = ["PreparedModel", "prepare", "with_weights"]


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """What all questions about one model share: its graph, captured and in canonical form, before batch norm is folded.

    Attributes:
        captured: the graph as it was captured.
        canonical: the same function in the operators that rules are written for.
        stages: capture and canonicalization, with their times.
        trial: whether the model treats samples apart.
        ledger: how tensors that passes made are computed from the model's own.
        output: the explained output with a batch of size 0: its sizes and type.
        rounding: the relative rounding of the coarsest type that the model computes in.
        modules: the paths of all modules.
    """

    captured: Captured
    canonical: fx.GraphModule
    stages: tuple[Stage, ...]
    trial: Trial
    ledger: Ledger
    output: Tensor
    rounding: float
    modules: tuple[str, ...] = ()

    def layer_names(self) -> list[str]:
        """Module paths of the layers, in the order they are computed."""
        return [name for node in self.canonical.graph.nodes for name in node.meta.get("layers", ())]

    def layer_example(self, layer: str) -> Tensor:
        """The example value of a layer's result."""
        node = next(n for n in self.canonical.graph.nodes if layer in n.meta.get("layers", ()))
        example = first_result(node.meta["val"])
        assert isinstance(example, Tensor)
        return example

    def check_samples_first(self, layer: str) -> None:
        """Raises an error for layers whose neurons are not one number per sample.

        Raises:
            BatchError: gives the layer's shape.
        """
        node = next(n for n in self.canonical.graph.nodes if layer in n.meta.get("layers", ()))
        places = batches_of(self.canonical.graph, self.fixed_batch)
        if places.get(node) != FIRST or isinstance(node.meta.get("samples"), str):
            raise BatchError(
                f"{layer} gives {describe(first_result(node.meta['val']))}, whose first dimension is not the samples, or "
                f"contains more: its neurons are not one number per sample.\n    {place_of(node)}\n  explainer.at() gives the "
                "relevance of all of them; to explain single ones, make the layer return [B, ...]."
            )

    @property
    def fixed_batch(self) -> int | None:
        """The batch size, if the model fixes it."""
        return self.captured.inputs[0].batch


def prepare(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: str | int | None,
    names: Sequence[str] = (),
    gradients: bool = False,
    apart: bool = True,
) -> PreparedModel:
    """Captures and canonicalizes a model, and finds where samples lie in its values.

    Args:
        model, inputs, output, names, gradients: as for :func:`frpc.capture.export.capture`.
        apart: try whether samples are treated apart.
    """
    start = time.perf_counter()
    _demand_one_batch(inputs)
    captured = capture(model, inputs, output, names, gradients)
    taken = Stage("capture", time.perf_counter() - start, (), captured.graph_module)
    canonical, canonized, ledger = _canonical(captured)
    call = functools.partial(model, **dict(zip(names, inputs, strict=True))) if names else functools.partial(model, *inputs)
    try:
        tried = trial(canonical, inputs, captured.inputs[0].batch, apart)
    except FrpcError:
        raise
    except Exception as error:  # an operator may refuse values though it took the examples' types
        raise failure(model, call, error, "The captured graph does not run, of") from error
    if tried.mixing is not None and (own := itself(model, call)) is not None:
        raise own
    unit = rounding(captured.graph_module, captured.graph_module.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]
    return PreparedModel(
        captured, canonical, (taken, canonized), tried, ledger, _output(canonical), unit, tuple(dict(model.named_modules()))
    )


def _demand_one_batch(inputs: Sequence[Tensor]) -> None:
    """Refuses inputs of different batch sizes.

    Raises:
        BatchError: if one of them may be the edges of a graph.
        ShapeError: otherwise.
    """
    sizes = sorted({int(x.shape[0]) for x in inputs if isinstance(x, Tensor) and x.dim()})
    if len(sizes) > 1:
        said = f"The inputs have different batch sizes: {sizes}."
        if any(not x.is_floating_point() and x.dim() == 2 and x.shape[0] == 2 for x in inputs):
            raise BatchError(f"{said}\n  {NODES}")
        if all(not x.is_floating_point() and x.dim() == 1 for x in inputs):
            said += " If they are tokens and offsets of an EmbeddingBag: give it bags of one length, [B, L], instead."
        raise ShapeError(f"{said} All inputs must be [B, ...]; store what is the same for all samples as a buffer of the model.")


def _canonical(captured: Captured) -> tuple[fx.GraphModule, Stage, Ledger]:
    """Puts a captured graph into canonical form; the ledger notes how what it holds came about."""
    start = time.perf_counter()
    ledger, canonical = Ledger(), copy_graph(captured.graph_module)
    ledger.name(captured.graph_module)
    passes = named(canonicalize.PASSES, run_passes(canonicalize.PASSES, canonical, ledger))
    _keep_one_result(canonical, captured.inputs[0].batch)
    return canonical, Stage("canonicalize", time.perf_counter() - start, passes, canonical), ledger


def _keep_one_result(canonical: fx.GraphModule, fixed: int | None) -> None:
    """``y -> y[None]`` where the model squeezed away a batch that is always 1."""
    output = canonical.graph.output_node()
    result: Any = output.args[0]
    if fixed == 1 and result.meta["val"].dim() == 0:
        output.args = (Editor(canonical, output).call(aten.unsqueeze.default, result, 0),)
        canonical.recompile()


def _output(canonical: fx.GraphModule) -> Tensor:
    return empty_like(canonical.graph.output_node().args[0].meta["val"])  # type: ignore[union-attr]


def with_weights(prepared: PreparedModel, model: nn.Module) -> PreparedModel:
    """Returns what queries share for other weights: the graph as it was captured, with the tensors of ``model``.

    Raises:
        WeightsError: if a tensor of the graph is missing in the model, or has another shape, dtype or device there, or if one
            whose values shaped the graph has others.
    """
    check_decisive(prepared.captured, model)
    old = prepared.captured.graph_module
    captured = dataclasses.replace(prepared.captured, graph_module=copy_graph(old, tensors_of(old, model)))
    canonical, canonized, ledger = _canonical(captured)
    taken = Stage("capture", 0.0, (), captured.graph_module)
    _keep_samples(prepared.canonical, canonical)
    return dataclasses.replace(prepared, captured=captured, canonical=canonical, stages=(taken, canonized), ledger=ledger)


def _keep_samples(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Notes on a graph of other weights where samples lie: passes make the same of it, but for names."""
    if [n.target for n in old.graph.nodes] == [n.target for n in new.graph.nodes]:
        for one, other in zip(old.graph.nodes, new.graph.nodes, strict=True):
            if "samples" in one.meta:
                other.meta["samples"] = one.meta["samples"]
