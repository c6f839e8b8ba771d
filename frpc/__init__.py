"""frpc: compiles a PyTorch model into a program that returns its output and where the output comes from.

explainer = frpc.compile(model, (x,))
output, relevance = explainer(x, target=243)     # relevance[b].sum() == output[b, 243]

``import frpc`` loads almost nothing. PyTorch is loaded when a public name is first used, matplotlib when something is drawn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frpc import errors, export, jobs, rules, text
    from frpc.assets import digits as demo
    from frpc.attribution import baselines, cam, perturb, repeat
    from frpc.attribution.maximise import feature
    from frpc.attribution.scales import multiscale
    from frpc.canonicalize import recurrent
    from frpc.driver.explanation import Explanation, LayerRelevance
    from frpc.errors import FrpcError, InputError, UnsupportedOpError
    from frpc.explainer.check import check
    from frpc.explainer.compile import compile
    from frpc.explainer.examine import examine
    from frpc.explainer.explainer import Explainer
    from frpc.files import LoadedExplainer, load
    from frpc.integrations import captum, images, lightning, quantus
    from frpc.integrations import torchvision as pretrained
    from frpc.plots import heatmap
    from frpc.rules.references import data_mean
    from frpc.rules.sets.methods import Method, methods
    from frpc.rules.table import Affine, Call, rule

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Call",
    "Explainer",
    "Explanation",
    "FrpcError",
    "InputError",
    "LayerRelevance",
    "LoadedExplainer",
    "Method",
    "UnsupportedOpError",
    "baselines",
    "cam",
    "captum",
    "check",
    "compile",
    "data_mean",
    "demo",
    "errors",
    "examine",
    "export",
    "feature",
    "heatmap",
    "images",
    "jobs",
    "lightning",
    "load",
    "methods",
    "multiscale",
    "perturb",
    "pretrained",
    "quantus",
    "recurrent",
    "repeat",
    "rule",
    "rules",
    "text",
]

_MODULES = {
    "baselines": "frpc.attribution.baselines",
    "cam": "frpc.attribution.cam",
    "captum": "frpc.integrations.captum",
    "demo": "frpc.assets.digits",
    "errors": "frpc.errors",
    "export": "frpc.export",
    "heatmap": "frpc.plots.heatmap",
    "images": "frpc.integrations.images",
    "jobs": "frpc.jobs",
    "lightning": "frpc.integrations.lightning",
    "maps": "frpc.maps",
    "perturb": "frpc.attribution.perturb",
    "pretrained": "frpc.integrations.torchvision",
    "quantus": "frpc.integrations.quantus",
    "recurrent": "frpc.canonicalize.recurrent",
    "repeat": "frpc.attribution.repeat",
    "rules": "frpc.rules",
    "text": "frpc.text",
}
_DEFINED_IN = {
    "Affine": "frpc.rules.table",
    "Call": "frpc.rules.table",
    "Explainer": "frpc.explainer.explainer",
    "Explanation": "frpc.driver.explanation",
    "FrpcError": "frpc.errors",
    "InputError": "frpc.errors",
    "LayerRelevance": "frpc.driver.explanation",
    "LoadedExplainer": "frpc.files",
    "Method": "frpc.rules.sets.methods",
    "UnsupportedOpError": "frpc.errors",
    "check": "frpc.explainer.check",
    "compile": "frpc.explainer.compile",
    "data_mean": "frpc.rules.references",
    "examine": "frpc.explainer.examine",
    "feature": "frpc.attribution.maximise",
    "load": "frpc.files",
    "methods": "frpc.rules.sets.methods",
    "multiscale": "frpc.attribution.scales",
    "rule": "frpc.rules.table",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used."""
    if name in _MODULES:
        found: Any = import_module(_MODULES[name])
    elif name in _DEFINED_IN:
        found = getattr(import_module(_DEFINED_IN[name]), name)
    else:
        raise AttributeError(f"module 'frpc' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
