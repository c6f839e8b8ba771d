"""One thing tried, and what came of it; how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import frpc

__all__ = ["Result", "attempt", "demand", "distance", "relevance", "small_net"]

Result = dict[str, Any]
REASON = 400  # characters


def attempt(what: str, work: Callable[[], Result]) -> Result:
    """Tries one thing; an error is its result. ``work`` returns figures, and ``line`` to be read by people."""
    try:
        return {"what": what, "status": "passed", **work()}
    except Exception as error:  # any: the next thing is tried all the same
        return {"what": what, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:REASON]}


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L1 distance, taken in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().sum() / expected.abs().sum())


def demand(error: float, bound: float, what: str) -> None:
    """Raises where an error is over its bound, or no number."""
    if not error <= bound:
        raise AssertionError(f"{what}: {error:.1e}, over {bound:.0e}")


def relevance(explainer: frpc.Explainer, x: Tensor, target: Tensor) -> Tensor:
    found = explainer(x, target=target).relevance
    assert isinstance(found, Tensor)
    return found


def small_net() -> nn.Sequential:
    """A convolutional net of 24x24 pixels with what kernels replace."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 12 * 12, 10)).eval()
