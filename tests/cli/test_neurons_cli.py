"""`frpc neurons`: its pictures and records, the files it streams, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import frpc
from frpc.assets.digits import load_digit_net, load_digits
from frpc.cli.commands import app
from frpc.errors import MemoryLimitError, ShapeError
from frpc.integrations import torchvision as pretrained
from frpc.integrations.images import Recipe
from frpc.layers import files as layerfiles
from frpc.layers.files import check_disk, write_blocks
from frpc.plots.neurons import Box, Portrait, depth_sheet, neuron_sheet, window_box
from frpc.windows import Grid


class Tiny(nn.Module):
    """Stands in for a torchvision model on 32x32 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()
        )
        self.classifier = nn.Linear(5 * 8 * 8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> dict[str, str]:
    """The options that work, in a folder with their files."""
    torch.manual_seed(0)
    model = Tiny().eval()
    monkeypatch.setattr(pretrained, "build_model", lambda name: model)
    monkeypatch.setattr(pretrained, "recipe", lambda name, default: Recipe(resize=32, crop=32))
    monkeypatch.chdir(tmp_path)
    save_file(model.state_dict(), "tiny.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Path("text.png").write_text("no picture")
    return {"--model": "tiny", "--weights": "tiny.safetensors", "--image": "photo.png", "--layer": "features.3", "--out": "out"}


def run(options: dict[str, str], *extra: object):
    arguments = [text for pair in options.items() for text in pair]
    return CliRunner().invoke(app, ["neurons", *arguments, *map(str, extra)])


# ---- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["uniform", "separate"])
def test_sorted_by_relevance(options, bias):
    result = run(options, "--layer", "features.0", "--top", 3, "--bias", bias, "--dtype", "float64", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads(Path("out/neurons.json").read_text())
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "neurons.json",
        "neurons_depth.png",
        "neurons_features.0.png",
        "neurons_features.3.png",
    ]
    assert [entry["layer"] for entry in printed["layers"]] == ["features.3", "features.0"]
    for entry in printed["layers"]:
        sizes = [channel["magnitude"] for channel in entry["channels"]]
        assert len(sizes) == 3
        assert sizes == sorted(sizes, reverse=True)
        assert max(channel["conservation_error"] for channel in entry["channels"]) <= 1e-12
        assert [neuron["index"][0] for neuron in entry["neurons"]] == [channel["channel"] for channel in entry["channels"]]
        if bias == "uniform":
            for neuron in entry["neurons"]:
                assert neuron["sum"] == pytest.approx(neuron["value"], abs=1e-12)
    deep, shallow = ([grid["side"] for grid in (e["window"]["rows"], e["window"]["columns"])] for e in printed["layers"])
    assert deep > shallow == [3, 3]


def test_sorted_by_activation(options):
    result = run(options, "--by", "activation", "--top", 99)
    assert result.exit_code == 0, result.output
    entry = json.loads(Path("out/neurons.json").read_text())["layers"][0]
    peaks = [channel["peak"] for channel in entry["channels"]]
    assert len(peaks) == 5
    assert peaks == sorted(peaks, reverse=True)
    assert [neuron["value"] for neuron in entry["neurons"]] == pytest.approx(peaks, abs=1e-6)
    for expected in ("all neurons of features.3", "channel", "rows", "neurons_features.3.png"):
        assert expected in result.stdout


def test_chosen_neurons(options):
    result = run(options, "--neuron", "4,0,0", "--neuron", " 1, 7, 7", "--json")
    first, last = json.loads(result.stdout)["layers"][0]["neurons"]
    assert (first["index"], last["index"]) == ([4, 0, 0], [1, 7, 7])
    assert (first["window"]["top"], first["window"]["left"]) == (0, 0)
    assert (last["window"]["bottom"], last["window"]["right"]) == (32, 32)


def test_a_linear_layer_has_neurons_alone(options):
    options["--layer"] = "classifier"
    result = run(options, "--json")
    assert result.exit_code == 0, result.output
    entry = json.loads(result.stdout)["layers"][0]
    assert (entry["shape"], len(entry["channels"]), entry["neurons"]) == ([7], 7, [])
    chosen = json.loads(run(options, "--json", "--neuron", "3").stdout)["layers"][0]["neurons"]
    assert chosen[0]["window"] == {"top": 0, "left": 0, "bottom": 32, "right": 32}


def test_saved_windows_are_those_of_the_layer(options):
    result = run(options, "--save", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    with safe_open("out/neurons_features.3.safetensors", "pt") as file:
        values, bias = file.get_tensor("values"), file.get_tensor("bias")
        rows = [file.get_tensor(f"local/{i}/0") for i in range(8)]
        assert file.metadata()["layer"] == "features.3"
    total = torch.stack([row.sum((-2, -1)) for row in rows], 2)
    torch.testing.assert_close(total + bias, values)


@pytest.mark.parametrize("limit", [200_000, 4 * 10**9])
def test_blocks_of_a_row_are_saved_apart(tmp_path: Path, limit):
    x = load_digits()[0][:1].float() / 255
    maps = frpc.compile(load_digit_net()).layer("conv2", x, memory_limit=limit)
    spans = maps.plan.column_spans(limit)
    assert (len(spans) > 1) == (limit < 10**6)
    counted: list[int] = []
    write_blocks(maps, tmp_path / "conv2.safetensors", counted.append)
    assert sum(counted) == len(maps)
    whole = frpc.compile(load_digit_net()).layer("conv2", x).local
    with safe_open(tmp_path / "conv2.safetensors", "pt") as file:
        rows = [torch.cat([file.get_tensor(f"local/{i}/{first}") for first, _ in spans], 2) for i in range(14)]
    torch.testing.assert_close(torch.stack(rows, 2), whole)


def test_windows_larger_than_the_disk_are_refused(tmp_path: Path, monkeypatch):
    maps = frpc.compile(load_digit_net()).layer("conv2", load_digits()[0][:1].float() / 255)
    check_disk(maps, tmp_path / "not" / "yet")
    monkeypatch.setattr(layerfiles.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(MemoryLimitError, match=r"conv2: the windows of .* neurons need .* has 1.0 kB free"):
        check_disk(maps, tmp_path)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_boxes_are_clipped():
    window = (Grid(4, -3, 7), Grid(4, -3, 7))
    assert window_box(window, (16, 16), (0, 3)) == Box(0, 9, 4, 16)
    assert window_box((Grid(0, 0, 16), Grid(0, 0, 12)), (16, 12), (3, 2)) == Box(0, 0, 16, 12)
    beyond = window_box((Grid(4, 20, 3), Grid(4, -9, 3)), (16, 16), (0, 0))  # padding alone
    assert (beyond.height, beyond.width) == (1, 1)


def portrait(box: Box | None) -> Portrait:
    relevance = torch.zeros(16, 12)
    relevance[2:5, 3:6] = torch.linspace(-1, 2, 9).view(3, 3)
    return Portrait("(0, 1, 1)", 4.5, relevance, box)


@pytest.mark.parametrize("image", [None, np.full((16, 12, 3), 0.5), np.full((33, 25), 0.5)], ids=["none", "same", "other"])
def test_a_sheet_has_a_section_each(image):
    box = Box(2, 3, 5, 6)
    figure = neuron_sheet(image, [portrait(None)] * 9, [portrait(box)] * 2, title="t", cell=2)
    assert len(figure.subfigs) == 3
    bars = [axes for part in figure.subfigs for axes in part.axes if axes.get_label() == "<colorbar>"]
    assert len(bars) == 3
    for bar in bars:
        low, high = bar.get_ylim()
        assert low == -high
    figure.canvas.draw()
    wide = neuron_sheet(image, [], [portrait(Box(0, 0, 16, 12))], title="t")
    assert len(wide.subfigs) == 1  # nothing to enlarge
    depth_sheet(image, {f"layer {k}": portrait(box) for k in range(5)}, title="t").canvas.draw()


def test_a_window_lies_where_the_neuron_sees():
    figure = neuron_sheet(np.full((32, 24), 0.5), [], [portrait(Box(2, 3, 5, 6))], title="t")  # twice as large as the input
    (frame,) = figure.subfigs[0].axes[1].patches
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((5.5, 3.5), 6, 6)


def test_nothing_to_show():
    with pytest.raises(ShapeError, match="at least one"):
        neuron_sheet(None, [], [], title="t")
    with pytest.raises(ShapeError, match="box"):
        neuron_sheet(None, [], [portrait(None)], title="t")
    with pytest.raises(ShapeError, match="box"):
        depth_sheet(None, {"a": portrait(None)}, title="t")


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "unknown layer": (["--layer", "features.33"], "LayerNameError", "has no layer 'features.33'"),
    "second layer unknown": (["--layer", "none"], "LayerNameError", "has no layer 'none'"),
    "missing picture": (["--image", "none.png"], "ImageError", "no such image file: none.png"),
    "not a picture": (["--image", "text.png"], "ImageError", "is not an image"),
    "missing weights": (["--weights", "none.safetensors"], "WeightsError", "no such weights file"),
    "folder is a file": (["--out", "text.png/results"], "OutputFolderError", "text.png is a file"),
    "neuron out of range": (["--neuron", "5,0,0"], "TargetError", "--neuron 5,0,0: features.3 has neurons [5, 8, 8]"),
    "neuron of too few numbers": (["--neuron", "1"], "TargetError", "--neuron 1: features.3 has neurons [5, 8, 8]"),
    "neuron in words": (["--neuron", "1;2"], "OptionError", "--neuron 1;2: give a neuron as numbers"),
    "negative neuron": (["--neuron", "-1,0,0"], "OptionError", "give a neuron as numbers"),
    "bias": (["--bias", "receptive_field"], "OptionError", "--bias uniform and --bias separate"),
}


@pytest.mark.parametrize(("extra", "kind", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(options, tmp_path: Path, extra, kind, message):
    before = set(tmp_path.rglob("*"))
    result = run(options, *extra)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{kind}: ")
    assert message in result.stderr
    assert result.stdout == ""
    error = json.loads(run(options, "--json", *extra).stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, 2)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("extra", [["--top", "0"], ["--by", "size"], ["--cell", "0"]])
def test_a_wrong_command_line(options, extra):
    result = run(options, *extra)
    assert result.exit_code == 2
    assert extra[0] in result.stderr


def test_a_defect_has_its_own_exit_code(options, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr(frpc, "compile", broken)
    result = run(options)
    assert result.exit_code == 70
    assert "This is a bug in frpc" in result.stderr
    assert not Path("out").exists()
