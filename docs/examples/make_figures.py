"""Makes the figures of the docs from two CC0 photos of scikit-image, `chelsea` and `coffee`, explained with SqueezeNet.

    python docs/examples/make_figures.py [WEIGHTS.safetensors]

Without a file it takes torchvision's DEFAULT weights for ``squeezenet1_0``; the published figures were made with the ImageNet
weights of the authors of SqueezeNet, so the numbers in them may differ.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import frpc
from frpc import heatmap
from frpc.assign.assignment import Assignment
from frpc.emit.plan import Plan
from frpc.integrations import torchvision as pretrained
from frpc.integrations.images import prepare
from frpc.plots.comparison import comparison
from frpc.plots.panels import AGAINST, FOR, pixel_map

FIGURES = Path(__file__).parents[1] / "figures"
NET = "squeezenet1_0"
SQUARE = 8  # pixels: the side of the squares over which input relevance is summed for display
DPI = 100
STAGES = ("capture", "canonicalize", "assign", "plan", "emit", "optimize", "lower")
DOES = {
    "capture": "torch.export:\none ATen graph",
    "canonicalize": "fewer kinds of\noperators",
    "assign": "a rule for\neach node",
    "plan": "a strategy,\nby cost",
    "emit": "values and\nrelevance",
    "optimize": "same function,\nfewer calls",
    "lower": "memory order\nof the device",
}


@dataclass(frozen=True)
class Photo:
    """A photo, its compiled net, and its strongest classes, strongest first."""

    crop: Image.Image
    x: Tensor
    explainer: frpc.Explainer
    classes: list[int]
    names: list[str]

    def pixels(self, **query: Any) -> NDArray[np.float64]:
        """Relevance of the input, summed over squares; one number per square."""
        relevance = self.explainer(self.x, **query).relevance
        assert isinstance(relevance, Tensor)
        return pixel_map(relevance[0], cell=SQUARE)

    def layer(self, path: str, **query: Any) -> Tensor:
        """Relevance of a layer's neurons, summed over channels: one number per position."""
        return self.explainer.at(path, self.x, **query)[path][0].sum(0)


def load(model: nn.Module, name: str) -> Photo:
    """Prepares ``skimage.data.<name>`` and compiles the model for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.png"
        Image.fromarray(getattr(skimage.data, name)()).save(path)
        picture = prepare(path, pretrained.recipe(NET))
    explainer = frpc.compile(model, (picture.pixels,))
    classes = explainer.predict(picture.pixels)[0].topk(3).indices.tolist()
    every = pretrained.class_names(1000)
    return Photo(picture.crop, picture.pixels, explainer, classes, [every[c] for c in classes])


def espresso(coffee: Photo) -> Figure:
    """One class, seen at the input and at two layers: the same logit, divided among other things."""
    best, name = coffee.classes[0], coffee.names[0]
    maps = {
        f"{name}: pixels, in 8×8 squares": coffee.pixels(target=best),
        f"{name}: layer features.7": coffee.layer("features.7", target=best),
        f"{name}: layer features.12": coffee.layer("features.12", target=best),
    }
    return heatmap.side_by_side(coffee.crop, maps, unit="logit")


def contrast(chelsea: Photo) -> Figure:
    """Two classes, and the seed that asks what decides between them."""
    one, two = chelsea.classes[:2]
    seed = torch.zeros(1, 1000)
    seed[0, one], seed[0, two] = 1, -1
    maps = {
        f"target {chelsea.names[0]}": chelsea.layer("features.12", target=one),
        f"target {chelsea.names[1]}": chelsea.layer("features.12", target=two),
        f"seed {chelsea.names[0]} − {chelsea.names[1]}": chelsea.layer("features.12", seed=seed),
    }
    return heatmap.side_by_side(chelsea.crop, maps, shared_scale=True, unit="logit")


def layers(chelsea: Photo) -> Figure:
    """Relevance of several layers, from one pass."""
    paths = ["features.2", "features.5", "features.7", "features.12"]
    found = chelsea.explainer.at(paths, chelsea.x, target=chelsea.classes[0])
    maps = [found[path][0].sum(0) for path in paths]
    titles = [f"{path}, {m.shape[0]}×{m.shape[1]} positions" for path, m in zip(paths, maps, strict=True)]
    return heatmap.grid([chelsea.crop] * len(maps), maps, titles=titles, columns=2, shared_scale=False, unit="logit")


def constants(coffee: Photo, model: nn.Module) -> Figure:
    """Where two of the bias policies put the constants' share: their maps less the map without it."""
    best = coffee.classes[0]
    maps = {policy: _relevance(coffee, model, policy, best) for policy in ("uniform", "receptive_field", "separate")}
    apart = maps.pop("separate")
    shares = {f'bias="{policy}"': pixel_map(values - apart, cell=SQUARE) for policy, values in maps.items()}
    return heatmap.side_by_side(coffee.crop, shares, shared_scale=True, unit="logit per 8×8 pixels")


def methods(chelsea: Photo, model: nn.Module) -> Figure:
    """Two classes by several methods, each at four layers added up over the photo, and by Grad-CAM."""
    layers, names = ["features.12", "features.9", "features.5", "features.2"], ("frp", "lid-ig", "sig-lid-ig", "epsilon-plus")
    explainers = {name: frpc.compile(model, (chelsea.x,), method=name) for name in (*names, "gradient")}
    rows = {}
    for index, title in zip(chelsea.classes[:2], chelsea.names[:2], strict=True):
        found = {name: frpc.multiscale(explainers[name], chelsea.x, index, layers).relevance[0] for name in names}
        found["grad-cam"] = frpc.cam.grad_cam(explainers["gradient"], chelsea.x, "features.12", index).on()[0]
        rows[title] = found
    return comparison(chelsea.crop, rows, cell=SQUARE)


def _relevance(photo: Photo, model: nn.Module, policy: str, target: int) -> Tensor:
    relevance = frpc.compile(model, (photo.x,), bias=policy)(photo.x, target=target).relevance
    assert isinstance(relevance, Tensor)
    return relevance[0].double()


def pipeline(coffee: Photo) -> Figure:
    """The stages of the compiler with what they left of SqueezeNet."""
    figure = Figure(figsize=(13.2, 2.3), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.62, len(STAGES) + 0.72)
    axes.set_ylim(-1.0, 0.5)
    done = {stage.name: stage.program for stage in coffee.explainer.stages}
    for index, name in enumerate(STAGES):
        _box(axes, index + 0.55, name, DOES[name], _left(done[name]))
    for index in range(len(STAGES) + 1):
        axes.add_patch(
            FancyArrowPatch((index - 0.03, 0), (index + 0.13, 0), arrowstyle="-|>", mutation_scale=11, color="#444444")
        )
    axes.text(-0.06, 0, "module\n+ inputs", ha="right", va="center", fontsize=12)
    axes.text(len(STAGES) + 0.16, 0, "output\n+ relevance", ha="left", va="center", fontsize=12)
    note = "in colour: what each stage leaves of SqueezeNet; every stage can be printed, and every graph run"
    axes.text(3.55, -0.92, note, ha="center", va="center", fontsize=11)
    return figure


def _left(program: Any) -> str:
    if isinstance(program, Assignment):
        return f"{len(program.rules)} rules"
    if isinstance(program, Plan):
        return f"{len(program.segments)} segments"
    return f"{sum(node.op == 'call_function' for node in program.graph.nodes)} calls"


def _box(axes: Axes, x: float, name: str, does: str, left: str) -> None:
    colour = FOR if name == "emit" else AGAINST
    shape = FancyBboxPatch((x - 0.36, -0.4), 0.72, 0.8, boxstyle="round,pad=0.06", facecolor="white", edgecolor=colour)
    axes.add_patch(shape)
    axes.text(x, 0.22, name, ha="center", va="center", fontsize=12, weight="bold")
    axes.text(x, -0.12, does, ha="center", va="center", fontsize=10)
    axes.text(x, -0.62, left, ha="center", va="center", fontsize=11, color=colour)


def save(figure: Figure, name: str) -> None:
    """Writes a PNG of 256 dithered colours, half the size of a full one; a mean over a few pixels keeps its colour."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=DPI)
    with Image.open(memory) as image:
        full = image.convert("RGB")
    palette = full.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    full.quantize(256, palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(FIGURES / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the figures of the docs.")
    parser.add_argument("weights", nargs="?", help="safetensors file for squeezenet1_0; torchvision's DEFAULT if left out")
    weights = parser.parse_args().weights
    model = pretrained.build_model(NET)
    if weights is None:
        pretrained.fit_weights(model, pretrained.download_weights(NET), source="torchvision's DEFAULT")
    else:
        pretrained.load_weights(model, weights)
    coffee, chelsea = load(model, "coffee"), load(model, "chelsea")
    makers: dict[str, Callable[[], Figure]] = {
        "espresso.png": partial(espresso, coffee),
        "contrast.png": partial(contrast, chelsea),
        "layers.png": partial(layers, chelsea),
        "constants.png": partial(constants, coffee, model),
        "pipeline.png": partial(pipeline, coffee),
        "methods.png": partial(methods, chelsea, model),
    }
    FIGURES.mkdir(exist_ok=True)
    for name, make in makers.items():
        save(make(), name)
        print(f"{name}: {(FIGURES / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
