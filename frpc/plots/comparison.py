"""Several methods on one picture, one sheet: a row for each class, a column for each method, one scale for all.

Methods differ in unit: a logit, a probability, a gradient. So each map is drawn in units of its own largest cells, -1 to 1, and
the line below says what 1 is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from frpc.errors import ShapeError
from frpc.plots.panels import Array, draw_bar, draw_map, draw_picture, pixel_map, robust_limit, signed

__all__ = ["comparison"]

PANEL, FRAME, BAR = 2.6, 0.55, 0.9  # inches: width of a map, height of its title and caption, width of the colour bar

Map = Tensor | NDArray[Any]


def comparison(image: Any, rows: Mapping[str, Mapping[str, Map]], *, cell: int = 1) -> Figure:
    """Draws several methods side by side.

    Args:
        image: as for :func:`frpc.heatmap.overlay`.
        rows: class -> method -> map ``[H, W]`` or ``[C, H, W]``; the same methods in every row.
        cell: side of the squares over which maps are summed for display.

    Raises:
        ShapeError: if there is nothing to draw, or rows have different methods.
    """
    methods = [list(maps) for maps in rows.values()]
    if not methods or not methods[0] or any(names != methods[0] for names in methods):
        raise ShapeError("comparison needs at least one class, and the same methods for each class")
    columns = len(methods[0]) + 1
    first = next(iter(rows.values()))
    shape = pixel_map(next(iter(first.values()))).shape
    height = len(rows) * (PANEL * min(max(shape[0] / shape[1], 0.3), 3.0) + FRAME)
    figure = Figure(figsize=(PANEL * columns + BAR, height), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    drawn: list[Array] = []
    for line, (name, maps) in zip(panels, rows.items(), strict=True):
        draw_picture(line[0], image, title=name)
        drawn += _line(line[1:], image, maps, cell)
    draw_bar(figure, list(panels[:, 1:].flat), 1.0, drawn, "share of the map's largest cells")
    return figure


def _line(panels: Sequence[Any], image: Any, maps: Mapping[str, Map], cell: int) -> list[Array]:
    """One class: every method's map in units of its own scale."""
    drawn = []
    for axes, (method, values) in zip(panels, maps.items(), strict=True):
        merged = pixel_map(values, cell=cell)
        limit = robust_limit([merged])
        caption = f"1 = {signed(limit)}   sum {signed(float(np.sum(merged)))}"
        drawn.append(merged / limit)
        draw_map(axes, image, drawn[-1], 1.0, title=method, caption=caption)
    return drawn
