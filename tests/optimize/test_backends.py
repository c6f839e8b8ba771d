"""Who runs a program: backends and modes, another dtype inside, memory foretold."""

from __future__ import annotations

import copy
import functools
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

import frpc
from bench.machine import peak_memory
from families import compiled
from frpc.errors import OptionError
from frpc.optimize.backends import cudagraphs
from frpc.optimize.backends.cudagraphs import Replayed

X = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def net(pool: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2)) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), pool()]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), pool(), nn.Conv2d(32, 32, 1), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7)).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().sum() / b.double().abs().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of auto, aten, triton, inductor"),
        ({"mode": "fast"}, "mode='fast' is unknown; choose one of latency, throughput"),
        ({"backend": "triton"}, 'backend="triton" is not available: the model is on cpu; kernels are for CUDA devices'),
        ({"dtype": torch.int32}, "dtype=torch.int32 is not a floating-point type"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        frpc.compile(net(), (X,), **options)


def test_no_refusal_is_recorded_where_nothing_was_to_be_had() -> None:
    model = net()
    explainer = compiled(model, X)
    assert not any("kernels" in refusal.what for refusal in explainer.refusals)
    assert explainer.compiled(X).backend == compiled(model, X, backend="auto").compiled(X).backend


def test_throughput_takes_less_memory_and_gives_the_same() -> None:
    x, layers = torch.randn(2, 3, 48, 48), [nn.Conv2d(3, 16, 3), *(nn.Conv2d(16, 16, 3) for _ in range(5))]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten(), nn.LazyLinear(7))
    model(x)
    quick, lean = (compiled(model, x, mode=mode) for mode in ("latency", "throughput"))
    assert relative(lean(x, target=3).relevance, quick(x, target=3).relevance) <= 1e-6
    assert lean.plan.peak_bytes < 0.7 * quick.plan.peak_bytes
    assert "byte_gates" in lean.stages[-1].passes
    assert "byte_gates" not in quick.stages[-1].passes


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_inductor_gives_what_aten_gives(mode: str) -> None:
    model = net()
    plain, other = frpc.compile(model, (X,), backend="aten"), frpc.compile(model, (X,), backend="inductor", mode=mode)
    for count, target in ((1, 2), (3, torch.tensor([0, 4, 6])), (2, torch.tensor([[0, 1], [5, 6]]))):
        expected, found = plain(X[:count], target=target), other(X[:count], target=target)
        assert relative(found.relevance, expected.relevance) <= 1e-5
        assert relative(found.output, expected.output) <= 1e-5
    with torch.inference_mode():
        assert relative(other(X, target=1).relevance, plain(X, target=1).relevance) <= 1e-5
    with pytest.raises(OptionError, match="With inductor it is not known"):
        _ = other.plan.peak_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_inside(dtype: torch.dtype) -> None:
    """Maps come in the caller's type, or a finer one inside; the account is as exact as that, and what it costs is said."""
    model = net()
    exact = frpc.compile(model.double(), (X.double(),))(X.double(), target=3)
    explainer = frpc.compile(model.float(), (X,), dtype=dtype)
    found = explainer(X, target=3)
    assert found.relevance.dtype == found.output.dtype == torch.promote_types(dtype, torch.float32)
    unit = torch.finfo(dtype).eps
    assert relative(found.output, exact.output) <= 16 * max(unit, torch.finfo(torch.float32).eps)
    assert relative(found.relevance, exact.relevance) <= (0.2 if dtype is torch.bfloat16 else 1e-6)
    assert explainer.conservation is not None
    assert explainer.conservation <= 4 * max(unit, torch.finfo(torch.float32).eps)  # rounded where it meets the input
    assert "conservation error" in repr(explainer)
    assert next(model.parameters()).dtype == torch.float32
    assert type(model) is nn.Sequential


def test_the_price_of_bfloat16_is_larger_and_is_measured() -> None:
    """The stated figure is what the maps of the example inputs miss, for the sum of the outputs."""
    model = net()
    single, half = frpc.compile(model, (X,)), frpc.compile(model, (X,), dtype=torch.bfloat16)
    assert single.conservation is not None
    assert half.conservation is not None
    assert single.conservation <= 1e-6 < half.conservation
    found = half(X, seed=torch.ones(3, 7))
    lost = (found.relevance.double().flatten(1).sum(1) - found.output.double().sum(1)).abs()
    assert half.conservation == pytest.approx(float((lost / found.relevance.double().abs().flatten(1).sum(1)).max()), rel=1e-6)


def test_weights_can_be_renewed_in_another_dtype() -> None:
    model = net()
    explainer = frpc.compile(model, (X,), dtype=torch.bfloat16)
    with torch.no_grad():
        model[-1].weight.mul_(2)
        model[-1].bias.mul_(2)
    found = explainer.refresh(model)(X, target=3)
    assert relative(found.output, model(X).detach()) <= 16 * torch.finfo(torch.bfloat16).eps


def test_other_types_later() -> None:
    """What was compiled for one type inside moves to another, and takes weights any number of times."""
    model = net()
    explainer = frpc.compile(model, (X,), dtype=torch.bfloat16)
    for _ in range(2):
        explainer.load_state_dict(model.state_dict())
    assert len([kind for kind in type(explainer.programs.model).__mro__ if kind.__name__ == "Sequential"]) == 2
    assert relative(explainer(X, target=3).output, model(X).detach()) > 1e-5
    rounded = copy.deepcopy(model).bfloat16().float()  # as any module, it keeps the rounded weights that it had
    assert relative(explainer.float()(X, target=3).output, rounded(X).detach()) <= 1e-6
    assert relative(explainer.refresh(model)(X, target=3).output, model(X).detach()) <= 1e-6
    exact = explainer.double()(X.double(), target=3)
    assert exact.output.dtype == torch.float64
    assert relative(exact.output, model.double()(X.double()).detach()) <= 1e-12


POOLS = {"max": lambda: nn.MaxPool2d(2), "average": lambda: nn.AvgPool2d(2), "overlapping": lambda: nn.MaxPool2d(3, 2)}
pooled = functools.cache(lambda pool: net(POOLS[pool]))
large = functools.cache(lambda pool, mode, x: compiled(pooled(pool), x, mode=mode))
LARGE = torch.randn(2, 3, 96, 96)


@pytest.mark.parametrize("columns", [None, 2, 6])
@pytest.mark.parametrize("mode", ["latency", "throughput"])
@pytest.mark.parametrize("pool", POOLS)
def test_peak_memory_is_foretold(pool: str, mode: str, columns: int | None) -> None:
    """Within a fifth of what the allocator counts; images large enough that small buffers do not matter."""
    x, batch, explainer = LARGE, len(LARGE), large(pool, mode, LARGE)
    target = torch.zeros(batch, dtype=torch.long) if columns is None else torch.arange(columns).expand(batch, columns)
    explainer(x, target=target)
    plan = next(c.plan for (_, query), c in explainer.programs.compiled.items() if query.columns == (columns is not None))
    with torch.inference_mode():
        measured = peak_memory(lambda: explainer(x, target=target))
    assert plan.peak_bytes_for(batch, columns or 1) == pytest.approx(measured, rel=0.2)


def test_the_plan_tells_its_memory() -> None:
    explainer = frpc.compile(net(), (X,))
    plan = explainer.plan
    assert plan.peak_bytes == plan.peak_bytes_for(1, 1)
    assert "memory besides parameters and inputs" in str(plan)
    stage = next(s.program for s in explainer.stages if s.name == "plan")
    with pytest.raises(OptionError, match="known only after lowering"):
        _ = stage.peak_bytes


class Device:
    """Stands in for ``torch.cuda``: work is done at once, and what each stream was told is written down."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.now = SimpleNamespace(name="one", wait_event=lambda event: self.log.append(("wait", self.now.name, event)))
        self.now.wait_stream = lambda other: None

    def __getattr__(self, name: str) -> Any:
        known: dict[str, Any] = {
            "is_current_stream_capturing": lambda: False,
            "current_stream": lambda: self.now,
            "Stream": lambda: self.now,
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
            "graph": lambda graph: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append(("replay", self.now.name))),
            "Event": self.event,
        }
        return known[name]

    def event(self) -> Any:
        made = SimpleNamespace()
        made.record = lambda stream: self.log.append(("record", stream.name, made))
        made.synchronize = lambda: self.log.append(("synchronize", made))
        return made


def test_a_replay_waits_for_the_one_before_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock orders the queueing alone: on the device it is an event that keeps one run from another's memory."""
    device = Device()
    monkeypatch.setattr(cudagraphs, "torch", SimpleNamespace(cuda=device, no_grad=torch.no_grad))
    replayed, x = Replayed(lambda x: [2 * x]), torch.ones(2)
    assert torch.equal(replayed(x)[0], 2 * x)
    device.log.clear()
    for name in ("one", "two"):
        device.now.name = name
        replayed(x)
    (_, _, first), *_, (_, _, last) = device.log
    assert [entry[:2] for entry in device.log] == [
        (what, name) for name in ("one", "two") for what in ("wait", "replay", "record")
    ]
    assert first is last, "both calls wait for, and then set, the one event of the recording"


def test_a_recording_goes_when_its_last_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(cudagraphs, "torch", SimpleNamespace(cuda=device, no_grad=torch.no_grad))
    replayed = Replayed(lambda x: [2 * x])
    for size in range(cudagraphs.KEPT + 1):
        replayed(torch.ones(size + 1))
    assert [entry[0] for entry in device.log].count("synchronize") == 1


@pytest.mark.gpu
def test_replayed_programs_give_what_they_give_on_two_streams() -> None:
    """Calls that are queued on two streams and not waited for: each has results of its own."""
    quick = frpc.compile(net().cuda(), backend="aten", mode="latency")
    inputs = [torch.randn(2, 3, 24, 24, device="cuda", generator=torch.Generator("cuda").manual_seed(k)) for k in range(2)]
    expected = [quick(x, target=3).relevance.clone() for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, x, kept in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append(quick(x, target=3).relevance)
    torch.cuda.synchronize()
    assert all(torch.equal(one, value) for kept, value in zip(found, expected, strict=True) for one in kept)


@pytest.mark.gpu
def test_replayed_programs_give_what_they_give() -> None:
    """Two shapes by turns, from four threads: each call's result is its own."""
    model, device = net().cuda(), torch.device("cuda")
    plain = frpc.compile(model, backend="aten", mode="throughput")
    quick = frpc.compile(model, backend="aten", mode="latency")
    inputs = [torch.randn(count, 3, 24, 24, device=device) for count in (1, 2, 1, 2)]
    expected = [plain(x, target=3).relevance for x in inputs]
    quick(inputs[0], target=3)
    assert isinstance(quick.compiled(inputs[0]).function, Replayed)
    found: list[float] = [math.inf] * 4

    def ask(at: int) -> None:
        found[at] = max(relative(quick(inputs[at], target=3).relevance, expected[at]) for _ in range(20))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(found) <= 1e-6
