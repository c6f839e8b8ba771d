"""Exports: what a file says is what the explainer says, and what cannot be written is refused with its reason.

Every net by every method is in `test_export_matrix.py`; here are one small net for each kind of file, and the parts.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import frpc
from exported_net import relative_l1, small_net
from frpc.errors import ExportError, InputError, LayerNameError, OptionError, PackageError, VerificationError
from frpc.explainer.explainer import Explainer
from frpc.export import Question, Signature, aoti, onnx, open_file, torch_export, verification, verify

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    return frpc.compile(small_net(), (torch.randn(1, 3, 16, 16),))


@pytest.fixture(scope="module")
def precise() -> Explainer:
    return frpc.compile(small_net().double(), (torch.randn(1, 3, 16, 16, dtype=torch.float64),))


# One kind of file after the other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["one", "several", "seed"])
def test_torch_export_in_float64(precise: Explainer, targets: Any, tmp_path: Path) -> None:
    """The same function: rounding of float64 is all that differs, at batch sizes other than that of the trace."""
    torch_export(precise, tmp_path / "a.pt2", targets=targets)
    run, signature = open_file(tmp_path / "a.pt2")
    assert signature.names == ("x", "seed" if targets == "seed" else "target") or signature.names[0].startswith("input")
    for batch in (1, 5):
        x = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
        target = torch.randint(7, (batch, 2) if targets == "several" else (batch,))
        asked = precise.seed_for(x, target=target) if targets == "seed" else target
        expected = precise(x, target=target)
        output, relevance, bias = run(x, asked)
        assert relative_l1(output, expected.output) <= 1e-12
        assert relevance.shape == expected.relevance.shape
        assert relative_l1(relevance, expected.relevance) <= 1e-12
        assert relative_l1(bias, expected.bias) <= 1e-12
    assert verify(tmp_path / "a.pt2", precise, bound=1e-12).edges == 0


def test_onnx(explainer: Explainer, tmp_path: Path) -> None:
    """ONNX Runtime's own numbers balance; the file has standard operators alone, and both sizes are free."""
    model_of = pytest.importorskip("onnx").load
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "a.onnx"
    onnx(explainer, path, targets="several")
    model = model_of(path)
    assert {node.domain for node in model.graph.node} <= {""}
    assert len(model.functions) == 0
    assert [entry.domain for entry in model.opset_import] == [""]
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert sizes == {"output": ["batch", 7], "relevance": ["batch", "targets", 3, 16, 16], "bias": ["batch", "targets"]}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, target = torch.randn(4, 3, 16, 16), torch.randint(7, (4, 3))
    feed = dict(zip((i.name for i in session.get_inputs()), (x.numpy(), target.numpy()), strict=True))
    output, relevance, bias = (torch.from_numpy(r) for r in session.run(None, feed))
    expected = explainer(x, target=target)
    assert relative_l1(relevance, expected.relevance) <= 1e-5
    assert relative_l1(bias, expected.bias) <= 1e-5
    explained = output.double().gather(1, target)
    error = (relevance.double().sum((2, 3, 4)) - explained).abs() / relevance.double().abs().sum((2, 3, 4))
    assert float(error.max()) <= 1e-6
    feed["target"][0, 0] = -1  # ONNX counts from the end
    strange = session.run(None, feed)[1]
    assert np.isnan(strange[0, 0]).any() and not np.isnan(strange[0, 1:]).any()
    report = verify(path, explainer)
    assert report.error <= 1e-5
    assert report.conservation is not None and report.conservation <= 1e-6


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler (g++, clang++) is installed")
def test_aoti(tmp_path: Path) -> None:
    torch.manual_seed(0)
    explainer = frpc.compile(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), (torch.randn(1, 6),))
    aoti(explainer, tmp_path / "a.pt2")
    run, _ = open_file(tmp_path / "a.pt2")
    for strange in (-1, 3):  # compiled code checks no index
        assert run(torch.randn(1, 6), torch.tensor([strange]))[1].isnan().any()
    report = verify(tmp_path / "a.pt2", explainer, batches=(1, 4))
    assert report.error <= 1e-5
    assert report.conservation is not None and report.conservation <= 1e-6


def test_the_predicted_class_is_found_on_the_way(precise: Explainer, tmp_path: Path) -> None:
    signature = torch_export(precise, tmp_path / "a.pt2", targets="top")
    assert len(signature.names) == 1
    x = 5 * torch.randn(32, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output, relevance, _ = open_file(tmp_path / "a.pt2")[0](x)
    top = output.argmax(1)
    assert len(top.unique()) > 1, "samples of several classes"
    assert relative_l1(relevance, precise(x, target=top).relevance) <= 1e-12
    verify(tmp_path / "a.pt2", precise, bound=1e-12)


# Other questions ---------------------------------------------------------------------------------------------------------


def test_inner_layers_and_class_activation_maps(tmp_path: Path) -> None:
    model = small_net().double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    explainer = frpc.compile(model, (x,), rule=frpc.rules.Gradient(times_input=False))
    torch_export(explainer, tmp_path / "at.pt2", at=["2", "6"], targets="several")
    target = torch.randint(7, (3, 2))
    run, signature = open_file(tmp_path / "at.pt2")
    assert signature.outputs == ("output", "relevance_2", "relevance_6")
    _, *found = run(x, target)
    for name, expected in explainer.at(["2", "6"], x, target=target).items():
        assert relative_l1(found.pop(0), expected) <= 1e-12, name
    torch_export(explainer, tmp_path / "cam.pt2", grad_cam="4")
    run, signature = open_file(tmp_path / "cam.pt2")
    assert signature.outputs == ("output", "map")
    assert relative_l1(run(x, target[:, 0])[1], frpc.cam.grad_cam(explainer, x, "4", target[:, 0]).map) <= 1e-12
    for name in ("at", "cam"):
        verify(tmp_path / f"{name}.pt2", explainer, bound=1e-12)


def test_every_neuron_of_a_layer(tmp_path: Path) -> None:
    """At a fixed size; each window and the constants' share sum to the neuron's value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double().eval()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    explainer = frpc.compile(model, (x,))
    signature = torch_export(explainer, tmp_path / "a.pt2", (x,), layer="2")
    assert (signature.batch, signature.names, signature.window) == (2, ("input_1",), ((1, 0, 3), (1, 0, 3)))
    values, windows, bias = open_file(tmp_path / "a.pt2")[0](x)
    expected = explainer.layer("2", x, strategy="windows")
    assert relative_l1(windows, expected.local) <= 1e-12
    assert torch.allclose(windows.sum((-2, -1)) + bias, values, rtol=1e-12)
    verify(tmp_path / "a.pt2", explainer, bound=1e-12)


class Pair(nn.Module):
    """Two inputs, two positions of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.left(a).relu() * self.right(b)).unflatten(1, (2, 3))


def test_several_inputs_and_outputs_of_several_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64))
    explainer = frpc.compile(Pair().double().eval(), inputs, bias="separate")
    with pytest.raises(OptionError, match=r"The output is f64\[B, 2, 3\]: one class index does not select") as refused:
        torch_export(explainer, tmp_path / "a.pt2")
    assert 'Export with targets="seed"' in str(refused.value)
    signature = torch_export(explainer, tmp_path / "a.pt2", targets="seed")
    assert (signature.names, signature.outputs) == (("a", "b", "seed"), ("output", "relevance_a", "relevance_b", "bias"))
    verify(tmp_path / "a.pt2", explainer, bound=1e-12)


def test_maps_are_averaged_over_references(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    rule = frpc.rules.LID(reference=[torch.randn(1, 3, 16, 16, dtype=torch.float64) for _ in range(2)])
    explainer = frpc.compile(small_net().double(), (x,), rule=rule)
    torch_export(explainer, tmp_path / "a.pt2")
    target = torch.tensor([1, 6])
    found = open_file(tmp_path / "a.pt2")[0](x, target)
    assert relative_l1(found[1], explainer(x, target=target).relevance) <= 1e-12


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh().mean(1))


def test_inputs_of_integers_are_drawn_within_the_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 30, (2, 6))
    explainer = frpc.compile(Words().double().eval(), (ids,))
    with pytest.raises(InputError, match=r"Input 'ids' is torch.int64: give an example as inputs="):
        torch_export(explainer, tmp_path / "a.pt2")
    signature = torch_export(explainer, tmp_path / "a.pt2", (ids,))
    assert (signature.inputs[0].low, signature.inputs[0].high) == (ids.min(), ids.max())
    verify(tmp_path / "a.pt2", explainer, bound=1e-12)


# Verification ------------------------------------------------------------------------------------------------------------


def test_a_file_of_other_weights_is_refused(explainer: Explainer, tmp_path: Path) -> None:
    other = small_net()
    with torch.no_grad():
        other[8].weight[3, 5] += 0.01
    torch_export(frpc.compile(other, (torch.randn(1, 3, 16, 16),)), tmp_path / "a.pt2", targets="seed")
    with pytest.raises(VerificationError, match=r"a\.pt2 and its explainer give different results\.\n.*relative L1"):
        verify(tmp_path / "a.pt2", explainer)


def test_a_file_of_another_explainer_is_refused(explainer: Explainer, tmp_path: Path) -> None:
    apart = frpc.compile(small_net(), (torch.randn(1, 3, 16, 16),), bias="separate")
    torch_export(apart, tmp_path / "a.pt2")
    expected = r"was exported from Sequential, FRP, separate \(model, rules, bias\), not from Sequential, FRP, uniform\."
    with pytest.raises(InputError, match=expected):
        verify(tmp_path / "a.pt2", explainer)


class Edge(nn.Module):
    """``relu(x_0 - x_1) + x_2``, once and twice; at inputs of 1 exactly on the edge of the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x[:, 0] - x[:, 1]).relu() + x[:, 2]
        return torch.stack([y, 2 * y], 1)


def moved(explainer: Explainer, by: Sequence[float], low: float, high: float) -> tuple[Any, Signature]:
    """A file that rounds its input otherwise."""
    about = frpc.export.question.Input("x", (3,), "float32", low, high)
    signature = Signature("0", "Edge", "FRP", "uniform", "cpu", Question(), None, (about,), 2, ("output", "relevance", "bias"))

    def run(x: Tensor, target: Tensor) -> list[Tensor]:
        found = explainer(x * (1 + torch.tensor(by)), target=target)
        return [found.output, found.relevance, found.bias]

    return run, signature


def test_samples_on_an_edge_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps jump there from (0, 0, 1) to (1, -1, 1), by 2/3: the explainer's own does, when its input moves by a few roundings."""
    explainer = frpc.compile(Edge(), (torch.ones(1, 3),))
    unit = torch.finfo(torch.float32).eps
    monkeypatch.setattr(verification, "open_file", lambda path: moved(explainer, [2 * unit, 0, 0], 1, 1))
    report = verify("a.onnx", explainer)
    assert report.edges == report.samples == 32
    assert math.isnan(report.error)
    assert "No sample lies off all edges" in str(report)
    monkeypatch.setattr(verification, "open_file", lambda path: moved(explainer, [2 * unit, 0, 0], 0.5, 1))
    report = verify("a.onnx", explainer)
    assert report.edges == 0 and report.error <= 1e-5
    monkeypatch.setattr(verification, "open_file", lambda path: moved(explainer, [0, 0, 1e-3], 0.5, 1))
    with pytest.raises(VerificationError, match="give different results"):
        verify("a.onnx", explainer)


def test_the_report_prints(explainer: Explainer, tmp_path: Path) -> None:
    torch_export(explainer, tmp_path / "a.pt2")
    lines = str(verify(tmp_path / "a.pt2", explainer)).splitlines()
    assert lines[0] == "4 samples in batches of 1, 3; relative L1 to the explainer, bound 1e-05:"
    assert [line.split()[0] for line in lines[1:4]] == ["output", "relevance", "bias"]
    assert lines[4].startswith("  |sum V - y| / sum|V|")


# What is refused ---------------------------------------------------------------------------------------------------------


def test_refusals(explainer: Explainer, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with pytest.raises(OptionError, match=r"targets='two' is unknown; choose one, several, seed, top\."):
        torch_export(explainer, path, targets="two")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Give only one of at=, grad_cam= and layer=: a file computes one of them"):
        torch_export(explainer, path, at=["2"], layer="2")
    with pytest.raises(OptionError, match=r"FRP gives relevance, but class activation maps .*Gradient\(times_input=False\)"):
        torch_export(explainer, path, grad_cam="2")
    with pytest.raises(LayerNameError, match="has no layer '66'"):
        torch_export(explainer, path, at=["66"])
    with pytest.raises(OptionError, match=r"layer='8' cannot be exported: windows end at view: view.default mixes"):
        torch_export(explainer, path, layer="8")
    with pytest.raises(OptionError, match=r"a\.onnx: the name of an AOTInductor package must end in \.pt2\."):
        aoti(explainer, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="Nothing is captured yet"):
        torch_export(frpc.compile(small_net()), path)
    path.write_text("no archive")
    with pytest.raises(InputError, match=r"a\.pt2 is neither an \.onnx file nor a \.pt2 archive\."):
        open_file(path)
    assert not (tmp_path / "a.onnx").exists()


def test_a_missing_package_is_named(explainer: Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(
        PackageError,
        match=r"Writing ONNX files needs the package onnx, which is not installed\.\n  Fix: pip install 'frpc\[export\]'",
    ):
        onnx(explainer, tmp_path / "a.onnx")


@torch.library.custom_op("frpc_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x * 0.5


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.frpc_tests.halved(x)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Halved()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inside(x)


def test_operators_of_others_are_refused(tmp_path: Path) -> None:
    explainer = frpc.compile(Custom(), (torch.randn(2, 3),), constant=["inside"])
    expected = r"The program of Custom calls frpc_tests\.halved\.default, which other runtimes do not have"
    with pytest.raises(ExportError, match=expected):
        torch_export(explainer, tmp_path / "a.pt2")


def test_a_target_out_of_range_is_refused_by_the_file(explainer: Explainer, tmp_path: Path) -> None:
    torch_export(explainer, tmp_path / "a.pt2")
    run, _ = open_file(tmp_path / "a.pt2")
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(torch.randn(1, 3, 16, 16), torch.tensor([7]))
