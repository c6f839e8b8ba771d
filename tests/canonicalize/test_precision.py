"""Models that compute in float32 inside: their account in float64 is exact all the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import frpc


class Root(nn.Module):
    """A root-mean-square norm as libraries write it, in float32 whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inner(x))
        wide = h.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.outer(wide.to(h.dtype))


class Scan(nn.Module):
    """A state that is made in float32 and multiplied with what a cast made float32, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.inner(x).float()
        state = torch.full((8, 3), 0.5, dtype=torch.float32, device=x.device)
        return torch.mm(steps, state) + torch.ones(3, dtype=torch.float32)


def test_a_state_made_in_float32_meets_float64() -> None:
    torch.manual_seed(0)
    model, x = Scan().double().eval(), torch.randn(4, 8, dtype=torch.float64)
    out = frpc.compile(model, (x,))(x, target=1)
    error = (out.relevance.sum(1) - out.output[:, 1]).abs() / out.relevance.abs().sum(1)
    assert out.output.dtype is torch.float64
    assert float(error.max()) <= 1e-12
    assert torch.allclose(out.output, model(x).double(), rtol=0, atol=1e-6)


def test_float64_is_kept() -> None:
    torch.manual_seed(0)
    model, x = Root().double().eval(), torch.randn(4, 8, dtype=torch.float64)
    out = frpc.compile(model, (x,))(x, target=1)
    error = (out.relevance.sum(1) - out.output[:, 1]).abs() / out.relevance.abs().sum(1)
    assert float(error.max()) <= 1e-12
    assert torch.allclose(out.output, model(x), rtol=0, atol=1e-6)  # the model's own rounding, and no more


def test_float32_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Root().eval(), torch.randn(4, 8)
    assert "keep_float64" not in frpc.compile(model, (x,)).stages[1].passes
