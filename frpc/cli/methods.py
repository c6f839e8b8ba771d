"""The methods that `frpc explain` knows by name, and what each says of a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import frpc
from frpc.errors import OptionError, nearest

if TYPE_CHECKING:
    from frpc.explainer.explainer import Explainer

__all__ = ["Asker", "Said", "check_methods", "known_methods"]

CAMS = ("grad-cam", "grad-cam++", "layer-cam", "guided-grad-cam", "score-cam")
REPEATED = ("integrated-gradients", "smoothgrad", "occlusion")


@dataclass(frozen=True, eq=False)
class Said:
    """What a method says of one picture.

    Attributes:
        output: the model's output ``[O]``.
        relevance: ``[K, C, H, W]``; of class activation maps and occlusion C is 1.
        left_out: what each map leaves of the number it explains, ``[K]``; None where nothing is promised.
        seconds: of the call.
    """

    output: Tensor
    relevance: Tensor
    left_out: Tensor | None
    seconds: float


def known_methods() -> list[str]:
    """Every name that ``--method`` and ``--compare`` take."""
    return [*(method.name for method in frpc.methods()), *CAMS, *REPEATED]


def check_methods(names: Sequence[str]) -> list[str]:
    """Reads names as a caller writes them.

    Raises:
        OptionError: for an unknown one; gives the nearest.
    """
    known = known_methods()
    found = [name.strip().lower().replace("_", "-") for name in names if name.strip()]
    for name in found:
        if name not in known:
            raise OptionError(f"method {name!r} is unknown; {nearest(name, known)}. docs/methods.md describes them.")
    if not found:
        raise OptionError("no method was given; name at least one, e.g. frp")
    return found


@dataclass
class Asker:
    """Explains one classifier with any method; compiled programs are kept for the next picture.

    Attributes:
        model: the classifier.
        bias: where constants go, for methods that follow them.
        layer: module path for class activation maps; None for the last layer with places.
        scales: layers whose resized relevance is added up, instead of the input's: module paths, or stages (``s54321``).
    """

    model: nn.Module
    bias: str = "uniform"
    layer: str | None = None
    scales: str = ""
    explainers: dict[str, Explainer] = field(default_factory=dict)

    def explainer(self, method: str, x: Tensor) -> Explainer:
        """Compiles a method of propagation, once."""
        if method not in self.explainers:
            bias = self.bias if method == "frp" else None
            self.explainers[method] = frpc.compile(self.model, (x,), method=method, bias=bias)
        return self.explainers[method]

    def __call__(self, method: str, x: Tensor, classes: Sequence[int]) -> Said:
        """Explains K classes of one picture, ``x [1, C, H, W]``."""
        target = torch.tensor([list(classes)])
        if method in CAMS:
            return self._activation(method, x, target)
        if method in REPEATED:
            return self._repeated(method, x, target)
        explainer = self.explainer(method, x)
        if self.scales:
            return self._at_scales(explainer, x, target)
        explainer(x, target=target)  # K targets have a separate program, compiled at the first call
        start = time.perf_counter()
        with torch.inference_mode():
            found = explainer(x, target=target)
        seconds = time.perf_counter() - start
        assert isinstance(found.relevance, Tensor)
        kept = explainer.rules.account.gives == "relevance"
        return Said(found.output[0], found.relevance[0], found.bias[0] if kept else None, seconds)

    def _at_scales(self, explainer: Explainer, x: Tensor, target: Tensor) -> Said:
        """Relevance of inner layers, resized to the picture and added up (L 3.3)."""
        from frpc.attribution.scales import multiscale

        names = [name.strip() for name in self.scales.split(",")]
        start = time.perf_counter()
        with torch.inference_mode():
            found = multiscale(explainer, x, target, names[0] if len(names) == 1 else names)
        return Said(found.output[0], found.relevance[0].unsqueeze(1), None, time.perf_counter() - start)

    def _activation(self, method: str, x: Tensor, target: Tensor) -> Said:
        from frpc.attribution import cam

        asked: dict[str, Callable[..., Any]] = {
            "grad-cam": cam.grad_cam,
            "grad-cam++": cam.grad_cam_plus_plus,
            "layer-cam": cam.layer_cam,
            "score-cam": cam.score_cam,
            "guided-grad-cam": cam.guided_grad_cam,
        }
        explainer = self.explainer("gradient", x)
        layer = self.layer or self._last_layer(explainer, x)
        start = time.perf_counter()
        found = asked[method](explainer, x, layer, target)
        seconds = time.perf_counter() - start
        maps = found.relevance[0] if method == "guided-grad-cam" else found.on()[0].unsqueeze(1)
        return Said(found.output[0], maps, None, seconds)

    def _last_layer(self, explainer: Explainer, x: Tensor) -> str:
        from frpc.attribution.scales import spatial_layers

        layers = spatial_layers(explainer, x)
        if not layers:
            raise OptionError("the model has no spatial layer; class activation maps need one")
        return layers[-1]

    def _repeated(self, method: str, x: Tensor, target: Tensor) -> Said:
        from frpc.attribution import perturb, repeat

        start = time.perf_counter()
        if method == "occlusion":
            side = max(1, int(x.shape[-1]) // 14)
            found: Any = perturb.occlusion(self.explainer("gradient", x), x, target, window=2 * side, stride=side, progress=True)
            maps, left_out = found.relevance[0].unsqueeze(1), None
        else:
            ask = repeat.integrated_gradients if method == "integrated-gradients" else repeat.smoothgrad
            found = ask(self.explainer("gradient", x), x, target, progress=True)
            maps, left_out = found.relevance[0], None if found.delta is None else -found.delta[0]
        return Said(found.output[0], maps, left_out, time.perf_counter() - start)
