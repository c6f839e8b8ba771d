"""The nets that benchmarks run on: torchvision's classifiers, and the thesis's two."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.coverage.subject import redraw
from frpc.integrations.torchvision import build_model, recipe

__all__ = ["CONVOLUTIONS", "MLP", "THESIS", "ThesisAlexNet", "build", "is_piecewise_linear", "layer_path"]

THESIS, MLP = "thesis_alexnet", "thesis_mlp"
MLP_WIDTHS = (28 * 28, 192, 120, 60, 10)
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


def thesis_mlp() -> nn.Sequential:
    """The thesis's perceptron for MNIST (T 3.3.1): 784-192-120-60-10, ReLU after each hidden layer."""
    layers = [layer for i, o in pairwise(MLP_WIDTHS) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def build(name: str, side: int | None = None, batch: int = 1, width: float = 1.0) -> tuple[nn.Module, Tensor]:
    """Returns a net with random weights, in evaluation mode, and an input ``[B, C, side, side]`` for it.

    Args:
        name: ``thesis_alexnet``, ``thesis_mlp`` or a torchvision classifier.
        side: image side; the one the net was made for if left out.
        batch: samples.
        width: multiplies the channels of the thesis's AlexNet.
    """
    torch.manual_seed(0)
    if name == MLP:
        return thesis_mlp().eval().requires_grad_(False), torch.randn(batch, 1, 28, 28)
    if name == THESIS:
        side = side or 32
        model: nn.Module = ThesisAlexNet(side, width).eval()
    else:
        side, model = side or recipe(name).crop, build_model(name)
        if not is_piecewise_linear(model):
            redraw(model)  # layer scales of 1e-6 and heads of zeros would make every check pass for nothing
    return model.requires_grad_(False), torch.randn(batch, 3, side, side)


def is_piecewise_linear(model: nn.Module) -> bool:
    """Whether a net is made of layers between whose kinks it is linear: its map is then input times gradient and a share."""
    known = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    other = (nn.Flatten, nn.Dropout, nn.Identity)
    return all(isinstance(module, known + other) for module in model.modules() if not list(module.children()))


def layer_path(net: str, layer: str) -> str:
    """Returns the module path that ``conv1`` to ``conv5`` of the thesis's AlexNet stand for; other names stay."""
    return CONVOLUTIONS.get(layer, layer) if net == THESIS else layer
