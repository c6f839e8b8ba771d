"""A layer's neurons as one sheet: maps of channels, maps of single neurons, and the window of the input each neuron sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from frpc.errors import ShapeError
from frpc.plots.panels import (
    SMALL,
    TITLE,
    Array,
    draw_bar,
    draw_map,
    draw_picture,
    picture_array,
    pixel_map,
    robust_limit,
    signed,
)
from frpc.windows.producer import Grids

__all__ = ["Box", "Portrait", "depth_sheet", "neuron_sheet", "window_box"]

COLUMNS, DEEP_COLUMNS = 7, 4
PANEL, DEEP, FRAME, HEADING, BAR = (
    2.0,
    3.2,
    0.55,
    0.35,
    0.9,
)  # inches: a panel, a large one, its title and caption, a section's heading, a colour bar
OUTLINE = "#ffd400"  # neither of the map's colours
ENLARGED = 0.5  # windows smaller than this part of the input are also shown enlarged
FINEST = 48  # cells along the longer side of an enlarged window


@dataclass(frozen=True)
class Box:
    """A window clipped to the input: rows ``[top, bottom)``, columns ``[left, right)``."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True, eq=False)
class Portrait:
    """One map of a sheet.

    Attributes:
        name: the explained channel or neuron, e.g. ``channel 17`` or ``(17, 5, 6)``.
        value: the number explained.
        relevance: its pixel map ``[H0, W0]``.
        box: the neuron's window; None for a channel.
    """

    name: str
    value: float
    relevance: Tensor
    box: Box | None = None

    @property
    def caption(self) -> str:
        """Value and sum of the map, which agree where constants are in the map."""
        return f"value {signed(self.value)}\nmap sum {signed(float(self.relevance.double().sum()))}"


def window_box(window: Grids, cells: tuple[int, int], position: tuple[int, int]) -> Box:
    """The cells of the input that the neurons at one position see.

    Args:
        window: geometry of the layer's windows, ``LayerMaps.window``.
        cells: the input's size, ``LayerMaps.cells``.
        position: row and column in the layer.
    """
    ends = []
    for grid, size, at in zip(window, cells, position, strict=True):
        corner = at * grid.jump + grid.offset
        low = min(max(corner, 0), size - 1)
        ends.append((low, max(low + 1, min(corner + grid.side, size))))
    (top, bottom), (left, right) = ends
    return Box(top, left, bottom, right)


def neuron_sheet(
    image: Any,
    channels: Sequence[Portrait],
    neurons: Sequence[Portrait],
    *,
    title: str,
    channel_heading: str = "Channels: the maps of all neurons of a channel, added up",
    neuron_heading: str = "Single neurons; yellow: the window of the input that the neuron sees",
    unit: str = "relevance",
    cell: int = 1,
) -> Figure:
    """The input, maps of channels over it, and maps of neurons in their windows; as figures 3.2-3.11 of the thesis.

    Each section has one scale, symmetric about 0, with its colour bar. The scale of neurons is taken inside their windows,
    since everything outside is 0 except for constants. Small windows are shown a second time, enlarged.

    Args:
        image: as for :func:`frpc.heatmap.overlay`; None for maps alone.
        channels: maps of channels; may be empty.
        neurons: maps of neurons, with windows; may be empty.
        title: a line above the sheet.
        channel_heading, neuron_heading: a line above each section.
        unit: what the colour bars count.
        cell: side of the squares over which relevance is summed for display.

    Raises:
        ShapeError: there is nothing to show, or a neuron has no window.
    """
    if not channels and not neurons:
        raise ShapeError("a sheet of neurons needs at least one channel or neuron")
    boxes = [neuron.box for neuron in neurons if neuron.box is not None]
    if len(boxes) != len(neurons):
        raise ShapeError("every neuron of a sheet needs the box of its window")
    cells = (*channels, *neurons)[0].relevance.shape
    photo = None if image is None else picture_array(image)
    enlarge = bool(boxes) and _part(boxes, cells) < ENLARGED
    counts = [len(channels)] * bool(channels) + [len(neurons)] * (bool(neurons) + enlarge)
    columns = min(COLUMNS, max(counts) + 1)
    rows = [math.ceil((count + 1) / columns) for count in counts]
    panel = PANEL * min(max(cells[0] / cells[1], 0.3), 3.0) + FRAME
    heights = [HEADING + panel * count for count in rows]
    figure = Figure(figsize=(PANEL * columns + BAR, sum(heights) + HEADING), layout="constrained")
    figure.suptitle(title, fontsize=TITLE + 3, parse_math=False)
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights).flat
    sections = [_Section(part, count, columns) for part, count in zip(parts, rows, strict=True)]
    if channels:
        _draw_channels(sections[0], channel_heading, photo, channels, unit, cell)
    if neurons:
        _draw_neurons(sections[int(bool(channels))], neuron_heading, photo, neurons, boxes, unit, cell)
    if enlarge:
        _draw_enlarged(sections[-1], photo, neurons, boxes, unit)
    return figure


def depth_sheet(image: Any, neurons: Mapping[str, Portrait], *, title: str, unit: str = "relevance", cell: int = 1) -> Figure:
    """One neuron of each of several layers over the input, with its window: receptive fields side by side.

    Every map has its own scale, since values of different layers do not compare.

    Args:
        image: as for :func:`frpc.heatmap.overlay`; None for maps alone.
        neurons: by layer, in the order to show; each with the box of its window.
        title: a line above the sheet.
        unit: what the colour bars count.
        cell: side of the squares over which relevance is summed for display.

    Raises:
        ShapeError: there is nothing to show, or a neuron has no window.
    """
    if not neurons or any(neuron.box is None for neuron in neurons.values()):
        raise ShapeError("a sheet over depth needs at least one neuron, each with the box of its window")
    photo = None if image is None else picture_array(image)
    first = next(iter(neurons.values())).relevance.shape
    columns = min(len(neurons), DEEP_COLUMNS)
    rows = math.ceil(len(neurons) / columns)
    height = DEEP * min(max(first[0] / first[1], 0.3), 3.0) + FRAME
    figure = Figure(figsize=((DEEP + BAR) * columns, height * rows + HEADING), layout="constrained")
    figure.suptitle(title, fontsize=TITLE + 3, parse_math=False)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (layer, neuron) in zip(panels, neurons.items(), strict=False):
        assert neuron.box is not None, "checked above"
        axes.set_axis_on()
        values = pixel_map(neuron.relevance, cell=cell)
        limit = robust_limit([pixel_map(_inside(neuron, neuron.box), cell=cell)])
        size = f"window {neuron.box.height}×{neuron.box.width}"
        draw_map(axes, photo, values, limit, title=f"{layer} {neuron.name}, {size}", caption=neuron.caption)
        shown = values.shape if photo is None else photo.shape
        _outline(axes, neuron.box, (shown[0] / first[0], shown[1] / first[1]))
        draw_bar(figure, axes, limit, [values], f"{unit} per {cell}×{cell} pixels" if cell > 1 else f"{unit} per pixel")
    return figure


def _part(boxes: Sequence[Box], cells: Sequence[int]) -> float:
    """The side of the largest window as a fraction of the input's side."""
    return max(max(box.height / cells[0], box.width / cells[1]) for box in boxes)


class _Section:
    """Rows of panels under a heading, with one scale; the first panel is the input's."""

    def __init__(self, figure: SubFigure, rows: int, columns: int) -> None:
        self.figure = figure
        self.panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in self.panels:
            axes.set_axis_off()

    def open(self, heading: str, photo: Array | None, title: str) -> Axes:
        """Writes the heading, draws the input, and returns the input's panel."""
        self.figure.suptitle(heading, fontsize=TITLE + 1, parse_math=False)
        if photo is not None:
            self.panels[0].set_axis_on()
            draw_picture(self.panels[0], photo, title=title)
        return self.panels[0]

    def maps(self, count: int) -> list[Axes]:
        """The panels of the maps."""
        chosen = self.panels[1 : count + 1]
        for axes in chosen:
            axes.set_axis_on()
        return chosen

    def close(self, limit: float, maps: Sequence[Array], unit: str, cell: int) -> None:
        """Adds the colour bar."""
        per = f"{unit} per pixel" if cell == 1 else f"{unit} per {cell}×{cell} pixels"
        draw_bar(self.figure, self.panels, limit, maps, per)


def _draw_channels(
    section: _Section, heading: str, photo: Array | None, channels: Sequence[Portrait], unit: str, cell: int
) -> None:
    section.open(heading, photo, "input")
    maps = [pixel_map(channel.relevance, cell=cell) for channel in channels]
    limit = robust_limit(maps)
    for axes, channel, values in zip(section.maps(len(maps)), channels, maps, strict=True):
        draw_map(axes, photo, values, limit, title=channel.name, caption=channel.caption)
    section.close(limit, maps, unit, cell)


def _draw_neurons(
    section: _Section,
    heading: str,
    photo: Array | None,
    neurons: Sequence[Portrait],
    boxes: Sequence[Box],
    unit: str,
    cell: int,
) -> None:
    cells = neurons[0].relevance.shape
    first = section.open(heading, photo, "input and windows")
    maps = [pixel_map(neuron.relevance, cell=cell) for neuron in neurons]
    limit = robust_limit([pixel_map(_inside(neuron, box), cell=cell) for neuron, box in zip(neurons, boxes, strict=True)])
    for k, (axes, neuron, box, values) in enumerate(zip(section.maps(len(maps)), neurons, boxes, maps, strict=True), 1):
        draw_map(axes, photo, values, limit, title=f"{k}: neuron {neuron.name}", caption=neuron.caption)
        shown = values.shape if photo is None else photo.shape
        _outline(axes, box, (shown[0] / cells[0], shown[1] / cells[1]))
        if photo is not None:
            _outline(first, box, (shown[0] / cells[0], shown[1] / cells[1]), str(k))
    section.close(limit, maps, unit, cell)


def _draw_enlarged(section: _Section, photo: Array | None, neurons: Sequence[Portrait], boxes: Sequence[Box], unit: str) -> None:
    cells = neurons[0].relevance.shape
    cell = math.ceil(max(max(box.height, box.width) for box in boxes) / FINEST)
    section.open("The same neurons, each enlarged to its window", None, "")
    maps = [pixel_map(_inside(neuron, box), cell=cell) for neuron, box in zip(neurons, boxes, strict=True)]
    limit = robust_limit(maps)
    for k, (axes, neuron, box, values) in enumerate(zip(section.maps(len(maps)), neurons, boxes, maps, strict=True), 1):
        place = f"rows {box.top}–{box.bottom - 1}, columns {box.left}–{box.right - 1}"
        part = None if photo is None else _cut(photo, box, cells)
        draw_map(axes, part, values, limit, title=f"{k}: neuron {neuron.name}", caption=place)
        axes.set_anchor("N")  # windows clipped at the border are smaller
    section.close(limit, maps, unit, cell)


def _inside(neuron: Portrait, box: Box) -> Tensor:
    return neuron.relevance[box.top : box.bottom, box.left : box.right]


def _cut(photo: Array, box: Box, cells: Sequence[int]) -> Array:
    """The photo's pixels in a window; the photo may be larger or smaller than the input."""
    down, right = photo.shape[0] / cells[0], photo.shape[1] / cells[1]
    top, left = int(box.top * down), int(box.left * right)
    return photo[top : max(top + 1, round(box.bottom * down)), left : max(left + 1, round(box.right * right))]


def _outline(axes: Axes, box: Box, scale: tuple[float, float], number: str = "") -> None:
    """Draws a window, and its number at its corner; ``scale`` is the picture's pixels per cell of the input."""
    top, left, height, width = box.top * scale[0], box.left * scale[1], box.height * scale[0], box.width * scale[1]
    dark = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    line = 0.6 if number else 1.0  # numbered windows share one panel
    shadow = [patheffects.withStroke(linewidth=line + 0.8, foreground="black")]
    frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=OUTLINE, linewidth=line, path_effects=shadow)
    axes.add_patch(frame)
    if number:
        room = top > 0.08 * axes.get_ylim()[0]  # above the window, or inside where the border is near
        axes.text(
            left,
            top,
            number,
            fontsize=SMALL,
            color=OUTLINE,
            ha="left",
            va="bottom" if room else "top",
            clip_on=True,
            path_effects=dark,
        )
