"""The suite ``timm``: of every model file that timm ships, one model, small enough to be tried.

Names are ``family:model``. Which model of a family is small was judged once by its name and size, and is kept in
``smallest.json`` beside this file; of a family that is not in it, because a newer timm has it, the first model is tried.
timm's own test models (``test_vit``) do not count.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch

from bench.coverage.subject import SAMPLES, Subject, first_that_runs, redraw

__all__ = ["build", "names"]

CHOICE = Path(__file__).with_name("smallest.json")
CLASSES = 10
SIDES = (96, 128, 160, 192, 224, 256)


def families() -> dict[str, list[str]]:
    """Every model file of timm with its models."""
    found = {family: timm.list_models(module=family) for family in timm.list_modules()}
    return {family: [m for m in models if not m.startswith("test_")] for family, models in found.items()}


def names() -> list[str]:
    chosen = json.loads(CHOICE.read_text(encoding="utf-8"))
    return [f"{family}:{chosen.get(family) or models[0]}" for family, models in families().items() if models]


def build(name: str) -> Subject:
    model = name.split(":")[1]
    return first_that_runs(functools.partial(_attempt, model, side, sized) for side, sized in _sizes(model))


def _sizes(model: str) -> Iterator[tuple[int, bool]]:
    """Sides from small to the model's own, told to the model where it wants to know them."""
    shape = timm.get_pretrained_cfg(model, allow_unregistered=True)
    own = shape.input_size[-1] if shape is not None else max(SIDES)
    for side in [*(s for s in SIDES if s < own), own]:
        yield side, True
        yield side, False


def _attempt(model: str, side: int, sized: bool) -> Subject:
    torch.manual_seed(0)
    options = {"img_size": side} if sized else {}
    built = timm.create_model(model, pretrained=False, num_classes=CLASSES, **options)
    channels = int(getattr(built, "pretrained_cfg", {}).get("input_size", (3,))[0])
    return Subject(redraw(built), (torch.randn(SAMPLES, channels, side, side),))
