"""A net with a constant of its own and its explainer, which tests save and load."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import frpc

__all__ = ["Net", "X", "explainer", "net", "randn", "same"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Convolutions of both strides, batch norm, a residual, a pool, a constant of its own, for `[B, 3, 8, 8]`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(24, 4)
            for name, value in self.named_buffers():
                if value.is_floating_point():
                    value.uniform_(0.5, 2.0) if "var" in name else value.normal_()
        self.register_buffer("tilt", torch.linspace(-1, 1, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.down(x) + x[:, :, ::2, ::2])
        return self.head(self.pool(x).flatten(1)) + self.tilt


@cache
def net() -> Net:
    return Net().double().eval()


X = randn(2, 3, 8, 8)


@cache
def explainer() -> frpc.Explainer:
    return frpc.compile(net(), (X,))


def same(one: frpc.Explanation, other: frpc.Explanation) -> bool:
    """Equal bit by bit, and of the same shapes."""
    pairs = [(one.output, other.output), (one.bias, other.bias)]
    several = isinstance(one.relevance, tuple)
    pairs += list(zip(one.relevance, other.relevance, strict=True)) if several else [(one.relevance, other.relevance)]
    return all(torch.equal(a, b) for a, b in pairs)
