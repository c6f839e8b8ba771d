"""`frpc map`: what it prints and writes, its exit codes, and twenty kills."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from frpc import jobs
from frpc.cli.commands import app
from frpc.integrations import torchvision as pretrained
from job_runs import contents, killed_until_done, processes, seconds_of


class Tiny(nn.Module):
    """Stands in for a torchvision model, so that a command takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 7, stride=8), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(6 * 14 * 14, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model = Tiny().eval()
    monkeypatch.setattr(pretrained, "build_model", lambda name: model)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def photos(path: Path, count: int, broken: int | None = None) -> Path:
    chance = np.random.default_rng(0)
    path.mkdir()
    for at in range(count):
        Image.fromarray(chance.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path / f"{at:02d}.jpg")
    if broken is not None:
        (path / f"{broken:02d}.jpg").write_bytes(b"\xff\xd8\xff")
    return path


def arguments(weights: Path, data: Path, out: Path, *extra: object) -> list[str]:
    given = ("map", "--model", "squeezenet1_1", "--weights", weights, "--data", data, "--out", out, *extra)
    return [str(one) for one in given]


def run(*given: Any) -> Any:
    return CliRunner().invoke(app, arguments(*given))


def test_a_folder_from_end_to_end_and_again(tmp_path: Path, weights: Path):
    data = photos(tmp_path / "data", 5)
    result = run(weights, data, tmp_path / "out", "--shard-size", 2, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    assert "5 of 5 samples explained, in " in result.output
    for entry, tensors in jobs.read_results(tmp_path / "out"):
        assert tensors["relevance"].shape == (3, 224, 224) and entry["target"] == int(tensors["output"].argmax())
        gap = abs(entry["sum"] - entry["explained"])
        assert gap / float(tensors["relevance"].double().abs().sum()) <= 1e-6
    before = contents(tmp_path / "out")
    again = run(weights, data, tmp_path / "out", "--shard-size", 2, "--batch-size", 2)
    assert again.exit_code == 0 and "5 of 5 samples explained, 5 of them before" in again.output
    assert contents(tmp_path / "out") == before


def test_an_unreadable_picture_is_recorded_and_said(tmp_path: Path, weights: Path):
    data = photos(tmp_path / "data", 4, broken=1)
    result = run(weights, data, tmp_path / "out", "--target", 6, "--method", "lid_ig", "--dtype", "float64", "--png", "--json")
    assert result.exit_code == 3, result.output
    said = json.loads(result.output)
    assert (said["samples"], said["resumed"], said["damaged"]) == (4, 0, [])
    assert [failure["name"] for failure in said["failed"]] == ["01.jpg"] and "01.jpg" in said["failed"][0]["reason"]
    found = list(jobs.read_results(tmp_path / "out"))
    assert [entry["status"] for entry, _ in found] == ["done", "failed", "done", "done"]
    assert found[0][1]["relevance"].dtype == torch.float64 and found[0][0]["target"] == 6
    with Image.open(tmp_path / "out" / "png" / "000000-00.jpg.png") as drawn:
        assert drawn.width > 300


def test_labels_of_a_parquet_file(tmp_path: Path, weights: Path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [path.read_bytes() for path in sorted(photos(tmp_path / "data", 3).iterdir())]
    file = tmp_path / "some.parquet"
    parquet.write_table(pyarrow.table({"photo": pictures, "class": ["class 2", "class 0", "tench"]}), file)
    result = run(weights, file, tmp_path / "out", "--column", "photo", "--label", "class")
    assert result.exit_code == 3
    assert "2 of 3 samples explained" in result.output
    assert "failed: some.parquet:2: label 'tench': there is no class named 'tench'" in result.output
    assert [entry.get("target") for entry, _ in jobs.read_results(tmp_path / "out")] == [2, 0, None]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--target", "9"), "target 9 is out of range: the model has classes 0 to 6"),
        (("--target", "2", "--label", "class"), "--target 2 and --label class were both given; give one of them"),
        (("--label", "class"), "is a folder of pictures, which has no column 'class'"),
        (("--method", "grad-cam"), "method='grad-cam' is unknown"),
    ],
)
def test_errors(tmp_path: Path, weights: Path, extra: tuple[str, ...], message: str):
    result = run(weights, photos(tmp_path / "data", 2), tmp_path / "out", *extra)
    assert result.exit_code == 2 and message in result.output
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_more_errors(tmp_path: Path, weights: Path):
    data = photos(tmp_path / "data", 2)
    for given, message in (
        ((weights, data, data / "out"), "so results would be read as data"),
        ((tmp_path / "none.safetensors", data, tmp_path / "out"), "cannot read"),
        ((weights, tmp_path / "no", tmp_path / "out"), "no such data"),
    ):
        result = run(*given)
        assert result.exit_code == 2 and message in result.output
    assert run(weights, data, tmp_path / "out").exit_code == 0
    changed = run(weights, data, tmp_path / "out", "--method", "gradient")
    assert changed.exit_code == 2 and 'method: "frp" in the folder, "gradient" requested' in changed.output


# Twenty kills -----------------------------------------------------------------------------------------------------------------


def command(given: list[str]) -> None:
    """The command itself, in a process of its own."""
    sys.argv = ["frpc", *given]
    app()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(tmp_path: Path):
    """SqueezeNet on forty pictures, one of them broken: every sample once, and the bits of an undisturbed run."""
    torch.manual_seed(0)
    save_file(pretrained.build_model("squeezenet1_1").state_dict(), tmp_path / "w.safetensors")
    data, context = photos(tmp_path / "data", 40, broken=17), processes("frpc.cli.map")
    options = ("--threads", 1, "--batch-size", 2, "--shard-size", 2)

    def start(out: Path) -> Any:
        process = context.Process(target=command, args=(arguments(tmp_path / "w.safetensors", data, out, *options),))
        process.start()
        return process

    start(tmp_path / "whole").join()
    outs = killed_until_done(start, tmp_path / "killed", 20, seconds_of(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    for out in outs:
        assert contents(out) == expected
        assert [entry["index"] for entry, _ in jobs.read_results(out)] == list(range(40))
