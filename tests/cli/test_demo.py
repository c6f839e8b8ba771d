"""The bundled net and digits are what their record says, and the demo's maps sum to their logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from frpc.assets import digits as demo
from places import DATA

MNIST = DATA / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason=f"MNIST is not at {MNIST}")


@pytest.fixture(scope="module")
def record():
    return json.loads((demo.ASSETS / "digits.json").read_text())


def test_assets_are_small_and_recorded(record):
    assert (demo.ASSETS / "digits.safetensors").stat().st_size < 1_000_000
    assert record["test_accuracy"] >= 0.985
    assert record["test_images"] == 10_000
    assert record["parameters"] == sum(p.numel() for p in demo.DigitNet().parameters())
    credit = (demo.ASSETS / "ATTRIBUTION.md").read_text()
    for name in ("LeCun", "Cortes", "Burges", "Attribution-ShareAlike 3.0"):
        assert name in credit


def test_one_digit_of_each_class():
    images, labels = demo.load_digits()
    assert images.shape == (10, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.tolist() == list(range(10))


@needs_mnist
def test_the_recorded_accuracy_is_reached(record):
    from frpc.assets.train_digits import read_split

    images, labels = read_split(MNIST, "t10k")
    model = demo.load_digit_net()
    with torch.inference_mode():
        predicted = torch.cat([model(part.float() / 255).argmax(1) for part in images.split(1000)])
    right = int((predicted == labels).sum())
    assert abs(right - record["test_correct"]) <= 2  # other processors round differently at a tie
    assert torch.equal(images[record["digits"]["indices"]], demo.load_digits()[0])


def test_run(tmp_path: Path):
    result = demo.run(tmp_path / "new" / "folder", Console(quiet=True))
    assert result == json.loads((tmp_path / "new" / "folder" / "digits.json").read_text())
    assert result["conservation_error"] <= 1e-6
    assert len(result["digits"]) == 10
    for digit in result["digits"]:
        assert digit["sums"] == pytest.approx(digit["logits"], abs=1e-4)
        assert digit["logits"][0] > digit["logits"][1]
    assert sum(digit["classes"][0] != digit["label"] for digit in result["digits"]) == 1  # the one mistake, chosen on purpose
    with Image.open(result["files"][0]) as sheet:
        assert min(sheet.size) > 1000
