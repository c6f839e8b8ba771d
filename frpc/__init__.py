"""frpc: compiles a PyTorch model into a program that returns its output and where the output comes from.

explainer = frpc.compile(model, (x,))
output, relevance = explainer(x, target=243)     # relevance[b].sum() == output[b, 243]
"""

from frpc import errors, heatmap, rules
from frpc.affine import Affine, Call, rule
from frpc.check import check
from frpc.errors import FrpcError, InputError, UnsupportedOpError
from frpc.examine import examine
from frpc.explainer import Explainer, compile
from frpc.explanation import Explanation, LayerRelevance

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Call",
    "Explainer",
    "Explanation",
    "FrpcError",
    "InputError",
    "LayerRelevance",
    "UnsupportedOpError",
    "check",
    "compile",
    "errors",
    "examine",
    "heatmap",
    "rule",
    "rules",
]
