"""The nets that the benchmarks of layers run on."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from frpc.pretrained import build_model

__all__ = ["THESIS", "ThesisAlexNet", "build", "layer_path"]

THESIS = "thesis_alexnet"
CONVOLUTIONS = {f"conv{k}": f"features.{index}" for k, index in enumerate((0, 3, 6, 8, 10), start=1)}


class ThesisAlexNet(nn.Module):
    """The thesis's AlexNet for CIFAR-10 (T 3.3.1): five 3x3 convolutions, three fully connected layers, ReLU between them.

    Args:
        side: image side, 32 in the thesis; a multiple of 8.
        width: multiplies the number of channels and of hidden features, 1 in the thesis.
    """

    def __init__(self, side: int = 32, width: float = 1.0) -> None:
        super().__init__()
        channels = [3, *(round(width * c) for c in (96, 256, 384, 384, 256))]
        layers: list[nn.Module] = []
        for index, (i, o) in enumerate(pairwise(channels), start=1):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
            if index in (1, 2, 5):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        features, hidden = channels[-1] * (side // 8) ** 2, round(4096 * width)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def build(name: str, side: int, batch: int = 1, width: float = 1.0) -> tuple[nn.Module, Tensor]:
    """Returns a net with random weights, in evaluation mode, and an input for it."""
    torch.manual_seed(0)
    model = ThesisAlexNet(side, width).eval() if name == THESIS else build_model(name)
    return model.requires_grad_(False), torch.randn(batch, 3, side, side)


def layer_path(net: str, layer: str) -> str:
    """Returns the module path that ``conv1`` to ``conv5`` of the thesis's AlexNet stand for; other names stay."""
    return CONVOLUTIONS.get(layer, layer) if net == THESIS else layer
