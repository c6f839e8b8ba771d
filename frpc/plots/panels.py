"""One relevance map on one matplotlib axes: the colours, the scale, the picture underneath. `frpc.heatmap` arranges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from torch import Tensor

from frpc.errors import ImageError, NonFiniteError, OptionError, ShapeError

__all__ = [
    "AGAINST",
    "FOR",
    "LIMIT_QUANTILE",
    "SMALL",
    "TITLE",
    "draw_bar",
    "draw_map",
    "draw_picture",
    "finite",
    "picture_array",
    "pixel_map",
    "robust_limit",
    "signed",
]

Array = NDArray[np.float64]
LIMIT_QUANTILE = 0.995
AGAINST, FOR = "#0b4fc4", "#d3180c"  # equally dark, so that neither sign looks stronger; told apart by colour-blind eyes
MAP_COLOURS = LinearSegmentedColormap.from_list("frpc", [AGAINST, "#ffffff", FOR])
TITLE, SMALL = 9.0, 7.0  # points


def pixel_map(relevance: Tensor | NDArray[Any], *, cell: int = 1) -> Array:
    """Channel sum of a map, then the sum over ``cell`` x ``cell`` squares; the total does not change.

    Where ``cell`` does not divide a side, its cells differ by a pixel, so that the map can be drawn evenly.

    Shapes:
        ``[H, W]``, ``[C, H, W]`` or ``[1, C, H, W]`` to ``[ceil(H / cell), ceil(W / cell)]``.

    Raises:
        ShapeError: more than one map, or not a picture.
        NonFiniteError: NaN or Inf in the map.
        OptionError: ``cell`` below 1.
    """
    values = finite(relevance)
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3:
        values = values.sum(0)
    if values.ndim != 2 or values.size == 0:
        raise ShapeError(
            f"a picture needs one map [H, W] or [C, H, W], got {list(np.shape(relevance))}; "
            "choose one sample and one target, or use frpc.heatmap.grid"
        )
    if cell < 1:
        raise OptionError(f"cell={cell}: give at least 1 pixel")
    rows, columns = (np.arange(-(-side // cell)) * side // -(-side // cell) for side in values.shape)
    merged: Array = np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
    return merged


def robust_limit(maps: Sequence[Array]) -> float:
    """The 99.5th percentile of ``|V|`` over all given maps; the largest ``|V|`` where that is 0; 1 where all are 0."""
    magnitude = np.concatenate([np.abs(values).ravel() for values in maps])
    return float(np.quantile(magnitude, LIMIT_QUANTILE)) or float(magnitude.max()) or 1.0


def draw_picture(axes: Axes, image: Any, *, title: str | None = None) -> None:
    """The picture itself, in its own colours."""
    axes.imshow(picture_array(image), cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
    _frame(axes, title, None)


def draw_map(
    axes: Axes, image: Any, values: Array, limit: float, *, title: str | None = None, caption: str | None = None
) -> None:
    """A pixel map on a scale of ``-limit .. limit``: over the grey picture if there is one, else on white.

    Args:
        axes: where to draw.
        image: as for :func:`frpc.heatmap.overlay`.
        values: ``[H, W]``, from :func:`pixel_map`.
        limit: end of the colour scale, from :func:`robust_limit`.
        title: a line above.
        caption: a line below; None for the map's sum and extremes.
    """
    strength = np.clip(values / limit, -1.0, 1.0)
    if image is None:
        axes.imshow(MAP_COLOURS((strength + 1) / 2), interpolation="nearest")
    else:
        grey = picture_array(image)
        grey = grey @ np.array([0.299, 0.587, 0.114]) if grey.ndim == 3 else grey
        height, width = grey.shape
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        # Black and white become greys: on pure black a blue cell could not be seen.
        axes.imshow(0.25 + 0.7 * grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="antialiased")
        axes.imshow(_tint(strength), extent=extent, interpolation="nearest")
    if caption is None:
        caption = f"sum {signed(values.sum())}   extremes {signed(values.min())} … {signed(values.max())}"
    _frame(axes, title, caption)


def draw_bar(figure: Figure | SubFigure, axes: Axes | Sequence[Axes], limit: float, maps: Sequence[Array], unit: str) -> None:
    """The numbered colour bar of one scale; pointed at an end that some cell of ``maps`` exceeds."""
    low = min(float(values.min()) for values in maps) < -limit
    high = max(float(values.max()) for values in maps) > limit
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]
    scale = ScalarMappable(Normalize(-limit, limit), MAP_COLOURS)
    ticks = [-limit, -limit / 2, 0, limit / 2, limit]
    gridspec = (axes if isinstance(axes, Axes) else axes[0]).get_gridspec()
    rows = gridspec.nrows if gridspec and not isinstance(axes, Axes) else 1
    bar = figure.colorbar(scale, ax=axes, extend=ends, extendfrac=0.04 / rows, shrink=0.8, aspect=20 * rows, ticks=ticks)
    bar.set_ticklabels([f"{tick:.2g}".replace("-", "−") for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL)
    clipped = f"\ncolour ends at the {100 * LIMIT_QUANTILE:g}th percentile of |V|" if low or high else ""
    bar.set_label(unit + clipped, fontsize=SMALL, parse_math=False)


def signed(value: float) -> str:
    """A number with its sign and four digits, e.g. ``+22.93``."""
    return f"{value:+#.4g}".removesuffix(".").replace("-", "−")


def finite(relevance: Tensor | NDArray[Any]) -> Array:
    """The map as float64 numpy, whatever it was."""
    values = relevance.detach().cpu().double().numpy() if isinstance(relevance, Tensor) else np.asarray(relevance)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the relevance map contains {int((~np.isfinite(values)).sum())} NaN or Inf values")
    return values


def _tint(strength: Array) -> Array:
    """RGBA whose colour is the sign and whose opacity grows with ``|strength|``; exactly clear at 0."""
    tint = np.where(strength[..., None] > 0, np.array(to_rgb(FOR)), np.array(to_rgb(AGAINST)))
    return np.concatenate([tint, 0.95 * np.abs(strength[..., None])], axis=-1)


def _frame(axes: Axes, title: str | None, caption: str | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=TITLE, parse_math=False)
    if caption:
        axes.set_xlabel(caption, fontsize=SMALL, parse_math=False)


def picture_array(image: Any) -> Array:
    """Any accepted picture as ``[H, W]`` or ``[H, W, 3]`` in 0..1."""
    if not isinstance(image, Tensor | np.ndarray) and hasattr(image, "convert"):
        image = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.ndim == 4 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] != 3):
        raise ImageError(f"a picture must be [H, W], [H, W, 3], [3, H, W] or [1, H, W], got {list(np.shape(image))}")
    scaled: Array = pixels.astype(np.float64) / (255.0 if pixels.dtype == np.uint8 else 1.0)
    # Bicubic resizing overshoots a little; anything beyond is a normalised network input.
    if not np.isfinite(scaled).all() or scaled.min() < -0.1 or scaled.max() > 1.1:
        raise ImageError(
            f"a picture must have uint8 values or values in 0..1, got {scaled.min():.3g}..{scaled.max():.3g}; "
            "pass the picture before normalization by mean and standard deviation"
        )
    return np.clip(scaled, 0.0, 1.0)
