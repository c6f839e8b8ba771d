"""The net that tests of exports export, and how far two answers are apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["relative_l1", "small_net"]


def small_net() -> nn.Sequential:
    """Strides, groups, padding, overlapping pools and a batch norm, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 7),
    ).eval()


def relative_l1(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().sum() / expected.abs().sum())
