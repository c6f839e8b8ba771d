"""The logic of the benchmarks: nothing wrong is timed, goals are held, commits are compared by what both have."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

import frpc
from bench import attribution, case, compare, compiling, memory, nets


@pytest.fixture(scope="module")
def mlp() -> case.Case:
    return case.prepare(nets.MLP, 2)


class Changed:
    """An explainer whose answers are changed before they are seen."""

    def __init__(self, explainer: frpc.Explainer, **changes: Any) -> None:
        self.explainer, self.changes = explainer, changes

    def __call__(self, x: Tensor, target: Tensor) -> frpc.Explanation:
        found = self.explainer(x, target=target)
        return dataclasses.replace(found, **{name: change(getattr(found, name)) for name, change in self.changes.items()})


# the gate ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_right_maps_pass(mlp: case.Case, count: int) -> None:
    asked = case.with_targets(mlp, count)
    errors = case.gate(asked)
    assert set(errors) == {"output", "conservation", "map"}
    assert max(errors.values()) < 1e-5
    if count > 1:
        torch.testing.assert_close(asked.gradients(), asked.gradient())


@pytest.mark.parametrize(
    "changes",
    [
        {"relevance": lambda v: 1.001 * v},  # does not add up
        {"relevance": lambda v: v.flip(-1)},  # adds up, in the wrong places
        {"output": lambda y: y + 1},
        {"relevance": lambda v: v * float("nan")},
    ],
    ids=["sum", "places", "output", "nan"],
)
def test_wrong_answers_are_not_timed(mlp: case.Case, changes: dict[str, Any]) -> None:
    wrong = dataclasses.replace(mlp, explainer=Changed(mlp.explainer, **changes))
    with pytest.raises(AssertionError, match="is wrong, so it is not timed"):
        case.gate(wrong)


def test_a_wrong_forward_pass_of_frpc_is_not_timed(mlp: case.Case) -> None:
    with pytest.raises(AssertionError, match="is wrong"):
        case.gate(dataclasses.replace(mlp, own=lambda: mlp.forward() + 1))


def test_own_forward_pass_is_the_models(mlp: case.Case) -> None:
    assert mlp.own is not None
    torch.testing.assert_close(mlp.own(), mlp.forward())


def test_nets() -> None:
    assert nets.build(nets.MLP, batch=3)[1].shape == (3, 1, 28, 28)
    model, x = nets.build(nets.THESIS, width=0.125)
    assert x.shape == (1, 3, 32, 32) and nets.is_piecewise_linear(model)
    assert not nets.is_piecewise_linear(torch.nn.Sequential(torch.nn.GELU()))


# goals ------------------------------------------------------------------------------------------------------------------


def test_goals_of_the_issue() -> None:
    assert attribution.goals("vgg16", 1, 1) == attribution.goals("squeezenet1_1", 1, 1) == {"forward": 1.8, "frpc forward": 2.1}
    assert attribution.goals("resnet50", 1, 10) == {"forward": 8.0}
    assert attribution.goals(nets.MLP, 1, 1) == {"x * gradient": 0.7}
    assert attribution.goals("resnet50", 16, 1) == attribution.goals("vit_b_16", 1, 1) == {}
    assert memory.GOALS == {("resnet50", 16): 0.4}


def test_missed_goals_are_named() -> None:
    result = {"net": "vgg16", "targets": 1, "goals": {"forward": 1.8, "frpc forward": 2.1}}
    over = {"forward": {"median": 1.9}, "frpc forward": {"median": 2.0}}
    assert attribution.missed_goals({**result, "explaining_over": over}) == [
        "vgg16, 1 target: explaining takes 1.90 x forward, the goal is 1.8"
    ]
    del over["frpc forward"]
    assert "frpc forward was not measured" in attribution.missed_goals({**result, "explaining_over": over})[1]


def test_memory_is_held_against_autograd_and_the_prediction() -> None:
    ways = {"frpc": {"peak_bytes": 50}, "x * gradient": {"peak_bytes": 100}}
    result = {"net": "resnet50", "input": [16, 3, 224, 224], "ways": ways, "goal": 0.4, "predicted_bytes": 65}
    missed = memory.missed_goals(result)
    assert len(missed) == 2 and "0.50 x the memory of autograd" in missed[0] and "predicts 1.30 x" in missed[1]
    assert memory.missed_goals({**result, "goal": 0.5, "predicted_bytes": 45}) == []


def test_peak_memory_is_what_is_alive_at_once() -> None:
    from bench.machine import peak_memory

    def way() -> Tensor:
        a = torch.ones(1000)  # 4000 bytes, alive until the end
        for _ in range(3):
            b = a + 1
            del b
        return a

    assert peak_memory(way) == pytest.approx(8000, abs=64)  # numbers become tensors too


# suites, as small as they go --------------------------------------------------------------------------------------------


def test_compilation_is_reported_by_stage() -> None:
    found = compiling.measure(nets.MLP, 1, peers=False)
    assert {"capture", "emit", "lower", compiling.TOTAL, compiling.FIRST} <= found["ways"].keys()
    stages = sum(
        way["seconds"]["median"] for name, way in found["ways"].items() if name not in (compiling.TOTAL, compiling.FIRST)
    )
    assert stages <= found["ways"][compiling.TOTAL]["seconds"]["median"]


def test_memory_of_a_small_net(mlp: case.Case) -> None:
    found = memory.measure(mlp)
    assert found["ways"]["frpc"]["peak_bytes"] >= mlp.x.nbytes  # the map at least
    assert found["targets"] == 1 and found["goal"] is None


# two commits ------------------------------------------------------------------------------------------------------------


def test_own_options_are_left_out() -> None:
    words = ["attribution", "--base", "HEAD~1", "--nets", "a,b", "--json=x.json", "--turns", "2", "--no-peers"]
    assert compare.without(words) == ["attribution", "--nets", "a,b", "--no-peers"]


def record(benchmark: str, **ways: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "results": [{"net": "n", "input": [1, 3], "targets": 5, "ways": ways}]}


def test_figures_of_records() -> None:
    timed = {name: {"ratio": {"median": value}} for name, value in {"forward": 1.0, "frpc": 1.7}.items()}
    assert compare.figures(record("attribution", **timed)) == {("n", "1x3", 5, "frpc"): 1.7}
    assert compare.figures(record("memory", frpc={"peak_bytes": 8})) == {("n", "1x3", 5, "frpc"): 8.0}
    assert compare.figures(record("compile", emit={"seconds": {"median": 2.0}})) == {("n", "1x3", 5, "emit"): 2.0}


def test_turns_that_overlap_are_the_same() -> None:
    a, b, c, gone = (("n", "1x3", 1, way) for way in ("a", "b", "c", "gone"))
    base = [{a: 2.0, b: 2.0, c: 2.0, gone: 1.0}, {a: 2.2, b: 2.2, c: 2.2, gone: 1.0}]
    here = [{a: 1.0, b: 2.1, c: 3.0}, {a: 1.1, b: 2.3, c: 3.3}]
    rows = {row["key"]: row for row in compare.compared(base, here)}
    assert {key: row["verdict"] for key, row in rows.items()} == {a: "less", b: "same", c: "more"}
    assert rows[a]["change"] == pytest.approx(0.5)
    assert rows[c]["here"] == pytest.approx([3.15, 3.0, 3.3])


def test_an_unknown_revision_is_refused() -> None:
    with pytest.raises(SystemExit, match="git rev-parse"):
        compare.run("no-such-revision", ["attribution"], 1, None)
