"""New weights: taken without another capture, or refused; what depends on values is decided again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import frpc
from composed_net import PAIRS, TARGETS, Net, X, explainer, net, randn, same
from families import compiled
from frpc.core.values import is_traced
from frpc.errors import CompileError, NonFiniteError, TargetError, WeightsError


def test_refresh_takes_trained_weights_without_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to compiling the trained model, for every program compiled so far: folded norms and packed kernels included."""
    model = Net(seed=4).double()
    taken = frpc.compile(model, (X,))
    taken(X, target=PAIRS)
    taken.at("block", X, target=1)
    programs = list(taken.programs.compiled)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X + 0.1 * step), PAIRS[:, 0]).backward()
        optimizer.step()
    fresh = frpc.compile(model, (X,))
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("captured again"))
        assert taken.refresh(model) is taken
        assert list(taken.programs.compiled) == programs
    for name in ("int", "one each", "K each", "seed"):
        assert same(taken(X, **TARGETS[name]), fresh(X, **TARGETS[name])), name
    assert torch.equal(taken.at("block", X, target=1)["block"], fresh.at("block", X, target=1)["block"])


def test_refresh_leaves_the_model_alone() -> None:
    model = Net(seed=5).double().train()
    taken = frpc.compile(model, (X,)).refresh(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    before = taken(X, target=1)
    with torch.no_grad():
        model.head.weight.zero_()
    assert same(taken(X, target=1), before)


class Signed(nn.Module):
    """Its rule depends on a weight's value: a constant gate that is nowhere negative."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
        self.register_buffer("gate", torch.full((2,), gate, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(x @ self.weight.T) * self.gate)


def test_refresh_decides_anew_what_depends_on_values() -> None:
    x = randn(3, 2, seed=6)
    taken = frpc.compile(Signed(2.0), (x,), rule=frpc.rules.LRP())
    for gate in (-1.5, 0.5):
        taken.refresh(Signed(gate))
        assert same(taken(x, target=0), frpc.compile(Signed(gate), (x,), rule=frpc.rules.LRP())(x, target=0))


def test_refresh_refuses_another_model() -> None:
    taken = compiled(net(), X)
    before = taken(X, target=1)
    other = Net().double()
    other.head = nn.Linear(96, 7).double()
    with pytest.raises(WeightsError, match=r"Net differs from the captured model: head\.weight was \[5, 96\] torch\.float64 on"):
        taken.refresh(other)
    with pytest.raises(WeightsError, match=r"stem\.0\.weight was .* and is now no such tensor\. Compile the model again\."):
        taken.refresh(nn.Linear(3, 4))
    changed = Net().double()
    changed.scale = 3.0
    with pytest.raises(CompileError, match="no longer computes the same as when it was captured, with the same weights"):
        taken.refresh(changed)
    assert same(taken(X, target=1), before)


def test_threads_are_not_traced_while_another_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread exports, PyTorch tells all of them that they are compiled; the others go on as before."""
    inside, go, expected = threading.Event(), threading.Event(), explainer()(X, target=2)

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert go.wait(60)
            return x + 1

    with ThreadPoolExecutor(2) as pool:
        exporting = pool.submit(torch.export.export, Waiting(), (torch.zeros(1),), strict=False)
        assert inside.wait(60)
        try:
            assert torch.compiler.is_compiling()
            assert not is_traced()
            with pytest.raises(NonFiniteError):
                explainer()(X * float("nan"), target=1)
            with pytest.raises(TargetError):
                explainer()(X, target=torch.full((len(X),), 99))
            assert same(explainer()(X, target=2), expected)
        finally:
            go.set()
        exporting.result()
