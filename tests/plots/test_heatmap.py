"""Pictures: the scale is symmetric, robust and numbered, sums survive, and bad input says what is wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize
from PIL import Image

from frpc import heatmap
from frpc.errors import ImageError, NonFiniteError, OptionError, OutputFolderError, ShapeError
from frpc.plots import panels


@pytest.fixture
def relevance() -> torch.Tensor:
    return torch.randn(3, 15, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).random((15, 20, 3))


def colour_bars(figure):
    return [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]


@pytest.mark.parametrize("cell", [1, 2, 4, 7, 100])
def test_pixel_map_keeps_the_sum(relevance, cell):
    merged = panels.pixel_map(relevance, cell=cell)
    assert merged.shape == (-(-15 // cell), -(-20 // cell))
    assert merged.sum() == pytest.approx(relevance.double().sum().item(), abs=1e-10)


def test_pixel_map_is_the_sum_over_squares(relevance):
    expected = relevance.double().sum(0).view(3, 5, 4, 5).sum((1, 3))
    np.testing.assert_allclose(panels.pixel_map(relevance, cell=5), expected, atol=1e-12)


def test_pixel_map_takes_a_batch_of_one_and_numpy(relevance):
    np.testing.assert_array_equal(panels.pixel_map(relevance[None]), panels.pixel_map(relevance.numpy()))


def test_limit_is_robust_and_never_zero():
    values = np.zeros((100, 100))
    values[:10] = 2.0
    values[0, 0] = -1e6
    assert panels.robust_limit([values]) == 2.0
    assert panels.robust_limit([np.zeros((4, 4))]) == 1.0
    lonely = np.zeros((100, 100))
    lonely[3, 3] = -5.0
    assert panels.robust_limit([lonely]) == 5.0


def test_scale_is_symmetric_numbered_and_says_where_it_ends(photo):
    values = np.full((15, 20), -1.0)
    values[0, 0] = 50.0
    figure = heatmap.overlay(photo, values, unit="logit", title="a class")
    (bar,) = colour_bars(figure)
    norm = bar._colorbar.norm
    assert isinstance(norm, Normalize)
    assert norm.vmin == -norm.vmax < 0
    assert bar._colorbar.extend == "max"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["−1", "−0.5", "0", "0.5", "1"]
    assert "logit" in bar.get_ylabel()
    assert "99.5th percentile" in bar.get_ylabel()
    assert figure.axes[0].get_title() == "a class"
    assert figure.axes[0].get_xlabel() == "sum −249.0   extremes −1.000 … +50.00"


def test_zero_relevance_shows_the_photo(photo):
    values = np.zeros((15, 20))
    values[2, 3] = 1.0
    photo_layer, tint = heatmap.overlay(photo, values).axes[0].images
    opacity = tint.get_array()[..., 3]
    assert opacity[2, 3] > 0.9
    assert (np.delete(opacity.ravel(), 2 * 20 + 3) == 0).all()
    assert photo_layer.get_array().shape == (15, 20)


def test_colour_is_the_sign():
    values = np.array([[1.0, -1.0]])
    tint = heatmap.overlay(np.zeros((1, 2)), values).axes[0].images[1].get_array()
    assert tint[0, 0, 0] > tint[0, 0, 2]
    assert tint[0, 1, 2] > tint[0, 1, 0]


@pytest.mark.parametrize("shape", [(3, 15, 20), (1, 15, 20), (15, 20, 3), (15, 20), (1, 3, 15, 20)])
@pytest.mark.parametrize("kind", ["float", "uint8", "tensor"])
def test_every_kind_of_picture(relevance, shape, kind):
    picture = np.random.default_rng(0).random(shape)
    if kind == "uint8":
        picture = (picture * 255).astype(np.uint8)
    if kind == "tensor":
        picture = torch.from_numpy(picture)
    assert heatmap.overlay(picture, relevance).axes[0].images[0].get_array().shape == (15, 20)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_pil_pictures(relevance, photo, mode):
    picture = Image.fromarray((photo * 255).astype(np.uint8)).convert(mode)
    assert heatmap.overlay(picture, relevance).axes[0].images[0].get_array().shape == (15, 20)


def test_a_coarse_map_is_stretched_over_the_picture(photo):
    picture, tint = heatmap.overlay(photo, np.ones((3, 4))).axes[0].images
    assert picture.get_extent() == tint.get_extent()


def test_side_by_side_has_the_picture_and_a_bar_for_each_map(photo, relevance):
    figure = heatmap.side_by_side(photo, {"one": relevance, "two": 10 * relevance})
    assert [axes.get_title() for axes in figure.axes[:3]] == ["input", "one", "two"]
    first, second = (bar._colorbar.norm.vmax for bar in colour_bars(figure))
    assert second == pytest.approx(10 * first)


def test_shared_scale_has_one_bar(photo, relevance):
    figure = heatmap.side_by_side(photo, {"one": relevance, "two": 10 * relevance}, shared_scale=True)
    (bar,) = colour_bars(figure)
    limit = panels.robust_limit([panels.pixel_map(relevance), panels.pixel_map(10 * relevance)])
    assert bar._colorbar.norm.vmax == limit


def test_grid_fills_rows(relevance):
    batch = relevance.expand(5, 3, 15, 20)
    figure = heatmap.grid(None, batch, titles=list("abcde"), columns=3)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == list("abcde")
    assert len(colour_bars(figure)) == 1
    assert len(colour_bars(heatmap.grid(None, batch, shared_scale=False))) == 5


@pytest.mark.parametrize("values", [torch.tensor([1.0, -2.0, 4.0]), torch.tensor([[0.5, 0.5], [-3.0, 1.0], [4.0, 0.0]])])
def test_bars_sum_tokens(values):
    axes = heatmap.bars(values, labels=["a $x", "b", "c"], title="text").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1.0, -2.0, 4.0]
    assert axes.get_title() == "text   sum +3.000"


def test_a_vector_is_drawn_as_bars():
    assert len(heatmap.overlay(None, torch.ones(7)).axes[0].patches) == 7


def test_html_carries_its_picture(photo, relevance):
    markup = heatmap.to_html(photo, relevance, title='<"cat">')
    assert markup.startswith("<img ")
    assert 'alt="&lt;&#34;cat&#34;&gt;"' in markup
    data = markup.split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"


def test_same_figure_same_bytes(tmp_path: Path, photo, relevance):
    for name in ("a.png", "b.png"):
        heatmap.save(heatmap.overlay(photo, relevance, title="$100 cat_dog"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    heatmap.save(heatmap.bars(torch.ones(3)), tmp_path / "c.svg")


def test_nothing_global_changes(photo, relevance):
    from matplotlib._pylab_helpers import Gcf

    settings = [name for name in mpl.rcParams if name != "backend"]  # reading that one would choose a backend
    before = [mpl.rcParams[name] for name in settings]
    heatmap.to_html(photo, relevance)
    assert [mpl.rcParams[name] for name in settings] == before
    assert Gcf.get_all_fig_managers() == []


def test_bad_input_says_what_is_wrong(tmp_path: Path, relevance, photo):
    with pytest.raises(ShapeError, match=r"one map \[H, W\] or \[C, H, W\], got \[2, 3, 15, 20\]"):
        heatmap.overlay(photo, torch.zeros(2, 3, 15, 20))
    with pytest.raises(NonFiniteError, match="1 NaN or Inf"):
        heatmap.overlay(photo, torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ImageError, match=r"before normalization by mean and standard deviation"):
        heatmap.overlay(3 * photo, relevance)
    with pytest.raises(ImageError, match=r"got \[7, 15, 20\]"):
        heatmap.overlay(np.zeros((7, 15, 20)), relevance)
    with pytest.raises(OptionError, match="cell=0"):
        heatmap.overlay(photo, relevance, cell=0)
    with pytest.raises(OptionError, match="columns=0"):
        heatmap.grid(None, [relevance], columns=0)
    with pytest.raises(ShapeError, match="1 maps, 2 images, 1 titles"):
        heatmap.grid([photo, photo], [relevance])
    with pytest.raises(ShapeError, match="at least one map"):
        heatmap.side_by_side(photo, {})
    with pytest.raises(ShapeError, match="2 labels for 3 bars"):
        heatmap.bars(torch.ones(3), labels=["a", "b"])
    with pytest.raises(ShapeError, match=r"bars need a map \[F\]"):
        heatmap.bars(torch.ones(3, 3, 3))
    with pytest.raises(OptionError, match=r"a\.nonsense"):
        heatmap.save(heatmap.overlay(photo, relevance), tmp_path / "a.nonsense")
    with pytest.raises(OutputFolderError, match="cannot write"):
        heatmap.save(heatmap.overlay(photo, relevance), tmp_path / "missing" / "a.png")
