"""Layers that still lie in the picture: their relevance summed over channels, resized to the input, added up over scales."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from frpc.driver.targets import Target
from frpc.errors import OptionError, ShapeError
from frpc.explainer.explainer import Explainer

__all__ = ["MultiScale", "check_spatial", "multiscale", "picture_size", "resized", "spatial_layers", "vgg_stages"]

SHOWN = 12


@dataclass(frozen=True, eq=False)
class MultiScale:
    """A map made of several layers; unpacks as ``output, relevance``.

    Attributes:
        output: the model's output, ``[B, ...]``.
        relevance: of the pixels, ``[B, H, W]``, or ``[B, K, H, W]`` for K targets.
        scales: channel sum of each layer, ``[B, h, w]`` or ``[B, K, h, w]``.
    """

    output: Tensor
    relevance: Tensor
    scales: dict[str, Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.relevance))


def multiscale(
    explainer: Explainer,
    x: Tensor,
    target: Target | None = None,
    layers: str | Sequence[str] = "s54321",
    *,
    seed: Tensor | None = None,
) -> MultiScale:
    """``sum over layers of resize(sum over channels of R)``, all layers from one transposed pass.

    Args:
        explainer: with any rules; those of the paper are ``method="sig-lid-ig"``.
        x, target, seed: as for calling the explainer.
        layers: module paths, or stages of a VGG net: ``"s5"``, ``"s54"``, ..., ``"s54321"``; see :func:`vgg_stages`.

    Shapes: ``x [B, C, H, W]``; layers ``[B, C, h, w]``, resized bilinearly; relevance ``[B, H, W]``.

    Units: each scale sums to the relevance of its layer; resized maps are not rescaled, so a coarse layer weighs by its cells.

    Raises:
        LayerNameError: if a path names no layer.
        OptionError: for a layer without a spatial map, or stages of a net that has none.
        ShapeError: if x is no batch of pictures.

    Source: LID paper, sections 3.3 and 4.1; Jiang et al. 2021 (LayerCAM).
    """
    size = picture_size(x)
    if isinstance(layers, str):
        layers = _stages(layers, explainer) if re.fullmatch(r"s[1-5]+", layers) else [layers]
    names = list(layers)
    if not names or len(set(names)) < len(names):
        raise OptionError(f"layers={names}: name at least one layer, and each once.")
    check_spatial(explainer, x, names)
    found = explainer.at(names, x, target=target, seed=seed)
    scales = {name: found[name].sum(-3) for name in names}
    maps = [resized(scale, size) for scale in scales.values()]
    return MultiScale(found.output, sum(maps[1:], maps[0]), scales)


def vgg_stages(model: nn.Module) -> dict[str, str]:
    """Module paths of a VGG net's five stages, ``{"s1": ..., "s5": ...}``: the max pools behind its blocks of convolutions.

    Args:
        model: the net, or an explainer of it.

    Raises:
        OptionError: if the model has not just five max pools.

    Source: LID paper, section 4.1.
    """
    net = model.model if isinstance(model, Explainer) else model
    pools = [name for name, part in net.named_modules() if isinstance(part, nn.MaxPool2d)]
    if len(pools) != 5:
        raise OptionError(
            f"{type(net).__name__} has {len(pools)} max pools; the stages s1 to s5 are the five of a VGG net. "
            "Name layers by module path."
        )
    return {f"s{number}": name for number, name in enumerate(pools, 1)}


def _stages(name: str, explainer: Explainer) -> list[str]:
    stages = vgg_stages(explainer)
    return [stages[f"s{number}"] for number in name[1:]]


def picture_size(x: Tensor) -> tuple[int, int]:
    """Height and width of ``[B, C, H, W]``.

    Raises:
        ShapeError: for anything else.
    """
    if not isinstance(x, Tensor) or x.dim() != 4:
        found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"x is {found}; give pictures [B, C, H, W].")
    return int(x.shape[2]), int(x.shape[3])


def spatial_layers(explainer: Explainer, x: Tensor) -> list[str]:
    """Names the layers that are maps ``[B, C, h, w]`` of more than one place, in the order they are computed."""
    return [name for name, sizes in explainer.layer_shapes(x).items() if _is_spatial(sizes)]


def _is_spatial(sizes: Sequence[int]) -> bool:
    return len(sizes) == 3 and sizes[1] * sizes[2] > 1


def check_spatial(explainer: Explainer, x: Tensor, layers: Sequence[str]) -> None:
    """Refuses layers that are no maps ``[B, C, h, w]`` of more than one place.

    Raises:
        LayerNameError: if a path names no layer.
        OptionError: names the layers that have a spatial map.
    """
    explainer.check_layers(layers, x)
    shapes, spatial = explainer.layer_shapes(x), spatial_layers(explainer, x)
    for layer in layers:
        if layer not in spatial:
            sizes = ", ".join(map(str, ["B", *shapes[layer]]))
            known = ("..., " if len(spatial) > SHOWN else "") + ", ".join(spatial[-SHOWN:])
            raise OptionError(f"{layer} gives [{sizes}], which is not a spatial map. Layers that return one: {known or 'none'}.")


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes ``[..., h, w]`` bilinearly to ``[..., H, W]``; corners of pixels, not their centres, are aligned."""
    flat = maps.reshape([-1, 1, *maps.shape[-2:]])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).reshape([*maps.shape[:-2], *size])
