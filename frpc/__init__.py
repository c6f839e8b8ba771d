"""frpc: compiles a PyTorch model into a program that returns its output and where the output comes from.

explainer = frpc.compile(model, (x,))
output, relevance = explainer(x, target=243)     # relevance[b].sum() == output[b, 243]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from frpc import errors, rules
from frpc.affine import Affine, Call, rule
from frpc.check import check
from frpc.errors import FrpcError, InputError, UnsupportedOpError
from frpc.examine import examine
from frpc.explainer import Explainer, compile
from frpc.explanation import Explanation, LayerRelevance
from frpc.methods import Method, methods
from frpc.references import data_mean

if TYPE_CHECKING:
    from frpc import heatmap, repeat, text

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Call",
    "Explainer",
    "Explanation",
    "FrpcError",
    "InputError",
    "LayerRelevance",
    "Method",
    "UnsupportedOpError",
    "check",
    "compile",
    "data_mean",
    "errors",
    "examine",
    "heatmap",
    "methods",
    "repeat",
    "rule",
    "rules",
    "text",
]


_MODULES = ("heatmap", "repeat", "text")


def __getattr__(name: str) -> Any:
    """Loads parts that not everyone needs when they are first asked for: plotting libraries take longer to load than frpc."""
    if name in _MODULES:
        return import_module(f"frpc.{name}")
    raise AttributeError(f"module 'frpc' has no attribute {name!r}")
