"""Threads share one explainer: first calls of every kind at once, with the bits that one thread alone would get."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads change places a thousand times as often as usual, so that what can interleave does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


def picture(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


SMALL, WIDE = picture(10, 10), picture(8, 12)
PAIRS = torch.tensor([[1, 2], [0, 4]])
Ask = Callable[[frpc.Explainer, Path], Any]


def saved(explainer: frpc.Explainer, path: Path) -> Any:
    explainer.predict(SMALL)
    return frpc.load(explainer.save(path))(SMALL, target=3).relevance


def exported(explainer: frpc.Explainer, path: Path) -> Tensor:
    frpc.export.torch_export(explainer, path, (SMALL,))
    run, _ = frpc.export.open_file(path)
    return run(SMALL, torch.tensor([3, 1]))[1]


ASKED: dict[str, Ask] = {
    "one target": lambda e, _: e(SMALL, target=2).relevance,
    "targets": lambda e, _: e(SMALL, target=PAIRS).relevance,
    "another shape": lambda e, _: e(WIDE, target=PAIRS).relevance,
    "probability": lambda e, _: e(SMALL, target=1, seed="probability").relevance,
    "inner layers": lambda e, _: e.at(["1", "4"], SMALL, target=1)["4"],
    "windows": lambda e, _: e.layer("3", SMALL, strategy="windows").dense(),
    "columns": lambda e, _: e.layer("1", WIDE, strategy="forward").dense(),
    "passes": lambda e, _: e.layer("3", SMALL, strategy="transposed").dense(),
    "channels": lambda e, _: e.layer("4", WIDE).channels(),
    "a neuron": lambda e, _: e.neuron("3", (1, 2, 3), SMALL).relevance,
    "a neuron by cones": lambda e, _: e.neurons("3", [(0, 0, 0), (5, 4, 4)], SMALL, strategy="windows").relevance,
    "a file": saved,
    "the table": lambda e, _: (e(SMALL, target=0).output, e.table(), repr(e), e.code)[0],
}


def together(explainer: frpc.Explainer, asked: list[str], folder: Path) -> list[tuple[str, Any]]:
    """Asks all questions at one time, each in a thread of its own."""
    start, found = threading.Barrier(len(asked)), list[tuple[str, Any]]()

    def ask(at: int, name: str) -> None:
        start.wait()
        try:
            found.append((name, ASKED[name](explainer, folder / f"{at}.frpc")))
        except BaseException as error:
            found.append((name, error))

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def wrong(found: list[tuple[str, Any]], expected: dict[str, Tensor]) -> list[str]:
    return [
        f"{name}: {value!r}" if isinstance(value, BaseException) else name
        for name, value in found
        if not isinstance(value, Tensor) or not torch.equal(value, expected[name])
    ]


def alone(folder: Path) -> dict[str, Tensor]:
    explainer = frpc.compile(net())
    return {name: ask(explainer, folder / "alone.frpc") for name, ask in ASKED.items()}


def test_first_calls_of_every_kind_at_once(tmp_path: Path) -> None:
    asked = [*ASKED, *ASKED]
    random.Random(0).shuffle(asked)
    assert not wrong(together(frpc.compile(net()), asked, tmp_path), alone(tmp_path))


@pytest.mark.slow
def test_a_thousand_calls_of_32_threads(tmp_path: Path) -> None:
    """Explainers that nobody has asked anything, until a thousand answers are in: each has the bits of one thread alone."""
    expected, chance, answers = alone(tmp_path), random.Random(0), 0
    while answers < 1000:
        found = together(frpc.compile(net()), chance.choices(list(ASKED), k=32), tmp_path)
        assert not wrong(found, expected)
        answers += len(found)


def test_new_weights_while_others_ask(tmp_path: Path) -> None:
    """Every answer is of the old weights or of the new ones, never of some of each; afterwards all are of the new ones."""
    old, new = net(), net()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.25)
    explainer = frpc.compile(old)
    known = [frpc.compile(m) for m in (old, new)]
    expected = {
        name: [ASKED[name](e, tmp_path / "one.frpc") for e in known] for name in ("one target", "targets", "inner layers")
    }
    found: list[tuple[str, Tensor]] = []

    def ask(name: str) -> None:
        for _ in range(5):
            found.append((name, ASKED[name](explainer, tmp_path)))

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
    explainer.predict(SMALL)
    for thread in threads:
        thread.start()
    explainer.refresh(new)
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(any(torch.equal(value, one) for one in expected[name]) for name, value in found)
    assert all(torch.equal(ASKED[name](explainer, tmp_path), both[1]) for name, both in expected.items())


class Meanwhile:
    """Asks something in another thread, once; copies of a module have it in common."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask, self.found = ask, list[Any]()
        self.thread = threading.Thread(target=self._run)

    def __deepcopy__(self, memo: Any) -> Meanwhile:
        return self

    def _run(self) -> None:
        try:
            self.found.append(self._ask())
        except BaseException as error:
            self.found.append(error)

    def begin(self) -> None:
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(1)  # one that waits its turn goes on when the trace is done


class Slow(nn.Module):
    """Another thread asks in the midst of its trace."""

    def __init__(self, meanwhile: Meanwhile) -> None:
        super().__init__()
        self.linear, self._meanwhile = nn.Linear(4, 3), meanwhile

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.linear(x))
        self._meanwhile.begin()
        return y


@pytest.mark.parametrize("name", ["a file that was loaded", "columns", "a file", "the table", "a copy", "an export", "a layer"])
def test_whoever_asks_in_the_midst_of_a_trace_gets_the_right_answer(name: str, tmp_path: Path) -> None:
    """PyTorch keeps the trace that a thread writes to where all threads see it, and sizes of batches are written there."""
    explainer = frpc.compile(net(), SMALL)
    loaded = frpc.load(explainer.save(tmp_path / "net.frpc", columns=True))
    asks: dict[str, Callable[[], Any]] = {
        "a file that was loaded": lambda: loaded(SMALL, target=3).relevance,
        "columns": lambda: explainer(SMALL, target=PAIRS).relevance,
        "a file": lambda: frpc.load(explainer.save(tmp_path / "again.frpc"))(SMALL, target=3).relevance,
        "the table": lambda: (explainer.table(), repr(explainer), explainer.code, explainer(SMALL, target=1).output)[-1],
        "a copy": lambda: copy.deepcopy(explainer)(SMALL, target=PAIRS).relevance,
        "an export": lambda: exported(explainer, tmp_path / "net.pt2"),
        "a layer": lambda: explainer.layer("1", SMALL, strategy="windows").dense(),
    }
    meanwhile = Meanwhile(asks[name])
    frpc.compile(Slow(meanwhile), torch.randn(2, 4))
    meanwhile.thread.join()
    (found,) = meanwhile.found
    assert isinstance(found, Tensor), found
    assert torch.equal(found, asks[name]())
