"""Class activation maps: the activations of a layer, weighted by what one transposed pass brings to it.

With A the activations and G = dy/dA the multipliers of a layer, both from one compiled program, every map here is one formula in
A and G. Score-CAM asks for forward passes instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frpc.attribution.passes import MEMORY_LIMIT, Asked, Score, ask
from frpc.attribution.scales import check_spatial, picture_size, resized
from frpc.driver.targets import Target
from frpc.errors import OptionError
from frpc.explainer.explainer import Explainer
from frpc.rules import GuidedBackprop

__all__ = ["ClassActivation", "Guided", "cam", "grad_cam", "grad_cam_plus_plus", "guided_grad_cam", "layer_cam", "score_cam"]


@dataclass(frozen=True, eq=False)
class ClassActivation:
    """A map of a layer's places; unpacks as ``output, map``.

    Attributes:
        output: the model's output, ``[B, ...]``.
        map: ``[B, h, w]``, or ``[B, K, h, w]`` for K targets.
        weights: of the channels, ``[B, C]`` or ``[B, K, C]``; None where each place has its own.
        layer: module path.
        size: of the input, ``(H, W)``.
    """

    output: Tensor
    map: Tensor
    weights: Tensor | None
    layer: str
    size: tuple[int, int]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.map))

    def on(self, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the map resized bilinearly to the input, or to another size: ``[B, H, W]`` or ``[B, K, H, W]``."""
        return resized(self.map, size or self.size)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A layer in one pass: A and G, ``[B, C, h, w]``, or ``[B, 1, C, h, w]`` and ``[B, K, C, h, w]`` for K targets."""

    layer: str
    size: tuple[int, int]
    output: Tensor
    a: Tensor
    g: Tensor

    def map(self, channels: Tensor, weights: Tensor | None, rectify: bool = True) -> ClassActivation:
        """Sums weighted channels ``[..., C, h, w]``."""
        summed = channels.sum(-3)
        return ClassActivation(self.output, summed.relu() if rectify else summed, weights, self.layer, self.size)

    def weighted(self, weights: Tensor, rectify: bool = True) -> ClassActivation:
        """One weight for each channel ``[..., C]``."""
        return self.map(weights[..., None, None] * self.a, weights, rectify)


def _look(
    explainer: Explainer | nn.Module,
    x: Tensor,
    layer: str,
    target: Target | None,
    seed: Tensor | None,
    of: Score | None = None,
    gradients: bool = True,
) -> tuple[Asked, _Seen]:
    picture_size(x)
    asked = ask(explainer, x, target, seed, of, gradients)
    check_spatial(asked.explainer, x, [layer])
    return asked, _seen(asked, asked.x, layer)


def _seen(asked: Asked, x: Tensor, layer: str) -> _Seen:
    found = asked.explainer.at([layer], x, seed=asked.functional)
    a = found.activations[layer]
    return _Seen(layer, picture_size(x), found.output, a.unsqueeze(1) if asked.columns else a, found[layer])


def cam(
    explainer: Explainer | nn.Module,
    x: Tensor,
    layer: str,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    rectify: bool = True,
) -> ClassActivation:
    """``ReLU(sum_k w_k A_k)``, w the class's weights in a linear layer behind global average pooling.

    Args:
        explainer: a model, or an explainer compiled with gradient rules.
        x, target, seed: as for calling an explainer.
        layer: module path of the last layer before the pooling.
        rectify: keep what is positive alone.

    Shapes: ``x [B, C, H, W]``, the layer ``[B, C, h, w]``.

    Exact when: ``y = sum_k w_k mean(A_k) + b``. The weights are read off the multipliers, ``w_k = h w dy/dA_k``, which have to be
    the same at every place, and at another input.

    Raises:
        OptionError: if the net is not built so, or the layer has no spatial map; names those that have.
        LayerNameError: if no layer has that path.

    Source: Zhou et al. 2016; S 28.
    """
    asked, seen = _look(explainer, x, layer, target, seed)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    elsewhere = _seen(asked, noise, layer).g
    average = seen.g.mean((-2, -1), keepdim=True)
    bound = torch.finfo(x.dtype).eps ** 0.5 * float(average.abs().max())
    if float((seen.g - average).abs().max()) > bound:
        raise OptionError(
            f"{layer} is not followed by global average pooling and one linear layer: positions of a channel have different "
            "weights. CAM only works for such nets. Use frpc.cam.grad_cam: it gives the same there, and works for other nets too."
        )
    if float((elsewhere - average).abs().max()) > bound:
        raise OptionError(
            f"After {layer} the net is not linear: the weights of its channels depend on the input. CAM needs global average "
            "pooling and one linear layer. Use frpc.cam.grad_cam: it gives the same there, and works for other nets too."
        )
    places = seen.a.shape[-2] * seen.a.shape[-1]
    return seen.weighted(average[..., 0, 0] * places, rectify)


def grad_cam(
    explainer: Explainer | nn.Module,
    x: Tensor,
    layer: str,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    rectify: bool = True,
) -> ClassActivation:
    """``ReLU(sum_k alpha_k A_k)``, ``alpha_k = mean over places of dy/dA_k``.

    Args:
        explainer, x, target, seed, rectify: as for :func:`cam`.
        layer: module path.

    Shapes: ``x [B, C, H, W]``, the layer ``[B, C, h, w]``.

    Raises:
        OptionError: for a layer without a spatial map, or rules that are no gradients.
        LayerNameError: if no layer has that path.

    Source: Selvaraju et al. 2017, eqs. 1 and 2; S 29, 30.
    """
    _, seen = _look(explainer, x, layer, target, seed)
    return seen.weighted(seen.g.mean((-2, -1)), rectify)


def grad_cam_plus_plus(
    explainer: Explainer | nn.Module, x: Tensor, layer: str, target: Target | None = None, *, seed: Tensor | None = None
) -> ClassActivation:
    """``ReLU(sum_k w_k A_k)``, ``w_k = sum over places of alpha ReLU(G)``, ``alpha = G^2 / (2 G^2 + sum(A_k) G^3)``.

    Args:
        explainer, x, layer, target, seed: as for :func:`grad_cam`. The paper explains exp(y), which scales the map by exp(y) > 0;
            the factor is left out.

    Shapes: as for :func:`grad_cam`.

    Raises:
        OptionError, LayerNameError: as for :func:`grad_cam`.

    Source: Chattopadhyay et al. 2018, eqs. 5 and 19.
    """
    _, seen = _look(explainer, x, layer, target, seed)
    divisor = 2 + seen.a.sum((-2, -1), keepdim=True) * seen.g  # of alpha, G^2 cancelled: G^3 underflows
    tiny = torch.finfo(x.dtype).eps
    divisor = torch.where(divisor.abs() < tiny, tiny, divisor)  # activations of both signs may cancel the 2
    return seen.weighted((seen.g.relu() / divisor).sum((-2, -1)))


def layer_cam(
    explainer: Explainer | nn.Module, x: Tensor, layer: str, target: Target | None = None, *, seed: Tensor | None = None
) -> ClassActivation:
    """``ReLU(sum_k ReLU(G_k) A_k)``, each place with its own weight: for early layers too.

    Args:
        explainer, x, layer, target, seed: as for :func:`grad_cam`.

    Shapes: as for :func:`grad_cam`.

    Raises:
        OptionError, LayerNameError: as for :func:`grad_cam`.

    Source: Jiang et al. 2021, eqs. 5 to 7.
    """
    _, seen = _look(explainer, x, layer, target, seed)
    return seen.map(seen.g.relu() * seen.a, None)


@dataclass(frozen=True, eq=False)
class Guided:
    """Guided backpropagation where a class activation map is; unpacks as ``output, relevance``.

    Attributes:
        output: the model's output, ``[B, ...]``.
        relevance: like the input, ``[B, C, H, W]`` or ``[B, K, C, H, W]``.
        cam: the map it was multiplied by.
    """

    output: Tensor
    relevance: Tensor
    cam: ClassActivation

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.relevance))


def guided_grad_cam(
    explainer: Explainer | nn.Module,
    x: Tensor,
    layer: str,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    guided: Explainer | None = None,
) -> Guided:
    """Guided backpropagation times Grad-CAM resized to the input: two passes, since each pulls by rules of its own.

    Args:
        explainer, x, layer, target, seed: as for :func:`grad_cam`.
        guided: an explainer compiled with ``method="guided-backprop"``, to spare compiling one.

    Shapes: as for :func:`grad_cam`.

    Raises:
        OptionError: if ``guided`` has other rules; else as for :func:`grad_cam`.
        LayerNameError: as for :func:`grad_cam`.

    Source: Selvaraju et al. 2017, section 3.2.
    """
    if guided is not None and not isinstance(guided.rules, GuidedBackprop):
        raise OptionError(f'guided= was compiled with {guided.rules.name}; compile it with method="guided-backprop".')
    asked, seen = _look(explainer, x, layer, target, seed)
    found = seen.weighted(seen.g.mean((-2, -1)))
    backprop = (guided or asked.explainer.with_rules(GuidedBackprop()))(asked.x, seed=asked.functional)
    return Guided(seen.output, backprop.relevance * found.on().unsqueeze(-3), found)


def score_cam(
    explainer: Explainer | nn.Module,
    x: Tensor,
    layer: str,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    of: Score = "logit",
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> ClassActivation:
    """``ReLU(sum_k alpha_k A_k)``, ``alpha = softmax over k of f(x * M_k)``, M_k the channel resized to x and scaled to [0, 1].

    Args:
        explainer: a model, or an explainer with any rules.
        x, layer, target, seed: as for :func:`grad_cam`.
        of: what is watched, the class's ``"logit"`` or its ``"probability"``. The paper's baseline f(x_b) is the same for all
            channels and cancels in the softmax.
        internal_batch_size, memory_limit: masked inputs that run at one time; by default as many as so many bytes hold.
        progress: show a progress bar.

    Shapes: as for :func:`grad_cam`.

    Raises:
        OptionError, LayerNameError: as for :func:`grad_cam`.

    Source: Wang et al. 2020, definitions 2 and 3, algorithm 1; a channel that is the same everywhere masks all of x.
    """
    asked, seen = _look(explainer, x, layer, target, seed, of, gradients=False)
    channels = seen.a[:, 0] if asked.columns else seen.a

    def masked(variants: Tensor, samples: Tensor) -> Tensor:
        mask = resized(channels[samples, variants], seen.size)
        mask = mask - mask.amin((1, 2), keepdim=True)
        highest = mask.amax((1, 2), keepdim=True)
        return asked.x[samples] * (mask / torch.where(highest > 0, highest, 1)).unsqueeze(1)

    count = int(channels.shape[1])
    batch = asked.batch_size(count, internal_batch_size, memory_limit, pulls=False)
    scores = asked.scores(count, masked, batch, "Score-CAM" if progress else "")
    return seen.weighted(scores.softmax(-1))
