"""`frpc export`: the file, the report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from frpc.cli.commands import app
from frpc.export import open_file
from frpc.integrations import torchvision as pretrained

pytestmark = pytest.mark.export


class Tiny(nn.Module):
    """Stands in for a torchvision model, so that a command takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 7, stride=16), nn.ReLU())
        self.classifier = nn.Linear(4 * 14 * 14, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model = Tiny().eval()
    monkeypatch.setattr(pretrained, "build_model", lambda name: model)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def run(weights: Path, *arguments: object) -> Any:
    given = ["export", "--model", "squeezenet1_0", "--weights", weights, *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in given])


def test_a_file_and_its_report(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt2"
    result = run(weights, "--to", "torch", "--out", out, "--targets", "several", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["bytes"] == out.stat().st_size
    assert said["signature"]["question"]["targets"] == "several"
    assert said["signature"]["outputs"] == ["output", "relevance", "bias"]
    assert all(found["error"] <= 1e-5 for found in said["verified"]["results"].values())
    assert said["verified"]["conservation"] <= 1e-6
    relevance = open_file(out)[0](torch.randn(2, 3, 224, 224), torch.tensor([[1, 2, 3], [4, 5, 6]]))[1]
    assert relevance.shape == (2, 3, 3, 224, 224)


def test_class_activation_maps_as_text(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "cam.pt2"
    result = run(weights, "--to", "torch", "--out", out, "--method", "grad-cam", "--layer", "features.1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert lines[1] == "takes x, target; gives output, map"
    assert lines[2].startswith("4 samples in batches of 1, 3; relative L1 to the explainer, bound 1e-05:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx", "--out", "model.pt2"), "--out model.pt2: with --to onnx the file name must end in .onnx"),
        (("--to", "aoti", "--out", "model.onnx"), "--out model.onnx: with --to aoti the file name must end in .pt2"),
        (("--to", "onnx", "--out", "nowhere/model.onnx"), "the folder nowhere does not exist"),
        (("--to", "onnx", "--out", "model.onnx", "--method", "grad-cam"), "use --layer and --method grad-cam together"),
        (("--to", "onnx", "--out", "model.onnx", "--layer", "features.1"), "use --layer and --method grad-cam together"),
        (("--to", "onnx", "--out", "model.onnx", "--method", "frpp"), "method='frpp' is unknown"),
    ],
)
def test_refusals(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(weights, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "model.onnx").exists()
