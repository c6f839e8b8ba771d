"""The coverage benchmark: its driver survives what models do, its records mean what they say, its page comes from the records."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from behaviours import behave, behave_in_suite
from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

from bench.coverage import driver, page, peers, probe, run, subject

QUIET = Console(quiet=True)


# the driver -------------------------------------------------------------------------------------------------------------


def tried(names: list[str], file: Path, jobs: int = 2, limit: float = 600.0) -> dict[str, driver.Record]:
    return driver.run_all(names, behave, file, {"date": "today"}, jobs, limit, QUIET, preload=())


def test_a_crash_and_a_complaint_end_one_model(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    found = tried(["crash", "a", "leave", "raise", "b"], file)
    assert {name: r["status"] for name, r in found.items()} == {
        "crash": "crashed", "a": "ok", "leave": "crashed", "raise": "crashed", "b": "ok",
    }  # fmt: skip
    assert "SIGSEGV" in found["crash"]["reason"]
    assert "something to say" in found["leave"]["reason"]
    assert "ValueError: a complaint" in found["raise"]["reason"]
    assert len({os.getpid(), found["a"]["by"], found["b"]["by"]}) == 3, "every model has a process of its own"
    assert driver.read_records(file) == found
    assert all(r["date"] == "today" for r in found.values())


def test_a_hang_ends_one_model(tmp_path: Path) -> None:
    """The second is started although the first never ends."""
    file = tmp_path / "records.jsonl"
    found = tried(["hang", "hang too"], file, jobs=1, limit=1.0)
    assert [(name, r["status"], r["reason"]) for name, r in found.items()] == [
        ("hang", "timeout", "not done after 1 s"),
        ("hang too", "timeout", "not done after 1 s"),
    ]


def test_an_interrupt_keeps_finished_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sleep = tmp_path / "records.jsonl", time.sleep

    def until_one_is_done(seconds: float) -> None:
        if driver.read_records(file):
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(driver.time, "sleep", until_one_is_done)
    started: list[Any] = []
    start = driver._start
    monkeypatch.setattr(driver, "_start", lambda *given: started.append(start(*given)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        tried(["a", "hang"], file)
    assert list(driver.read_records(file)) == ["a"]
    assert not any(one.process.is_alive() for one in started)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of four models; returns the file of its records."""

    class Fake:
        @staticmethod
        def names() -> list[str]:
            return ["a", "b", "leave", "c"]

    file = tmp_path / "records.jsonl"
    monkeypatch.setattr(run, "load", lambda name: Fake)
    monkeypatch.setattr(run, "work", behave_in_suite)
    monkeypatch.setattr(run, "results_file", lambda suite, peers: file)
    monkeypatch.setattr(run, "open_console", lambda: QUIET)
    monkeypatch.setattr(run, "PRELOAD", ())
    return file


def ask(only: str = "", again: bool = False, misses: bool = False) -> int:
    return run.run("fake", only, again, misses, 2, 600.0, 10.0, False)


def test_a_run_goes_on_where_it_stopped(suite: Path) -> None:
    assert ask(only="a$|leave") == 1, "a model is not covered"
    first = driver.read_records(suite)
    assert set(first) == {"a", "leave"}
    assert ask() == 0, "what was tried now is covered"
    second = driver.read_records(suite)
    assert set(second) == {"a", "b", "c", "leave"}
    assert second["a"] == first["a"]
    assert ask(misses=True) == 1
    third = driver.read_records(suite)
    assert third["a"] == second["a"], "covered models are not tried again"
    assert ask(only="a$", again=True) == 0
    assert driver.read_records(suite)["a"]["by"] != third["a"]["by"]


# what is tried ----------------------------------------------------------------------------------------------------------


class Degenerate(nn.Module):
    """Everything that makes a check pass for nothing: zero gains, tiny layer scales, zero embeddings and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        nn.init.zeros_(self.norm.weight)
        self.scale = nn.Parameter(torch.full((3, 1, 1), 1e-6))
        self.place = nn.Parameter(torch.zeros(3, 1, 1))
        self.kept = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.head = nn.Linear(3, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) + self.scale * x + self.place
        return self.head((x + y).relu().mean((-2, -1)) + self.kept.sum())


def test_redrawn_parameters_are_not_degenerate() -> None:
    torch.manual_seed(0)
    model = subject.redraw(Degenerate().train())
    assert not model.training
    assert model.kept.tolist() == [1.0, 2.0]
    assert bool((model.scale.abs() > 0.01).all())
    for tensor in (
        model.norm.weight,
        model.norm.running_mean,
        model.norm.running_var,
        model.scale,
        model.place,
        model.head.weight,
    ):
        assert tensor.unique().numel() == tensor.numel()
    assert bool((model.norm.running_var > 0).all())


def test_an_unsettled_model_gets_the_statistics_of_its_inputs() -> None:
    """The sine of a million times the input: a change by a millionth is one of radians."""

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, eps=1e-12).eval()
            self.norm.running_var.fill_(0.0)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).sin()

    torch.manual_seed(0)
    one = subject.Subject(Wave().eval(), (torch.randn(3, 4),))
    assert probe.is_unsettled(one)
    subject.settle(one.model, lambda: one.explained(one.inputs))
    assert not one.model.norm.training
    assert not probe.is_unsettled(one)


def test_first_that_runs_takes_the_smallest() -> None:
    def attempt(side: int) -> subject.Subject:
        if side < 8:
            raise ValueError("too small")
        return subject.Subject(nn.Conv2d(1, 1, 12), (torch.randn(3, 1, side, side),))

    sides = (4, 8, 12, 16)
    found = subject.first_that_runs(functools.partial(attempt, side) for side in sides)
    assert isinstance(found.inputs, tuple)
    assert found.inputs[0].shape[-1] == 12
    with pytest.raises(RuntimeError, match="too small"):
        subject.first_that_runs([functools.partial(attempt, 4)])


class Bessel(nn.Module):
    """Uses an operator that has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class FakeSuite:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def names(self) -> list[str]:
        return ["one"]

    def build(self, name: str) -> subject.Subject:
        return subject.Subject(self.model, (torch.randn(3, 3, 5, 5),))


def test_a_record_holds_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(probe, "load", lambda name: FakeSuite(subject.redraw(Degenerate())))
    record = probe.try_model("fake", "one")
    assert record["status"] == "ok", record
    assert record["error_float64"] <= 1e-12
    assert record["variance_float64"] <= 1e-12
    assert 0 < record["constants"] < 1
    assert record["nodes"] >= len(record["ops"]) > 2
    json.dumps(record, allow_nan=False)


def test_float32_is_held_against_the_rounding_of_plain_pytorch() -> None:
    """Twice what rounding does to PyTorch's own figures is allowed, in float32 alone; without those the bound stays."""
    names = [f"{what}_{dtype}" for what in ("error", "output", "variance") for dtype in ("float32", "float64")]
    exact = {"narrowed": False, **dict.fromkeys(names, 0.0)}

    def judged(**numbers: float | None) -> str:
        return probe._verdict({**exact, **numbers})["status"]

    assert judged(variance_float32=1.5e-6) == "inexact"
    assert judged(variance_float32=1.5e-6, plain_rounding=None) == "inexact"
    assert judged(variance_float32=1.5e-6, plain_rounding=1e-6) == "ok"
    assert judged(variance_float32=1.5e-6, plain_rounding=0.7e-6) == "inexact"
    assert judged(variance_float64=1.5e-10, plain_rounding=1e-6) == "inexact"
    assert judged(output_float32=1.5e-4, plain_output=1e-4, own_output=1.9e-4) == "ok"
    assert judged(output_float32=1.5e-4, plain_output=1e-4, own_output=2.1e-4) == "inexact"
    assert judged(output_float64=1.5e-4, plain_output=1e-4) == "inexact"
    assert judged(error_float32=1.5e-5, plain_output=1e-4, plain_rounding=1e-4) == "inexact"
    assert judged(error_float64=float("nan")) == "inexact"


class Odd(nn.Module):
    """Scales by the batch size, or by a factor that is 1 in float32 and 1 + 1e-9 in float64, or jumps by 1 near 1."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "batch":
            return x * len(x)
        if self.kind == "rounding":
            return x * (torch.tensor(1.0, dtype=x.dtype) + 1e-9)
        return torch.where(x.detach() > 1, 2 * x, x)


def test_plain_rounding_is_that_of_input_times_gradient() -> None:
    x = torch.ones(3, 1)
    found = {kind: probe.plain_rounding(subject.Subject(Odd(kind), (x,)), (0,)) for kind in ("rounding", "batch", "jump")}
    assert found["batch"] == pytest.approx(2.0), "from 1 to 3"
    assert found["jump"] == pytest.approx(1.0, rel=1e-4), "from 1 to 2"
    assert found["rounding"] == pytest.approx(2e-6, rel=1), "the changes of the input"
    far = probe.rounding_of_outputs(subject.Subject(Odd("rounding"), (x,)), x, 2 * x[:2])
    assert far == {"plain_output": pytest.approx(1e-9, rel=1e-3), "own_output": pytest.approx(1.0)}
    assert probe.plain_rounding(subject.Subject(nn.Identity(), (torch.ones(3, 4, dtype=torch.int64),)), (1,)) is None


def test_missing_operators_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "load", lambda name: FakeSuite(nn.Sequential(Bessel(), nn.Flatten(), Bessel())))
    record = probe.try_model("fake", "one")
    assert record["status"] == "missing"
    assert record["missing"] == {"aten.special_bessel_j0.default — no rule": 2}
    assert run.missing_ops({"one": record}) == [("aten.special_bessel_j0.default — no rule", 1, ["one"])]


def test_constants_share_of_one_linear_layer() -> None:
    """``y = w x + b`` with ``w x = [3, -1]`` and ``b = 4``: 4 / (4 + 3 + 1)."""
    import frpc

    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0]]))
        model.bias.fill_(4.0)
    x = torch.ones(2, 2)
    explanation = frpc.compile(model, (x,))(x, target=0)
    assert probe.constants_share(explanation) == pytest.approx(0.5)
    assert probe.conservation(explanation, (0,)) <= 1e-6


# peers ------------------------------------------------------------------------------------------------------------------


def test_peers_are_held_to_their_own_promise() -> None:
    def exact(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return x, x.flatten(1).sum(1)

    def off(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return x, 2 * x.flatten(1).sum(1)

    def raises(model: nn.Module, x: Tensor, target: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        raise AssertionError("no rule\nfor that")

    one = subject.Subject(nn.Flatten(), (torch.rand(3, 4, 2),))
    assert peers.judge(exact, one)["status"] == "ran"
    assert peers.judge(off, one)["status"] == "off"
    found = peers.judge(raises, one)
    assert (found["status"], found["reason"]) == ("raised", "AssertionError: no rule for that")


def test_constants_are_taken_out() -> None:
    model = peers.without_constants(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval())
    assert float(model(torch.zeros(1, 1, 4, 4)).detach().abs().max()) == 0.0


# the page ---------------------------------------------------------------------------------------------------------------


def record(status: str, **more: Any) -> driver.Record:
    return {
        "status": status,
        "date": "2026-01-02",
        "versions": {"torch": "9.9"},
        "commit": "abcdef0123456789",
        "cpu": "a cpu",
        **more,
    }


def test_page_shows_every_record() -> None:
    numbers = {
        "input": [[3, 96, 96]], "nodes": 12, "ops": ["add.Tensor", "mm"], "compile_seconds": 1.25, "constants": 0.125,
        "error_float32": 2e-7, "error_float64": 3e-16, "variance_float32": 1e-7, "variance_float64": None,
    }  # fmt: skip
    suites = {
        "torchvision": {
            "net_a": record("ok", **numbers),
            "net_b": record("missing", missing={"aten.sort.default — no rule": 2}, reason="", error="UnsupportedOpError"),
            "net_c": record("crashed", reason="died of SIGSEGV: a | b\nc"),
            "net_d": record("ok", **numbers | {"variance_float32": 2e-6, "plain_rounding": 1.6e-6}),
        },
        "timm": {},
    }
    outcomes = {"Captum LRP": {"status": "raised", "reason": "AssertionError: x"}, "zennit": {"status": "off", "error": 0.5}}
    compared = {"torchvision": {"net_a": {"status": "ok", "peers": outcomes}}}
    text = page.render(suites, compared)
    assert "| [torchvision](#torchvision) | 1 missing, 1 crashed | 2 | 4 | 50% |" in text
    assert "| `net_a` | 3×96×96 | 12 | 2 | 1.2 | 2e-07 | 3e-16 | 12.5% | 1e-07 | fixed |" in text
    assert "| `net_d` | 3×96×96 | 12 | 2 | 1.2 | 2e-07 | 3e-16 | 12.5% | 2.0e-06 (1.6e-06) | fixed |" in text
    assert "| `net_b` | missing | `aten.sort.default` (no rule) |" in text
    assert r"| `net_c` | crashed | died of SIGSEGV: a \| b c |" in text
    assert "| `net_a` | raised: AssertionError: x | off, 5e-01 |" in text
    assert "Run 2026-01-02 on a cpu; torch 9.9; commits abcdef0123." in text
    assert "never edited by hand" in text or "edit neither" in text
    assert "## timm" not in text


def test_page_is_up_to_date() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.current(), "run python -m bench coverage --write"


# a few models for real --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"), [("torchvision", "squeezenet1_1"), ("recurrent", "gru-1-one_way-batch_first"), ("transformers", "bert")]
)
def test_a_few_models_are_covered(name: str, model: str) -> None:
    pytest.importorskip("transformers" if name == "transformers" else "torchvision")
    found = probe.try_model(name, model)
    assert found["status"] == "ok", found
