"""Ties: elements that are equal, exactly or but for rounding.

Gradient methods do what autograd does there. Forward relevance propagation takes the first and conserves. Increments share
evenly, so that it does not matter which of them rounding made the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from families import both_ways, built, error, explained, prepared, randn
from frpc.rules import FRP, LID, Gradient, LIDTaylor


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, so that there are many ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


HELD = whole(3, 4, seed=9)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(-1),
    "amax, two dimensions": lambda x: x.amax((1, 2), keepdim=True),
    "amin": lambda x: x.amin(1),
    "amin, two dimensions": lambda x: x.amin((-1, -2)),
    "max along a dimension": lambda x: x.max(-1).values,
    "min along a dimension": lambda x: x.min(1, keepdim=True).values,
    "max of a sample": lambda x: x.flatten(1).max(1)[0],
    "maximum": lambda x: torch.maximum(x, x.flip(-1) + 0 * x),
    "maximum of a constant": lambda x: torch.maximum(x, HELD),
    "minimum": lambda x: torch.minimum(x, x.roll(1, 2)),
    "minimum of a constant": lambda x: torch.minimum(HELD, x),
    "max of two": lambda x: torch.max(x, x.roll(1, 1)),
    "fmax": lambda x: torch.fmax(x, x.roll(1, 2)),
    "fmin": lambda x: torch.fmin(x.roll(1, 2), x),
    "fmax of a constant": lambda x: torch.fmax(HELD, x),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp from below": lambda x: x.clamp(min=0),
    "clamp from above": lambda x: x.clamp(max=1),
    "clamp by tensors": lambda x: x.clamp(HELD - 1, HELD),
    "clamp by a tensor below": lambda x: x.clamp(min=HELD),
    "clamp by the input": lambda x: torch.clamp(HELD + 0 * x, min=x),
    "hardtanh": lambda x: F.hardtanh(x, -1, 1),
    "relu": torch.relu,
    "relu6": lambda x: F.relu6(x * 3),
    "leaky relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "threshold": lambda x: F.threshold(x, 1.0, 0.5),
    "hardshrink": lambda x: F.hardshrink(x, 1.0),
    "softshrink": lambda x: F.softshrink(x, 1.0),
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "hardswish": lambda x: F.hardswish(3 * x),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=torch.float64)),
    "abs": torch.abs,
    "sign": lambda x: x.sign() * 2 + x,
    "max pool": lambda x: F.max_pool2d(x[:, None], 2)[:, 0],
    "max pool, overlapping": lambda x: F.max_pool2d(x[:, None], 3, 1, 1)[:, 0],
    "max pool, 1d": lambda x: F.max_pool1d(x, 2),
    "max pool, adaptive": lambda x: F.adaptive_max_pool2d(x[:, None], (2, 3))[:, 0],
    "sort": lambda x: x.sort(-1).values,
    "sort, stable": lambda x: x.sort(dim=-1, stable=True, descending=True).values,
    "topk": lambda x: x.topk(2, -1).values,
    "median": lambda x: x.median(-1).values,
    "kthvalue": lambda x: x.kthvalue(2, -1).values,
    "mode": lambda x: x.mode(-1).values,
    "cummax": lambda x: x.cummax(-1).values,
    "cummin": lambda x: x.cummin(-1).values,
    "norm": lambda x: (x * HELD.clamp(min=0)).norm(dim=-1),
    "norm of zeros": lambda x: (x * 0).norm(dim=-1) + x.sum(-1),
    "norm, order 1": lambda x: x.norm(1, dim=-1),
    "norm, order 3": lambda x: (x * HELD).norm(3, dim=-1),
    "largest, by abs and amax": lambda x: x.abs().amax(-1),
    "range": lambda x: x.amax(-1) - x.amin(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "square root of a square": lambda x: (x.square() + 1).sqrt(),
    "where": lambda x: torch.where(x >= 0, x, -2 * x),
    "all pairs": lambda x: (x[:, :, :, None] - x[:, :, None]).abs().sum(-1),
}  # fmt: skip


of = functools.cache(lambda name: Of(FUNCTIONS[name]))
"""The module of a function, with one capture for all rules."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_on_ties_is_autograds(name: str) -> None:
    """Also where PyTorch chooses: evenly (amax, maximum), the first or last (max along a dimension, sort), none (relu at 0)."""
    model, x = of(name), whole(3, 3, 4)
    x.requires_grad_()
    output = model(x)
    seed = randn(*output.shape, seed=7)
    (expected,) = torch.autograd.grad(output, x, seed)
    x = x.detach()
    for rules in (Gradient(times_input=False), LIDTaylor(torch.full_like(x[:1], 0.5))):
        found = explained(model, x, rules, seed)
        times = 1.0 if isinstance(rules, Gradient) else x - 0.5
        assert torch.allclose(found, expected * times, rtol=0, atol=1e-13), type(rules).__name__


CONSERVING = [
    name for name in FUNCTIONS if name.startswith(("am", "ma", "mi", "fm", "sort", "topk", "median", "kth", "mode", "cum"))
]


@pytest.mark.parametrize("name", CONSERVING)
def test_relevance_on_ties_is_conserved(name: str) -> None:
    """Whichever of equal elements takes it: relevance of the input and of constants is the output."""
    model, x = of(name), whole(3, 3, 4)
    output = model(x)
    seed = randn(*output.shape, seed=7)
    ready = prepared(model, [x], FRP())
    _, relevance, bias = ready.run([x], seed)
    explained_ = (seed * output).reshape(len(x), -1).sum(1)
    assert torch.allclose(relevance.flatten(1).sum(1) + bias, explained_, rtol=0, atol=1e-12)


# Increments ------------------------------------------------------------------------------------------------------------------


def pooled(kind: str, overlapping: bool = False) -> nn.Module:
    kernel = {"kernel_size": 3, "stride": 2, "padding": 1} if overlapping else {"kernel_size": 2}
    return {
        "2d": lambda: nn.MaxPool2d(**kernel),
        "3d": lambda: nn.MaxPool3d(**kernel),
        "adaptive": lambda: nn.AdaptiveMaxPool2d((2, 3)),
    }[kind]()


POOLS = [("2d", False), ("2d", True), ("3d", False), ("3d", True), ("adaptive", False)]


@functools.cache
def shared_by_hand(kind: str, overlapping: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole numbers with ties at both ends, and each window's increment shared by the definition, window by window."""
    shape = (2, 4, 5, 5) if kind == "3d" else (2, 5, 7)
    x, r = whole(2, *shape, seed=1), whole(1, *shape, seed=2)
    pool = pooled(kind, overlapping)
    seed = randn(*pool(x).shape, seed=5)
    number = torch.arange(x[0, 0].numel()).double().reshape(1, 1, *shape[1:])
    found = torch.zeros_like(x).flatten(2)
    cells = range(x[0, 0].numel())
    members = [  # of each position: moving a cell far up is seen where it is in the window
        (pool(torch.where(number == cell, 1.0, 0.0)) > 0).flatten().tolist() for cell in cells
    ]
    for b in range(2):
        for c in range(shape[0]):
            a, there = x[b, c].flatten(), r[0, c].flatten()
            for position, weight in enumerate(seed[b, c].flatten().tolist()):
                window = [cell for cell in cells if members[cell][position]]
                won = [i for i in window if a[i] == max(a[k] for k in window)]
                began = [i for i in window if there[i] == max(there[k] for k in window)]
                g = float(a[won].mean() - a[began].mean())
                h = float(there[began].mean() - there[won].mean())
                share = 1.0 if h == 0 else g / (g + h)
                for group, part in ((won, share), (began, 1 - share)):
                    for i in group:
                        found[b, c, i] += weight * part / len(group) * (a[i] - there[i])
    return x, r, seed, found.reshape(x.shape)


@pytest.mark.parametrize(("kind", "overlapping"), POOLS)
def test_pools_share_ties_evenly(kind: str, overlapping: bool) -> None:
    x, r, seed, expected = shared_by_hand(kind, overlapping)
    pool = pooled(kind, overlapping)
    found = explained(pool, x, LID(r), seed)
    assert error(found, expected) <= 1e-12
    gained = (seed * (pool(x) - pool(r))).flatten(1).sum(1)
    assert torch.allclose(found.flatten(1).sum(1), gained, rtol=0, atol=1e-12)
    assert both_ways(pool, (x,), LID(r)) <= 1e-11


@pytest.mark.parametrize("name", ["amax", "amax, two dimensions", "amin", "max along a dimension", "min along a dimension"])
def test_extremes_share_ties_evenly(name: str) -> None:
    """As a pool over the same elements would; and what a shift of one tied element by a rounding does is a rounding."""
    model, x, r = of(name), whole(3, 3, 4, seed=3), torch.ones(1, 3, 4, dtype=torch.float64)
    seed = randn(*model(x).shape, seed=5)
    found = explained(model, x, LID(r), seed)
    moved = explained(model, x * (1 + 1e-16 * randn(*x.shape)), LID(r * (1 + 1e-16 * randn(1, 3, 4, seed=4))), seed)
    assert error(moved, found) <= 1e-13
    gained = (seed * (model(x) - model(r))).flatten(1).sum(1)
    assert torch.allclose(found.flatten(1).sum(1), gained, rtol=0, atol=1e-12)


WAYS = {"ends": LID(), "path": LID(pooling="path"), "steps": LID(steps=4)}
CELLS = [
    pytest.param(rules, kind, id=f"{kind}-{way}", marks=[pytest.mark.slow] if (way, kind) == ("path", "3d") else [])
    for way, rules in WAYS.items()
    for kind in ("2d", "3d")
]


@pytest.mark.parametrize(("rules", "kind"), CELLS)
def test_rounding_does_not_choose_the_winner(rules: LID, kind: str) -> None:
    """At a blank reference a convolution sees the same everywhere: its elements are equal but for rounding.

    The map in float32 is as near to that in float64 as rounding allows, and does not change by more when the order of summation
    does (here: the order of the input channels).
    """
    convolution, pool = (nn.Conv2d, nn.MaxPool2d) if kind == "2d" else (nn.Conv3d, nn.MaxPool3d)
    size = (16, 16) if kind == "2d" else (8, 8, 8)

    def net() -> nn.Sequential:
        layers = [convolution(3, 16, 3, padding=1), nn.ReLU(), convolution(16, 16, 3, padding=1), nn.ReLU(), pool(2)]
        return nn.Sequential(*layers, convolution(16, 8, 3, padding=1), nn.ReLU(), pool(2), nn.Flatten(), nn.LazyLinear(4))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net()
        model(torch.zeros(1, 3, *size))
    model = built(lambda: model)
    x = randn(2, 3, *size, seed=3).float().double()
    x[:, :, :8] = 0.5  # half of it blank too, and not as the reference is
    exact = explained(model, x, rules, torch.eye(4, dtype=torch.float64)[[2, 2]])
    narrow = frpc.compile(model.float(), x.float(), rule=rules)(x.float(), target=2)
    assert error(narrow.relevance.double(), exact) <= 2e-6
    if rules.steps is not None:
        return  # complete in the limit of many points only
    gained = narrow.output[:, 2].double() - model.double()(torch.zeros_like(x))[:, 2].detach()
    assert float((narrow.relevance.double().flatten(1).sum(1) - gained).abs().max()) <= 1e-5 * float(gained.abs().max())


def test_two_values_that_tie_on_the_whole_way_share() -> None:
    """Of max(a, b) with a = b at both ends neither is ahead: half to each, in whatever order they are written."""
    x = randn(2, 4)
    for function in (torch.maximum, torch.minimum, torch.fmax, torch.fmin):
        model = Of(lambda u, function=function: function(u[:, :2], u[:, 2:]))
        tied = torch.cat([x[:, :2], x[:, :2]], 1)
        found = explained(model, tied, LID(), torch.ones(2, 2, dtype=torch.float64))
        assert torch.allclose(found, tied / 2), function


def test_where_elements_lie_apart_nothing_is_shared() -> None:
    """Near misses: elements a thousandth apart, in float32 and float64, are no ties; one winner takes all."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[[[1.0, 1.001], [0.5, 0.999]]]], dtype=dtype)
        found = frpc.compile(nn.MaxPool2d(2), x, rule=LID())(x, seed=torch.ones(1, 1, 1, 1, dtype=dtype)).relevance
        assert torch.equal(found != 0, torch.tensor([[[[False, True], [False, False]]]]))
