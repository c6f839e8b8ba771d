"""What an explainer shows: its code, its rules, its stages, what was refused, and reports before and after compiling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import frpc
from explained_nets import agrees, explainer, images, net, randn, settled


def test_code_is_python_that_runs() -> None:
    x, seed = images(2), randn(2, 5, seed=1)
    code, program = explainer().code, explainer().program
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    for ran, expected in zip(namespace["forward"](program, x, seed), program(x, seed), strict=True):
        assert torch.equal(ran, expected)
    assert "# ---- values: the model's forward pass" in code
    assert "# ---- relevance, from the output back" in code
    assert "f64[B, 4, 6, 5] | block.0 explained_nets.py:" in code
    assert "| rule convolution" in code
    assert "/" not in "".join(line.partition("#")[2] for line in code.splitlines())  # no folders of this machine


def test_table_names_rules_and_lines() -> None:
    lines = explainer().table().splitlines()
    assert lines[0].split() == ["node", "operator", "rule", "maps", "module", "line", "result"]
    (relu,) = [line for line in lines if line.startswith("relu_1 ")]
    assert relu.split()[1:4] == ["relu", "relu", "ReLUGate"]
    assert "explained_nets.py:" in relu
    assert any("stem.0" in line and "Conv" in line for line in lines)


def test_plan_counts_the_work() -> None:
    plan = explainer().plan
    text = str(plan)
    assert "relevance of the input for one" in text
    assert [s.strategy for s in plan.segments] == ["forward", "transposed"]
    forward = 2 * (12 * 10 * 4 * 3 * 9 + 6 * 5 * 4 * 4 * 9 + 5 * 120)
    assert forward <= plan.segments[0].cost.flops <= 1.5 * forward
    assert plan.flops == sum(s.cost.flops for s in plan.segments)


def test_every_stage_prints_and_graphs_run() -> None:
    x, seed = images(2), randn(2, 5, seed=1)
    program = explainer().program(x, seed)
    names = []
    for stage in explainer().stages:
        names.append(stage.name)
        assert stage.seconds >= 0
        assert str(stage.program)
        if not isinstance(stage.program, fx.GraphModule):
            continue
        answers = stage.program.graph.find_nodes(op="placeholder")
        if len(answers) == 1:
            assert agrees(stage.program(x), program[0])
        else:
            for ran, expected in zip(stage.program(x, seed), program, strict=True):
                assert agrees(ran, expected)
    expected = ["capture", "canonicalize", "fold batch norm", "assign", "plan", "emit", "optimize", "lower"]
    assert names == expected
    by_name = {s.name: s for s in explainer().stages}
    assert by_name["fold batch norm"].passes == ("fold_batch_norm",)
    assert "unify_convolutions" in by_name["canonicalize"].passes


def test_refusals_say_what_was_not_done() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 3, stride=2), nn.Flatten()))
    refusals = {r.what: r for r in frpc.compile(model, (images(1),)).refusals}
    copies = "stride-1 transposed convolution as a convolution"
    assert refusals.keys() == {"weights in oneDNN's own order", copies, "channels-last"}
    flip = refusals[copies]
    assert str(flip).startswith("stride-1 transposed convolution as a convolution not used at ")
    assert flip.why.startswith("oneDNN has no kernels for float64")
    single = frpc.compile(model.float(), (images(1).float(),))
    assert "stride [2, 2]" in {r.why for r in single.refusals if r.what == copies}


def test_repr() -> None:
    text = repr(explainer())
    assert text.startswith("Explainer(Net: f64[B, 3, 12, 10] -> f64[B, 5])\n  rules FRP, bias uniform, ")
    assert "nodes carry relevance" in text
    assert repr(frpc.compile(net())) == "Explainer(Net, FRP, not compiled yet: call it, or give compile() example inputs)"


def test_examine_names_rules_without_compiling() -> None:
    coverage = frpc.examine(net(), images(1))
    assert coverage.ok
    assert str(coverage).startswith("Net: ")
    assert all(row.rule and not row.fix for row in coverage.rows)
    (head,) = [row for row in coverage.rows if row.module == "head"]
    assert (head.op, head.rule, head.shape) == ("aten.linear.default", "linear", "f64[B, 5]")


def test_examine_shows_gaps() -> None:
    class Gap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x.relu())

    coverage = frpc.examine(Gap(), (randn(2, 4),))
    assert not coverage.ok
    assert "1 of 2 carrying nodes have a rule" in str(coverage)
    (row,) = [r for r in coverage.rows if not r.rule]
    assert row.source == "return torch.special.bessel_j0(x.relu())"
    assert "@frpc.rule(torch.ops.aten.special_bessel_j0.default)" in row.fix
    assert "MISSING" in str(coverage)


def test_check_reports_every_layer() -> None:
    report = frpc.check(explainer(), images(2), target=1)
    assert report.error <= 1e-12
    assert {"stem.0", "block.0", "head"} <= {row.layer for row in report.rows}
    assert max(row.error for row in report.rows) <= 1e-12
    bias = explainer()(images(2), target=1)
    assert abs(report.constants - float(bias.bias.sum() / bias.output[:, 1].sum())) <= 1e-10
    assert str(report).startswith("conservation error ")
    assert report.worst in str(report)
