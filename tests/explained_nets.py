"""A small residual net and its explainer, and what tests ask of maps."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc

__all__ = ["Maps", "Net", "agrees", "conserves", "explainer", "images", "net", "randn", "settled"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(found: Tensor, expected: Tensor, bound: float = 1e-12) -> bool:
    """Relative L1; where nothing is expected nothing may be found."""
    return found.shape == expected.shape and bool((found - expected).abs().sum() <= bound * expected.abs().sum())


def conserves(relevance: Tensor, explained: Tensor, bound: float = 1e-12) -> bool:
    """`|sum V - y| <= bound sum|V|` for every map of a stack; explained has the stack's leading shape."""
    flat = relevance.flatten(explained.dim())
    return bool(((flat.sum(-1) - explained).abs() <= bound * flat.abs().sum(-1)).all())


class Net(nn.Module):
    """A residual net with batch norm, pooling and dropout, for `[B, 3, 12, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 6 * 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x))
        return self.head(self.drop(x).flatten(1))


def settled(model: nn.Module) -> nn.Module:
    """In float64, with parameters and batch statistics drawn at random, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 2.0, generator=generator) if "var" in name else value.normal_(generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, max(0.3, parameter[0].numel() ** -0.5), generator=generator)
    return model.double().eval()


@cache
def net() -> nn.Module:
    return settled(Net())


@cache
def explainer(bias: str = "uniform") -> frpc.Explainer:
    return frpc.compile(net(), (images(1),), bias=bias)


def images(batch: int, seed: int = 0) -> Tensor:
    return randn(batch, 3, 12, 10, seed=seed)


class Maps(nn.Module):
    """An output of several dimensions, `[B, 2, 4, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))
