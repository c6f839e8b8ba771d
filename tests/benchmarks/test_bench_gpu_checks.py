"""Small forms of what ``python -m bench gpu`` checks, on the CPU: what is wrong is seen."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

import frpc
from bench import nets
from bench.gpu import checks, compared, streams, trying


def results(found: Any) -> dict[str, Any]:
    return {result["what"]: result for result in found}


def test_a_small_net_agrees_with_float64_and_what_is_not_there_fails() -> None:
    found = results(checks.first("cpu"))
    assert [found[f"{name}, {mode}"]["status"] for name in ("aten", "auto") for mode in ("throughput", "latency")] == [
        "passed"
    ] * 4
    assert "the model is on cpu" in found["triton, latency"]["reason"]  # on a GPU this would be a failure: it is what is tried


@pytest.mark.parametrize("make", ["thesis_alexnet", "bert"])
def test_nets_are_checked_before_they_are_timed(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "interleave", lambda ways, rounds, title: {name: [1.0 for _ in range(rounds)] for name in ways})
    if make == "bert":
        pytest.importorskip("transformers", reason="transformers is not installed")
        model, x = compared.bert(2, 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    else:
        model, x = nets.build(make, 16, 2, 0.0625)
    found = results(compared.compared("net", model, x, "cpu", 2))
    assert [result["status"] for result in found.values()] == ["passed", "passed"], found
    assert found["net: maps"]["errors"]["map"] < 1e-4
    assert {"forward", "frpc", "x * gradient"} <= set(found["net: time"]["ways"])


def test_a_net_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Callable[..., dict[str, float]] = lambda case: trying.demand(0.5, 1e-4, "output") or {}  # noqa: E731
    monkeypatch.setattr(compared, "gate", wrong)
    (only,) = compared.compared("net", nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), torch.randn(2, 3, 2, 2), "cpu", 2)
    assert only["status"] == "failed" and only["reason"] == "AssertionError: output: 5.0e-01, over 1e-04"


def test_half_precision_is_held_against_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "build", lambda name, side, batch: nets.build(nets.MLP, side, batch))
    found = results(compared.bf16("cpu", batch=2))
    assert [result["status"] for result in found.values()] == ["passed"] * 3, found
    assert found["float32"]["ours"] < 1e-4 < found["bfloat16"]["ours"]
    model, x = nets.build(nets.MLP)
    true = compared.times_gradient(model, x, torch.tensor([3]))
    monkeypatch.setattr(compared, "WORSE", 0.1)  # it is about as far off as autograd's
    with pytest.raises(AssertionError, match="distance from float64"):
        compared.no_worse(model.bfloat16(), x.bfloat16(), torch.tensor([3]), true)


def test_layer_maps_are_held_against_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "build", lambda name, side: nets.build(name, side, width=0.125))
    found = results(checks.maps("cpu", "thesis_alexnet", "features.6", 16, seconds=1.0))
    assert [result["status"] for result in found.values()] == ["passed"] * 3, found
    assert found["beside autograd"]["error"] < 1e-5
    right = checks.neuron_map
    monkeypatch.setattr(checks, "neuron_map", lambda part, x, index: right(part, x, [index[0] - 1, *index[1:]]))
    assert results(checks.maps("cpu", "thesis_alexnet", "features.6", 16, seconds=0.1))["beside autograd"]["status"] == "failed"


class Answers:
    """An explainer that returns its input, but for one call of all."""

    def __init__(self, wrong: int = 0) -> None:
        self.calls, self.wrong = 0, wrong

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> frpc.Explanation:
        self.calls += 1
        return frpc.Explanation(x, x + (self.calls == self.wrong), torch.zeros(len(x)))


class Idle:
    """A stream, or a recording, of a device that is not there."""

    def wait_stream(self, other: Any) -> None: ...

    def replay(self) -> None: ...


@pytest.mark.parametrize("wrong", [0, 7])
def test_one_wrong_answer_among_the_calls_on_streams_is_seen(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*given: Any) -> Any:
        return contextlib.nullcontext()

    fakes = {
        "Stream": Idle,
        "CUDAGraph": Idle,
        "graph": nothing,
        "stream": nothing,
        "current_stream": Idle,
        "synchronize": nothing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(streams, "busy", nothing)
    inputs, target = [torch.zeros(2, 3), torch.ones(2, 3)], torch.zeros(2, dtype=torch.int64)
    asked = (inputs, target, [x.clone() for x in inputs])
    work = {
        "turns": lambda: streams.by_turns(Answers(wrong), *asked, streams.streams()),  # type: ignore[arg-type]
        "threads": lambda: streams.by_threads(Answers(wrong), *asked),  # type: ignore[arg-type]
        "recorded": lambda: streams.recorded_inside(Answers(), *asked),  # type: ignore[arg-type]
    }
    found = {name: trying.attempt(name, one) for name, one in work.items()}
    for name in ("turns", "threads"):
        calls = 100 if name == "turns" else 200
        assert found[name]["status"] == ("failed" if wrong else "passed")
        assert found[name].get("calls") == calls or f"1 of {calls} answers" in found[name]["reason"]
    assert "1 of 1 answers" in found["recorded"]["reason"]  # what is not replayed keeps the first input's answer


def test_one_kernel_that_is_wrong_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")
    from bench import kernels

    def measured(task: Any, rounds: int, top: dict[str, float]) -> dict[str, Any]:
        if task.kernel == "gated":
            raise AssertionError("gated is wrong, so it is not timed")
        return {"of_peak_flops": 0.5, "of_peak_bandwidth": 0.25, "faster": {"median": 1.5}}

    small = {"CONVOLUTIONS": (("a", 8, 4, 6, 3, 1, 1),), "POOLS": (("b", 4, 6, 2, 2, 0),), "NORMS": (("c", 2, 4),)}
    small["WINDOWS"] = (("d", 2, 2, 2, 2, 4, 2),)
    for name, value in small.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "ceilings", lambda rounds: {"flops": 1e12, "bytes": 1e9})
    monkeypatch.setattr(kernels, "measure", measured)
    found = results(checks.kernels("cpu", 2))
    assert {what.split()[0] for what, one in found.items() if one["status"] == "failed"} == {"gated"}
    assert len(found) > 10
    assert found["conv_relevance tf32 at a"]["line"] == "conv_relevance tf32 at a: 1.50 x ATen, 50% of a ceiling"


def test_demands_refuse_what_is_no_number() -> None:
    with pytest.raises(AssertionError, match="nan"):
        trying.demand(math.nan, 1.0, "error")
    trying.demand(1.0, 1.0, "error")
