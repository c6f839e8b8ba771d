"""Figures of docs/benchmarks.md: how cost grows with the image's side, depth, channels and the number of targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.case import EXPLAIN, GRADIENT, GRADIENTS

__all__ = ["PLOTS", "Plot", "draw"]

Record = Mapping[str, Any]
Lines = dict[str, list[tuple[Any, float]]]  # name -> points
COLOURS = {"frpc": "#c0392b", "dense": "#555555", "forward": "#9aa5b1", GRADIENT: "#2c5f8a", GRADIENTS: "#7fb3d5"}
NAMES = {"frpc": "frpc", "dense": "thesis, dense", "forward": "forward pass", GRADIENT: "autograd, one by one"}
NAMES |= {GRADIENTS: "autograd, batched"}


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        suite: whose records it is drawn from.
        caption: its one message, in words.
        x, y: names of the axes, with units.
        series: the lines of records; empty where there are not two points.
        logarithmic: whether both axes are; layers by name are never.
    """

    suite: str
    caption: str
    x: str
    y: str
    series: Callable[[Sequence[Record]], Lines]
    logarithmic: bool = True


def grown(records: Sequence[Record], grows: str) -> Lines:
    """Seconds of each way as one thing grows."""
    points = [result for record in records for result in record["results"] if result["grows"] == grows]
    if len(points) < 2:
        return {}
    at: Callable[[Any], Any] = {"side": lambda r: r["side"], "depth": lambda r: r["value"], "channels": lambda r: r["width"]}[
        grows
    ]
    return {name: [(at(r), r["seconds"][name]["median"]) for r in points] for name in ("dense", "frpc", "forward")}


def by_targets(records: Sequence[Record]) -> Lines:
    """Forwards of ResNet-50 at batch 1, by K."""
    found = [result for record in records for result in record["results"]]
    asked = {r.get("targets", 1): r["ways"] for r in found if r["net"] == "resnet50" and r["input"][0] == 1}
    lines = {
        name: [(k, ways[name]["ratio"]["median"]) for k, ways in sorted(asked.items()) if name in ways]
        for name in (EXPLAIN, GRADIENT, GRADIENTS)
    }
    return {} if len(asked) < 3 else {name: points for name, points in lines.items() if points}


SIDE = "All maps of conv2: image side against seconds, frpc, the thesis's dense algorithm and the forward pass"
DEPTH = "All maps of one layer of the thesis's AlexNet: seconds by depth of the layer"
CHANNELS = "All maps of conv2: seconds by the number of channels"
TARGETS = "K targets of one picture, ResNet-50: its forward passes a call, frpc and autograd"
PLOTS = {
    "cost_side": Plot("growth", SIDE, "image side, pixels", "seconds a call", partial(grown, grows="side")),
    "cost_depth": Plot("growth", DEPTH, "layer", "seconds a call", partial(grown, grows="depth"), False),
    "cost_channels": Plot("growth", CHANNELS, "channels, times the thesis's", "seconds a call", partial(grown, grows="channels")),
    "cost_targets": Plot("attribution", TARGETS, "targets of a sample, K", "forward passes of ResNet-50 a call", by_targets),
}


def figure(plot: Plot, lines: Lines) -> Figure:
    """Draws lines, each named at its end."""
    drawn = Figure(figsize=(6.4, 3.8), dpi=160, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    lowest, highest = (end(y for points in lines.values() for _, y in points) for end in (min, max))
    free = 0.0  # where the next name may stand, so that none lies on another
    for name, points in sorted(lines.items(), key=lambda line: line[1][-1][1]):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=COLOURS[name], marker="o", markersize=4, linewidth=2 if name == "frpc" else 1.4)
        place = max(ys[-1], free)
        free = place * (highest / lowest) ** 0.08
        axes.annotate(
            NAMES[name], (xs[-1], place), xytext=(7, 0), textcoords="offset points", va="center", color=COLOURS[name], fontsize=9
        )
    axes.set_yscale("log")
    axes.set_ylim(top=max(highest, free) * (highest / lowest) ** 0.05)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1e3 * lowest else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = [x for x, _ in max(lines.values(), key=len)]
    if plot.logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xlim(right=ticks[-1] * (ticks[-1] / ticks[0]) ** 0.4)  # room for the names
    else:
        axes.set_xlim(-0.3, len(ticks) + 0.2)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.grid(True, color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return drawn


def draw(name: str, records: Sequence[Record], folder: Path) -> Path:
    """Writes a figure as PNG, and returns its file."""
    plot = PLOTS[name]
    file = folder / f"{name}.png"
    figure(plot, plot.series(records)).savefig(file, metadata={"Software": None})
    return file
