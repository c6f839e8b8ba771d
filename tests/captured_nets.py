"""Models around one function, with weights that are always the same, and what tests of capture compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Cache", "Computes", "agrees", "randn", "settled"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model: nn.Module) -> nn.Module:
    """The model in float64, with weights that do not depend on the order of the tests."""
    chance = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=chance, dtype=torch.float64) / 2
    return model.eval()


def agrees(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().sum() <= 1e-10 * other.abs().sum().clamp_min(1e-300))


class Computes(nn.Module):
    """Two linear layers around a function of the module and what the first gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], outputs: int = 3) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 4), nn.LazyLinear(outputs)
        self.register_buffer("keep", torch.tensor([True, False, True, True]))
        self.register_buffer("places", torch.tensor([3, 1]))
        self.register_buffer("counts", torch.tensor([1, 0, 2, 1]))
        self.register_buffer("flag", torch.tensor(True))
        self.mask = torch.tensor([False, True, True, False])  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


class Cache:
    """An object that no one has told PyTorch about."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
