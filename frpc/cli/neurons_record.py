"""What `frpc neurons` keeps, writes and shows of one layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from frpc.cli.session import print_table

if TYPE_CHECKING:
    from torch import Tensor

    from frpc.layers.maps import LayerMaps
    from frpc.layers.strategies import LayerPlan
    from frpc.plots.neurons import Portrait
    from frpc.windows.producer import Grids

__all__ = ["RankedChannel", "channel_portrait", "layer_record", "show_layer", "size_in_words"]

FORMATS = {"channel": "d", "value": "+.4f", "sum": "+.4f", "magnitude": ".2f", "peak": "+.4f", "conservation_error": ".1e"}


@dataclass(frozen=True, eq=False)
class RankedChannel:
    """A channel and its sort key.

    Attributes:
        number: the channel.
        value: the sum of its neurons' values, which its map adds up to.
        peak: the largest value of a neuron.
        relevance: its map ``[H0, W0]``.
        magnitude: ``sum |V|`` of the map.
        error: ``|sum V - value| / sum |V|``.
    """

    number: int
    value: float
    peak: float
    relevance: Tensor
    magnitude: float
    error: float


def channel_portrait(channel: RankedChannel, linear: bool) -> Portrait:
    """A channel as a sheet of pictures shows it; behind a linear layer it is one neuron."""
    from frpc.plots.neurons import Portrait

    return Portrait(f"{'neuron' if linear else 'channel'} {channel.number}", channel.value, channel.relevance)


def size_in_words(maps: LayerMaps, window: Grids) -> str:
    """How many neurons a layer has, and what they see, in words."""
    shape = "×".join(str(size) for size in maps.values.shape[1:])
    return f"{shape} neurons, windows of {window[0].side}×{window[1].side} in {maps.cells[0]}×{maps.cells[1]} pixels"


def layer_record(maps: LayerMaps, channels: list[RankedChannel], portraits: list[Portrait], window: Grids) -> dict[str, Any]:
    """The record of one layer, ready for JSON."""
    rows, columns = window
    return {
        "layer": maps.name,
        "shape": list(maps.values.shape[1:]),
        "plan": str(maps.plan),
        "strategy": maps.plan.strategy,
        "window": {"rows": asdict(rows), "columns": asdict(columns), "cells": list(maps.cells)},
        "bytes": maps.nbytes(),
        "channels": [
            {
                "channel": channel.number,
                "value": channel.value,
                "peak": channel.peak,
                "sum": float(channel.relevance.sum()),
                "magnitude": channel.magnitude,
                "conservation_error": channel.error,
            }
            for channel in channels
        ],
        "neurons": [
            {
                "index": [int(number) for number in portrait.name.strip("()").split(",")],
                "value": portrait.value,
                "sum": float(portrait.relevance.sum()),
                "window": None if portrait.box is None else asdict(portrait.box),
            }
            for portrait in portraits
        ],
    }


def show_layer(console: Console, plan: LayerPlan, entry: dict[str, Any]) -> None:
    """Prints one layer's plan, its channels and its neurons, from its record."""
    console.print(plan.heading, markup=False)
    head, *costs = plan.cells()
    print_table(console, head, costs, words=("strategy",))
    console.print(plan.memory, markup=False)
    channels = [[format(row[key], form) for key, form in FORMATS.items()] for row in entry["channels"]]
    print_table(console, ("channel", "value", "map sum", "sum |V|", "peak", "error"), channels)
    neurons = []
    for row in entry["neurons"]:
        box = row["window"]
        sides = (f"{box['top']}–{box['bottom'] - 1}", f"{box['left']}–{box['right'] - 1}")
        neurons.append((",".join(map(str, row["index"])), f"{row['value']:+.5f}", f"{row['sum']:+.5f}", *sides))
    if neurons:
        print_table(console, ("neuron", "value", "map sum", "rows", "columns"), neurons)
    console.print(f"explained in {entry['seconds']['explain']:.1f} s\n")
