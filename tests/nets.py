"""The networks the tests explain, and the shared data they are explained on.

The thesis's own two nets (T 3.3.1) and the CIFAR-10 residual nets of He et al. 2015, whose trained weights lie in
`../shared` beside the repository. A test that needs shared data skips, with the path it missed, where there is none.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from places import SHARED

CIFAR10_MEAN = (0.485, 0.456, 0.406)
CIFAR10_STD = (0.229, 0.224, 0.225)


def shared(relative: str) -> Path:
    """A path below `../shared`; skips the test where it does not exist."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative} beside the repository")
    return path


def thesis_mlp() -> nn.Sequential:
    """T 3.3.1: a perceptron 784-192-120-60-10 for MNIST, ReLU after each hidden layer."""
    widths = (28 * 28, 192, 120, 60, 10)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


class ThesisAlexNet(nn.Module):
    """T 3.3.1: AlexNet for CIFAR-10, five 3x3 convolutions and three fully connected layers, ReLU between them.

    Three 2x2 pools leave 256 channels of 4x4 = 4096 features, and 36,925,322 parameters in all.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 96, 256, 384, 384, 256)
        layers: list[nn.Module] = []
        for index, (i, o) in enumerate(pairwise(channels), start=1):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
            if index in (1, 2, 5):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (He et al. 2015, option A).

    Where the block halves the image and widens the channels, the shortcut takes every second pixel and sets the new
    channels, half of them on either side, to 0.
    """

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride = stride
        self.extra = (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        out += x
        return F.relu(out)


class CifarResNet(nn.Module):
    """The residual net of depth 6n + 2 for CIFAR-10: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, 1, blocks)
        self.layer2 = self.stage(16, 32, 2, blocks)
        self.layer3 = self.stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def stage(inner: int, outer: int, stride: int, blocks: int) -> nn.Sequential:
        """Blocks of one width, the first of which may halve the image."""
        return nn.Sequential(BasicBlock(inner, outer, stride), *(BasicBlock(outer, outer, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(depth: int) -> CifarResNet:
    """The trained ResNet-20 or -56 in evaluation mode; every key of the file must fit."""
    weights = load_file(shared(f"data/weights/resnet{depth}_cifar10.safetensors"))
    model = CifarResNet(depth)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def cifar10_test(count: int = 1000) -> tuple[Tensor, Tensor]:
    """The first test images, normalised, and their labels.

    Shapes: images [B, 3, 32, 32], labels [B].
    """
    with np.load(shared("data/cifar10/cifar10_small_5000_1000.npz")) as archive:
        pixels = torch.from_numpy(archive["x_test"][:count]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(archive["y_test"][:count]).long()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CIFAR10_MEAN, CIFAR10_STD))
    return (pixels - mean) / std, labels


def built(name: str, dtype: torch.dtype) -> nn.Module:
    """An untrained torchvision classifier with nothing degenerate in it."""
    torch.manual_seed(0)
    special = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return redrawn(torchvision.models.get_model(name, weights=None, **special)).to(dtype)


def redrawn(model: nn.Module) -> nn.Module:
    """Weights that keep the size of values through many layers; biases, statistics and affine parameters of all kinds."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.3)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return model.eval()
