"""Pictures of relevance maps: red cells speak for the explained output, blue ones against it, and 0 shows nothing.

Every scale is symmetric about 0, has a numbered colour bar, and ends at a robust limit: the 99.5th percentile of
``|V|``, so that one extreme pixel does not blank the rest. Cells beyond it get the end colour; the colour bar then has
pointed ends and says so, and the line below a map gives its sum and its true extremes. No map is rescaled to its own
minimum and maximum, which would move 0. All functions return a free-standing :class:`matplotlib.figure.Figure`: no
pyplot, no backend, nothing global.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from frpc.errors import OptionError, OutputFolderError, ShapeError
from frpc.plots.panels import (
    AGAINST,
    FOR,
    SMALL,
    TITLE,
    Array,
    draw_bar,
    draw_map,
    draw_picture,
    finite,
    pixel_map,
    robust_limit,
    signed,
)

__all__ = ["bars", "grid", "overlay", "save", "side_by_side", "to_html"]

_IMG = Template('<img alt="{{ title }}" width="560" src="data:image/png;base64,{{ data }}">', autoescape=True)

DPI = 150
PANEL, FRAME, BAR = 3.2, 0.5, 0.9  # inches: width of a map, height of its title and caption, width of a colour bar


def overlay(
    image: Any,
    relevance: Tensor | NDArray[Any],
    *,
    title: str | None = None,
    unit: str = "relevance",
    cell: int = 1,
) -> Figure:
    """One map over the grey picture: colour by sign, opacity by ``|V|``, so that zero relevance shows the photo.

    Args:
        image: PIL image, ``[H, W]``, ``[H, W, 3]``, ``[3, H, W]`` or ``[1, H, W]``, uint8 or in 0..1; None for the map
            alone. Its size may differ from the map's: the map is stretched over it.
        relevance: ``[H, W]`` or ``[C, H, W]``. For ``[F]`` use :func:`bars`.
        title: a line above.
        unit: what the colour bar counts, e.g. "logit".
        cell: side of the squares over which relevance is summed for display; 1 shows every pixel.

    Raises:
        ShapeError, NonFiniteError, ImageError, OptionError: see :func:`frpc.plots.panels.pixel_map`.
    """
    if np.ndim(relevance) == 1:
        return bars(relevance, title=title, unit=unit)
    values = pixel_map(relevance, cell=cell)
    figure = Figure(figsize=(PANEL + BAR, _row_height([values])), layout="constrained")
    _draw_all(figure, [figure.subplots()], [image], [values], [title], _per_cell(unit, cell), shared_scale=False)
    return figure


def side_by_side(
    image: Any,
    relevances: Mapping[str, Tensor] | Mapping[str, NDArray[Any]],
    *,
    shared_scale: bool = False,
    unit: str = "relevance",
    cell: int = 1,
) -> Figure:
    """The picture, then each map over it under its name.

    Args:
        image: as for :func:`overlay`.
        relevances: maps by title, each ``[H, W]`` or ``[C, H, W]``.
        shared_scale: one limit and one colour bar for all, so that colours compare; else one each.
        unit: what the colour bars count.
        cell: as for :func:`overlay`.
    """
    if not relevances:
        raise ShapeError("side_by_side needs at least one map")
    maps = [pixel_map(values, cell=cell) for values in relevances.values()]
    first = int(image is not None)
    width = PANEL * (first + len(maps)) + BAR * (1 if shared_scale else len(maps))
    figure = Figure(figsize=(width, _row_height(maps)), layout="constrained")
    panels = list(figure.subplots(1, first + len(maps), squeeze=False)[0])
    if first:
        draw_picture(panels[0], image, title="input")
    pictures = [image] * len(maps)
    _draw_all(figure, panels[first:], pictures, maps, list(relevances), _per_cell(unit, cell), shared_scale)
    return figure


def grid(
    images: Sequence[Any] | Tensor | NDArray[Any] | None,
    relevances: Sequence[Tensor] | Sequence[NDArray[Any]] | Tensor | NDArray[Any],
    *,
    titles: Sequence[str] | None = None,
    columns: int = 4,
    shared_scale: bool = True,
    unit: str = "relevance",
    cell: int = 1,
) -> Figure:
    """Many samples, one map each, row by row.

    Args:
        images: one for each map, or None.
        relevances: the maps, e.g. a batch ``[B, C, H, W]``.
        titles: one for each map.
        columns: panels in a row.
        shared_scale: one limit and one colour bar for all, so that colours compare; else one each.
        unit: what the colour bars count.
        cell: as for :func:`overlay`.
    """
    maps = [pixel_map(values, cell=cell) for values in relevances]
    pictures = [None] * len(maps) if images is None else list(images)
    names = [None] * len(maps) if titles is None else list(titles)
    if not maps or not len(maps) == len(pictures) == len(names):
        raise ShapeError(
            "grid needs at least one map, and as many images and titles as maps; "
            f"got {len(maps)} maps, {len(pictures)} images, {len(names)} titles"
        )
    if columns < 1:
        raise OptionError(f"columns={columns}: give at least 1")
    columns = min(columns, len(maps))
    rows = math.ceil(len(maps) / columns)
    width = PANEL * columns + BAR * (1 if shared_scale else columns)
    figure = Figure(figsize=(width, _row_height(maps) * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(maps) :]:
        unused.set_axis_off()
    _draw_all(figure, panels[: len(maps)], pictures, maps, names, _per_cell(unit, cell), shared_scale)
    return figure


def bars(
    relevance: Tensor | NDArray[Any],
    *,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    unit: str = "relevance",
) -> Figure:
    """A bar for each feature ``[F]``, or for each token ``[T, D]`` (summed over D); nothing is clipped.

    Args:
        relevance: ``[F]`` or ``[T, D]``.
        labels: names of the features or tokens.
        title: a line above.
        unit: what the axis counts.
    """
    values = finite(relevance)
    if values.ndim == 2:
        values = values.sum(1)
    if values.ndim != 1 or values.size == 0:
        raise ShapeError(f"bars need a map [F] or [T, D], got {list(np.shape(relevance))}")
    if labels is not None and len(labels) != len(values):
        raise ShapeError(f"{len(labels)} labels for {len(values)} bars")
    figure = Figure(figsize=(min(max(4.0, 0.25 * len(values)), 12.0), 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(len(values)), values, width=0.8, color=np.where(values > 0, FOR, AGAINST))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.margins(x=0.01)
    if labels is not None:
        turn = 0 if len(values) <= 8 else 90
        axes.set_xticks(np.arange(len(values)), labels, rotation=turn, parse_math=False)
    axes.tick_params(labelsize=SMALL)
    axes.set_ylabel(unit, fontsize=SMALL, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    total = f"sum {signed(values.sum())}"
    axes.set_title(f"{title}   {total}" if title else total, fontsize=TITLE, parse_math=False)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure; the suffix says how (png, pdf, svg). The same figure gives the same PNG bytes.

    Raises:
        OutputFolderError: the file cannot be written.
        OptionError: matplotlib knows no such format.
    """
    path = Path(path)
    metadata = {"Software": None} if path.suffix == ".png" else None
    try:
        figure.savefig(path, dpi=DPI, metadata=metadata)
    except ValueError as error:
        raise OptionError(f"cannot save a picture as {path.name}: {error}") from error
    except OSError as error:
        raise OutputFolderError(f"cannot write {path}: {error.strerror or error}") from error


def to_html(
    image: Any,
    relevance: Tensor | NDArray[Any],
    *,
    title: str | None = None,
    unit: str = "relevance",
    cell: int = 1,
) -> str:
    """:func:`overlay` as an ``<img>`` that carries its own PNG, for ``_repr_html_`` in notebooks."""
    buffer = io.BytesIO()
    figure = overlay(image, relevance, title=title, unit=unit, cell=cell)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return _IMG.render(title=title or "relevance map", data=data)


def _per_cell(unit: str, cell: int) -> str:
    return unit if cell == 1 else f"{unit} per {cell}×{cell} pixels"


def _row_height(maps: Sequence[Array]) -> float:
    """Inches for a row of maps of width ``PANEL``; very tall and very flat maps are kept within a page."""
    tallest = max(values.shape[0] / values.shape[1] for values in maps)
    return PANEL * min(max(tallest, 0.3), 3.0) + FRAME


def _draw_all(
    figure: Figure,
    panels: Sequence[Axes],
    images: Sequence[Any],
    maps: Sequence[Array],
    titles: Sequence[str | None],
    unit: str,
    shared_scale: bool,
) -> None:
    """A map on each panel, with one colour bar for all or one each."""
    common = robust_limit(maps)
    for axes, image, values, title in zip(panels, images, maps, titles, strict=True):
        limit = common if shared_scale else robust_limit([values])
        draw_map(axes, image, values, limit, title=title)
        if not shared_scale:
            draw_bar(figure, axes, limit, [values], unit)
    if shared_scale:
        draw_bar(figure, panels, common, maps, unit)
