"""Questions about the neurons of one layer: a chosen few, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.graph import empty_like
from frpc.core.values import is_plain
from frpc.driver.balance import rounding_limit
from frpc.driver.explanation import Explanation
from frpc.driver.prepare import PreparedModel
from frpc.driver.programs import Programs
from frpc.driver.targets import make_seed
from frpc.errors import ConservationError, InputError, OptionError
from frpc.layers.context import layer_context
from frpc.layers.maps import LayerMaps
from frpc.layers.neurons import cones_are_cheaper, neuron_maps
from frpc.layers.strategies import layer_maps

__all__ = ["ask_layer", "ask_neurons"]


def ask_neurons(
    programs: Programs, layer: str, indices: Sequence[int | tuple[int, ...]], inputs: tuple[Tensor, ...], strategy: str
) -> Explanation:
    """Explains K neurons of a layer; see :meth:`frpc.Explainer.neurons`."""
    places = [_place(index) for index in indices]
    prepared = programs.prepared(inputs)
    programs.check_layers(prepared, (layer,))
    with programs.reading_graphs():
        prepared.check_samples_first(layer)
        example = empty_like(prepared.layer_example(layer))
    sizes = [int(n) for n in example.shape[1:]]
    seeds = [make_seed(index, None, example, int(inputs[0].shape[0]))[0] for index in places]
    if not seeds:
        raise InputError(f"Give at least one neuron of {layer} {sizes}.")
    if (found := _cones(programs, prepared, layer, places, inputs, strategy)) is not None:
        return found
    compiled = programs.program(prepared, inputs, programs.query_with(columns=True, of=layer))
    functional = torch.stack(seeds)
    values, *relevances, bias = results = programs.run(compiled, inputs, functional)
    balance = programs.balance(compiled, inputs, functional, results)
    relevances = [r.movedim(0, 1) for r in relevances]
    chosen = torch.stack([values[(slice(None), *place)] for place in places], 1)
    maps = relevances[0] if len(relevances) == 1 else tuple(relevances)
    errors = None if balance is None else balance.errors.movedim(0, 1)
    return Explanation(chosen, maps, bias.movedim(0, 1), tuple(inputs), errors, compiled.places)


def _place(index: Any) -> tuple[Any, ...]:
    """Reads a neuron's index: a number where the layer has one dimension."""
    return tuple(index) if isinstance(index, Sequence) or getattr(index, "ndim", False) else (index,)


def _cones(
    programs: Programs,
    prepared: PreparedModel,
    layer: str,
    indices: Sequence[tuple[int, ...]],
    inputs: tuple[Tensor, ...],
    strategy: str,
) -> Explanation | None:
    """Answers by transposed windows, or returns None where a program is to answer."""
    if strategy not in ("auto", "transposed", "windows"):
        raise OptionError(f"strategy={strategy!r} is unknown for neurons; choose auto, transposed or windows.")
    account, policy = programs.options.rules.account, programs.query.bias
    single = account.reference is None or account.reference.count == 1
    possible = len(inputs) == 1 and inputs[0].dim() in (3, 4) and policy != "receptive_field"
    possible = possible and account.gives == "relevance" and single
    if strategy == "transposed" or (strategy == "auto" and not possible):
        return None
    query = programs.query_with(columns=True, of=layer, bias="separate")
    assignment = programs.assignment(prepared, inputs, query)
    with programs.reading_graphs():
        if strategy == "auto" and any(source.op != "placeholder" for source in assignment.sources):
            return None
        node = assignment.layer_node(layer)
        assert node is not None
        context = layer_context(assignment, node, inputs)
    if strategy == "windows" and (context.rows is None or not possible):
        raise OptionError(f'strategy="windows" does not work for {layer}: windows end at {context.ended}.')
    with programs.reading_graphs():
        if strategy == "auto" and not cones_are_cheaper(context, indices):
            return None
    values, local, bias = neuron_maps(context, indices)
    if policy == "uniform":
        local = local + (bias / inputs[0][0].numel()).reshape([*bias.shape, *[1] * (inputs[0].dim() - 1)])
    if programs.verifying == "never" or not account.constants:
        return Explanation(values, local, bias, tuple(inputs))
    errors = _lost(values, local, bias if policy == "separate" else torch.zeros_like(bias))
    if is_plain(inputs) and not float(errors.max()) <= rounding_limit(prepared):
        if strategy == "auto":
            return None  # the program that answers instead is held against the model
        raise ConservationError(
            f"Maps by windows of {layer} lose {float(errors.max()):.1e} of sum|V|, more than rounding explains; "
            'use strategy="transposed" to find the rule that is wrong.'
        )
    return Explanation(values, local, bias, tuple(inputs), errors if programs.verifying == "always" else None)


def _lost(values: Tensor, local: Tensor, beside: Tensor) -> Tensor:
    """``|sum V + constants - z| / sum|V|`` of each neuron, ``[B, K]``."""
    lost = local.flatten(2).sum(2, dtype=torch.float64) + beside - values
    size = local.abs().flatten(2).sum(2, dtype=torch.float64) + beside.abs()
    return lost.abs() / size.clamp_min(torch.finfo(torch.float64).tiny)


def ask_layer(programs: Programs, name: str, inputs: tuple[Tensor, ...], strategy: str, memory_limit: int) -> LayerMaps:
    """The maps of every neuron of a layer; see :meth:`frpc.Explainer.layer`."""
    prepared = programs.prepared(inputs)
    programs.check_layers(prepared, (name,))
    with programs.reading_graphs():
        prepared.check_samples_first(name)
    query = programs.query_with(columns=True, of=name, bias="separate")
    assignment = programs.assignment(prepared, inputs, query)

    def pulled(seeds: Tensor) -> Tensor:
        """Local pixel maps ``[K, B, H0, W0]`` of seeds at the layer."""
        _, relevance, _ = programs.run(programs.program(prepared, inputs, query), inputs, seeds)
        pixels = relevance.sum(2) if relevance.dim() > 3 else relevance.unsqueeze(-2)
        return pixels if pixels.dim() == 4 else pixels.unsqueeze(-2)

    with programs.reading_graphs():
        node = assignment.layer_node(name)
        assert node is not None
        return layer_maps(assignment, name, node, inputs, programs.query.bias, strategy, memory_limit, pulled)
