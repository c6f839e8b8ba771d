"""A net that stands among other PyTorch code, its explainer, and the forms in which it is asked."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import frpc

__all__ = ["PAIRS", "TARGETS", "Net", "X", "explainer", "net", "randn", "same"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """Convolutions with batch norm, a residual and a pool, for `[B, 3, 8, 8]`; `scale` is an attribute and no parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(6 * 4 * 4, 5)
            self.scale = 1.0
            for name, value in self.named_buffers():
                if value.is_floating_point():
                    value.uniform_(0.5, 2.0) if "var" in name else value.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(self.pool(x).flatten(1)) * self.scale


@cache
def net() -> Net:
    return Net().double().eval()


X = randn(4, 3, 8, 8)
PAIRS = torch.tensor([[1, 2], [3, 4], [0, 1], [2, 2]])


@cache
def explainer() -> frpc.Explainer:
    found = frpc.compile(net(), (X,))
    found(X, target=PAIRS)
    return found


def same(one: frpc.Explanation, other: frpc.Explanation) -> bool:
    """Equal bit by bit, and of the same shapes."""
    pairs = ((one.output, other.output), (one.relevance, other.relevance), (one.bias, other.bias))
    return all(torch.equal(a, b) for a, b in pairs)


TARGETS: dict[str, Any] = {
    "int": {"target": 2},
    "one each": {"target": PAIRS[:, 0]},
    "K each": {"target": PAIRS},
    "seed": {"seed": randn(4, 5, seed=1)},
    "top": {"target": 2, "seed": "probability"},
}
