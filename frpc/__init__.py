"""frpc: compiles a PyTorch model into a program that returns its output and where the output comes from.

explainer = frpc.compile(model, (x,))
output, relevance = explainer(x, target=243)     # relevance[b].sum() == output[b, 243]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from frpc import errors, rules
from frpc.driver.explanation import Explanation, LayerRelevance
from frpc.errors import FrpcError, InputError, UnsupportedOpError
from frpc.explainer.check import check
from frpc.explainer.compile import compile
from frpc.explainer.examine import examine
from frpc.explainer.explainer import Explainer
from frpc.files import LoadedExplainer, load
from frpc.rules.references import data_mean
from frpc.rules.sets.methods import Method, methods
from frpc.rules.table import Affine, Call, rule

if TYPE_CHECKING:
    from frpc import export, jobs, text
    from frpc.assets import digits as demo
    from frpc.attribution import baselines, cam, perturb, repeat
    from frpc.attribution.maximise import feature
    from frpc.attribution.scales import multiscale
    from frpc.canonicalize import recurrent
    from frpc.integrations import captum, images, lightning, quantus
    from frpc.integrations import torchvision as pretrained
    from frpc.plots import heatmap

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
    "export": "frpc.export",
    "heatmap": "frpc.plots.heatmap",
    "images": "frpc.integrations.images",
    "jobs": "frpc.jobs",
    "lightning": "frpc.integrations.lightning",
    "perturb": "frpc.attribution.perturb",
    "pretrained": "frpc.integrations.torchvision",
    "quantus": "frpc.integrations.quantus",
    "recurrent": "frpc.canonicalize.recurrent",
    "repeat": "frpc.attribution.repeat",
    "text": "frpc.text",
}
_FUNCTIONS = {"feature": "frpc.attribution.maximise", "multiscale": "frpc.attribution.scales"}


def __getattr__(name: str) -> Any:
    """Loads parts that not everyone needs when they are first asked for: plotting libraries take longer to load than frpc."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'frpc' has no attribute {name!r}")
