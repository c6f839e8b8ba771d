"""Large windows without the neurons that an activation has shut: the same maps, and no more work than those that count."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import frpc
from frpc.errors import OptionError
from frpc.layers.maps import LayerMaps
from frpc.windows import Rows, skip_shut_windows
from frpc.windows.live import LiveConv, LiveRows, LiveWinner
from frpc.windows.run import producers
from nets import BasicBlock
from strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's note on its speed

QUICK = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    max_examples=12,
)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().sum() / (expected.abs().sum() + torch.finfo(torch.float64).tiny))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of every size count as large."""
    monkeypatch.setattr("frpc.windows.shut._LARGE", 1)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 12, 3, padding=2, dilation=2), nn.GELU(), nn.Conv2d(12, 6, 1), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1)]
    return nn.Sequential(*layers).double().eval()


@functools.cache
def explained_chain() -> frpc.Explainer:
    return frpc.compile(chain(), (randn(2, 3, 24, 20),), bias="separate")


def live_of(explainer: frpc.Explainer, layer: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[LayerMaps, list[Any]]:
    """The maps of a layer, and the producers that make them."""
    found: list[Any] = []

    def watched(rows: Rows) -> Rows:
        found.append(skip_shut_windows(rows))
        return found[-1]

    monkeypatch.setattr("frpc.layers.strategies.skip_shut_windows", watched)
    maps = explainer.layer(layer, x, strategy="windows")
    return maps, producers(found[-1])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "layer", ["4", "5", "8", "10", *(pytest.param(layer, marks=pytest.mark.slow) for layer in ("0", "2", "7", "9"))]
)
def test_layers_of_a_chain(layer: str) -> None:
    """Stride, dilation, padding, overlapping pools, activations with and without zeros, windows that outgrow the input."""
    x, explainer = randn(2, 3, 24, 20), explained_chain()
    windows, dense = (explainer.layer(layer, x, strategy=s) for s in ("windows", "forward"))
    assert relative(windows.dense(), dense.dense()) <= 1e-12
    assert float(windows.residual().max()) <= 1e-12
    blocks = explainer.layer(layer, x, strategy="windows", memory_limit=windows.nbytes() // 3).blocks()
    whole = torch.zeros_like(windows.local)
    for block in blocks:
        rows, columns = block.rows, block.columns
        whole[:, :, rows[0] : rows[1], columns[0] : columns[1]] = block.local
    assert relative(whole, windows.local) <= 1e-12


@QUICK
@given(cases(head=False), st.data())
def test_random_networks(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """Chains, sums, concats, grouped convolutions and pools, mixed with windows that lie side by side."""
    module, x = case
    assume(x.dim() < 5)
    explainer = frpc.compile(module, (x,))
    layer = data.draw(st.sampled_from(explainer.layers()))
    dense = explainer.layer(layer, x, strategy="forward")
    assume(dense.values.numel() * dense.cells[0] * dense.cells[1] < 4_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frpc.windows.shut._LARGE", data.draw(st.sampled_from([1, 20])))
        try:
            windows = explainer.layer(layer, x, strategy="windows").dense()
        except OptionError as ended:
            assert "windows end at" in str(ended)  # noqa: PT017
            return
    assert relative(windows, dense.dense()) <= 1e-10


@pytest.mark.usefixtures("always")
def test_residual_sums() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), BasicBlock(6, 6, 1), BasicBlock(6, 8, stride=2)).double().eval()
    x = randn(2, 2, 10, 10)
    explainer = frpc.compile(module, (x,), bias="separate")
    for layer in explainer.layers():
        windows, dense = (explainer.layer(layer, x, strategy=s).dense() for s in ("windows", "forward"))
        assert relative(windows, dense) <= 1e-12


@pytest.mark.usefixtures("always")
def test_shut_neurons_and_losers_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution before ReLU and pooling: the winners that are above 0, and nothing else."""
    x, explainer = randn(2, 3, 24, 20), explained_chain()
    with torch.no_grad():
        before = chain()[:3](x)
        pooled, places = nn.functional.max_pool2d(torch.relu(before), 3, 2, 1, return_indices=True)
    won = torch.zeros_like(before).flatten(2).scatter_(2, places.flatten(2), 1.0).view_as(before) > 0
    order = live_of(explainer, "5", x, monkeypatch)[1]
    first, *_ = [rows for rows in order if isinstance(rows, LiveConv) and rows.size == tuple(before.shape[1:])]
    assert torch.equal(first.held, won & (before > 0))
    pool = next(rows for rows in order if isinstance(rows, LiveWinner))
    assert torch.equal(pool.held, pooled > 0)
    held = float(first.held.double().mean())
    assert 0 < held < 0.35


@pytest.mark.usefixtures("always")
def test_the_plan_counts_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of the products that run, counted by PyTorch, against those that the producers announce."""
    x = randn(2, 3, 16, 16)  # no row or column is left over by a pooling layer
    explainer = frpc.compile(chain(), (x,), bias="separate")
    maps, order = live_of(explainer, "10", x, monkeypatch)
    with FlopCounterMode(display=False) as counter:
        for _ in maps.blocks():
            pass
    announced = 2 * sum(rows.flops() for rows in order if isinstance(rows, LiveConv))  # for two samples
    assert counter.get_total_flops() == pytest.approx(announced, rel=1e-12)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("span", [(0, 3), (1, 2)])
def test_a_run_holds_what_its_producers_announce(span: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that readers look back on, at most; every line is let go when it has been read."""
    x = randn(1, 3, 24, 24)
    explainer = frpc.compile(chain(), (x,), bias="separate")
    maps, order = live_of(explainer, "10", x, monkeypatch)
    lines = [rows for rows in order if isinstance(rows, LiveRows)]
    most: dict[int, float] = {}
    made = LiveRows.line

    def watched(self: LiveRows, row: int) -> Any:
        found = made(self, row)
        for rows in lines:
            count = sum(cell.windows.numel() for line in rows._kept.values() for cells in line for cell in cells)
            most[id(rows)] = max(most.get(id(rows), 0.0), count)
        return found

    monkeypatch.setattr(LiveRows, "line", watched)
    for _ in maps._produce((0, maps.values.shape[2]), span):
        pass
    assert not any(rows._kept for rows in lines[:-1] if isinstance(rows, LiveConv))
    for rows in lines:
        worst = max_row(rows) * min(rows.size[1], rows.lookback + rows.height)
        assert 0 < most[id(rows)] <= worst


def max_row(rows: LiveRows) -> float:
    return float((rows.counts() * rows.areas()).sum(2).max())


def test_small_windows_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(1, 3, 24, 20)
    explainer = frpc.compile(chain(), (x,), bias="separate")
    assert not any(isinstance(rows, LiveRows) for rows in live_of(explainer, "4", x, monkeypatch)[1])
