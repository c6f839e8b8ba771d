"""The suite ``torchvision``: its classifiers, segmentation and video models; not detection, optical flow and quantized copies."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torchvision import models

from bench.coverage.subject import SAMPLES, Subject, first_that_runs, redraw

__all__ = ["build", "names"]

SIDES = (96, 128, 224)
FRAMES = (8, 16)
SPECIAL = {name: {"init_weights": False, "aux_logits": False} for name in ("googlenet", "inception_v3")}


def names() -> list[str]:
    modules = (models, models.segmentation, models.video)
    return [name for module in modules for name in models.list_models(module=module)]


def build(name: str) -> Subject:
    if name in models.list_models(module=models.video):
        shapes = [(3, frames, side, side) for side in SIDES for frames in FRAMES]
    else:
        shapes = [(3, side, side) for side in SIDES]
    return first_that_runs(functools.partial(_attempt, name, shape) for shape in shapes)


def _attempt(name: str, shape: tuple[int, ...]) -> Subject:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **_options(name, shape[-1]))
    return Subject(redraw(model), (torch.randn(SAMPLES, *shape),))


def _options(name: str, side: int) -> dict[str, Any]:
    options: dict[str, Any] = dict(SPECIAL.get(name, {}))
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = side
    return options
