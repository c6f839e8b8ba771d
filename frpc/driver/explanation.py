"""What an explainer returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from frpc.capture.batch import FIRST, Batch, of_sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explanation", "LayerRelevance", "explanation_of", "layer_relevance_of"]


@dataclass(frozen=True, eq=False)  # compared by identity: tensors have no single truth value
class Explanation:
    """A model's output and where it comes from; unpacks as ``output, relevance = explainer(...)``.

    Attributes:
        output: the model's output, ``[B, ...]``.
        relevance: like the input, ``[B, ...]``, or ``[B, K, ...]`` for K targets; a tuple of them for several inputs.
        bias: the constants' share of the explained output, ``[B]`` or ``[B, K]``; with ``bias="separate"`` it is not in the
            map, otherwise it is.
        inputs: what was explained.
        places: where samples are in each relevance, K left out; first where nothing is said.
        conservation: ``|sum V + bias - y| / sum|V|`` of each sample, like ``bias``, with ``frpc.compile(..., verify="always")``;
            None otherwise, and for methods that follow no constants.

    Units: relevance and bias have the unit of the explained output.
    """

    output: Tensor
    relevance: Tensor | tuple[Tensor, ...]
    bias: Tensor
    inputs: tuple[Tensor, ...] = field(repr=False, default=())
    conservation: Tensor | None = field(repr=False, default=None)
    places: tuple[Batch, ...] = field(repr=False, default=())

    def __iter__(self) -> Iterator[Any]:
        return iter((self.output, self.relevance))

    def map(self, sample: int = 0, target: int = 0, source: int = 0) -> Tensor:
        """Returns one sample's map, of the ``target``-th of K targets and the ``source``-th input."""
        relevance = self.relevance[source] if isinstance(self.relevance, tuple) else self.relevance
        place = self.places[source] if self.places else FIRST
        one = relevance[:, target] if self.bias.dim() == 2 else relevance
        return of_sample(one, place, sample)

    def plot(self, image: Any = None, *, sample: int = 0, target: int = 0) -> Figure:
        """Draws one sample's map, over ``image`` where one is given.

        Args:
            image: a picture of the input's size; see :func:`frpc.heatmap.overlay`.
            sample: which sample.
            target: which of K targets.
        """
        from frpc.plots import heatmap

        return heatmap.overlay(image, self.map(sample, target))

    def _repr_html_(self) -> str:
        from frpc.plots import heatmap

        return heatmap.to_html(None, self.map())


@dataclass(frozen=True, eq=False)
class LayerRelevance(Mapping[str, Tensor]):
    """Relevance of inner layers: ``R = a * G_a`` for every neuron of each layer asked for (constants not spread).

    A mapping from module path to a tensor like that layer's output, ``[B, ...]`` or ``[B, K, ...]``. With plain gradients
    (``frpc.rules.Gradient(times_input=False)``) it holds the multipliers ``G_a`` themselves.

    Attributes:
        output: the model's output.
        layers: the relevances.
        activations: the layers' own outputs, ``[B, ...]``.
    """

    output: Tensor
    layers: dict[str, Tensor]
    activations: dict[str, Tensor] = field(default_factory=dict, repr=False)

    __eq__ = object.__eq__  # a mapping would compare its tensors, which have no single truth value
    __hash__ = object.__hash__

    def __getitem__(self, layer: str) -> Tensor:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def explanation_of(
    results: Sequence[Tensor],
    columns: bool,
    inputs: Sequence[Tensor],
    conservation: Tensor | None = None,
    places: tuple[Batch, ...] = (),
) -> Explanation:
    """Lays out what a program about the inputs returned, ``(output, relevance ..., constants' share)``.

    Shapes: conservation ``[*K, B]``, as programs give it.
    """
    output, *relevances, bias = results
    if columns:
        relevances, bias = [r.movedim(0, 1) for r in relevances], bias.movedim(0, 1)
    relevances = [r.contiguous() for r in relevances]  # programs compute in channels-last order; callers index freely
    if columns and conservation is not None:
        conservation = conservation.movedim(0, 1)
    return Explanation(
        output, relevances[0] if len(relevances) == 1 else tuple(relevances), bias, tuple(inputs), conservation, places
    )


def layer_relevance_of(results: Sequence[Tensor], columns: bool, names: Sequence[str]) -> LayerRelevance:
    """Lays out what a program about layers returned, ``(output, relevance of each ..., value of each ...)``."""
    output, *found = results
    relevances, values = found[: len(names)], found[len(names) :]
    if columns:
        relevances = [r.movedim(0, 1) for r in relevances]
    activations = {name: v.detach() for name, v in zip(names, values, strict=True)}
    return LayerRelevance(output, dict(zip(names, relevances, strict=True)), activations)
