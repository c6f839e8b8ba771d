"""A perceptron and its explainer."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import frpc

__all__ = ["Perceptron", "explainer", "randn"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first, self.act, self.last = nn.Flatten(), nn.Linear(15, 6), nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(self.flat(x))))


@cache
def explainer() -> frpc.Explainer:
    """Takes `[B, 3, 5]`, returns `[B, 4]`."""
    torch.manual_seed(0)
    return frpc.compile(Perceptron().double(), (randn(2, 3, 5),))
