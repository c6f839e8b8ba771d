"""The suites by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from bench.coverage.subject import Suite

__all__ = ["SUITES", "load"]

SUITES = {
    "torchvision": "bench.coverage.torchvision_models",
    "timm": "bench.coverage.timm_families",
    "transformers": "bench.coverage.transformers_models",
    "recurrent": "bench.coverage.recurrent",
}


def load(name: str) -> Suite:
    """Imports a suite; the library it is made of need not be there for the others."""
    return cast("Suite", importlib.import_module(SUITES[name]))
