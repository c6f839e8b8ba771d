"""The command line: what it writes, what it prints, and a clear message and exit code for everything that can go wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import frpc
from frpc.cli.commands import app
from frpc.errors import CompileError, OutputFolderError
from frpc.integrations import torchvision as pretrained
from frpc.plots.outputs import OutputFolder
from places import DATA

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"trained weights and photos are not at {DATA}")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Tiny(nn.Module):
    """Stands in for a torchvision model, so that a command takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 7, stride=8), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(6 * 14 * 14, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


class Uncovered(Tiny):
    """Has an operator without a rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.special.bessel_j0(self.features(x).flatten(1)))


@pytest.fixture
def tiny(monkeypatch) -> Tiny:
    torch.manual_seed(0)
    model = Tiny().eval()
    monkeypatch.setattr(pretrained, "build_model", lambda name: model)
    return model


@pytest.fixture
def weights(tmp_path: Path, tiny) -> Path:
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def explain(*extra: object, image: Path, weights: Path, out: Path):
    return run("explain", "--model", "squeezenet1_0", "--weights", weights, "--image", image, "--out", out, *extra)


# ---- what it does ---------------------------------------------------------------------------------------------------


def test_explain_by_another_method(tmp_path: Path, photo, weights):
    result = explain("--method", "lid-ig", "--target", "1;4", image=photo, weights=weights, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    with np.load(tmp_path / "out" / "photo.npz") as file:
        raw = dict(file)
    assert record["method"] == "lid-ig" and raw["targets"].tolist() == [1, 4]
    model, x = pretrained.build_model("squeezenet1_0"), torch.zeros(1, 3, 224, 224)
    at_zero = model(x)[0, [1, 4]].detach().numpy()
    np.testing.assert_allclose(raw["relevance"].sum((1, 2, 3)), raw["logits"][[1, 4]] - at_zero, atol=1e-4)
    assert "left out" in result.output and [e["conservation_error"] for e in record["explained"]] == [None, None]


def test_explain_compares_methods(tmp_path: Path, photo, weights):
    methods = "frp,sig-lid-ig,epsilon-plus,grad-cam,layer-cam"
    result = explain("--compare", methods, "--target", "0;5", image=photo, weights=weights, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "photo.compare.png") as sheet:
        assert sheet.width > 2 * sheet.height  # six columns, two rows
    files = json.loads((tmp_path / "out" / "photo.json").read_text())["files"]
    assert str(tmp_path / "out" / "photo.compare.png") in files


def test_explain_at_inner_layers(tmp_path: Path, photo, weights):
    result = explain("--method", "sig-lid-ig", "--scales", "features.0,features.2", image=photo, weights=weights, out=tmp_path)
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "photo.npz") as file:
        assert file["relevance"].shape == (1, 1, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lid-gi"), "method 'lid-gi' is unknown; nearest names: lid-ig"),
        (("--compare", "frp,grad_kam"), "method 'grad-kam' is unknown; nearest names: grad-cam"),
        (("--method", "lid-ig", "--check"), "--check only works with --method frp"),
        (("--method", "grad-cam", "--layer", "classifier"), "classifier gives [B, 7], which is not a spatial map"),
        (("--method", "frp", "--scales", "features.9"), "no layer 'features.9'"),
    ],
)
def test_explain_refuses_what_no_method_can_do(tmp_path: Path, photo, weights, arguments, message):
    result = explain(*arguments, image=photo, weights=weights, out=tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not list((tmp_path / "out").glob("*.png"))


def test_explain_writes_pictures_raw_maps_and_json(tmp_path: Path, photo, weights):
    result = explain("--top", 3, "--check", image=photo, weights=weights, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    names = {f"photo.{entry['class']}-class-{entry['class']}.png" for entry in record["explained"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"photo.top3.png", "photo.npz", "photo.json"}
    assert sorted(record["files"]) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    with np.load(tmp_path / "out" / "photo.npz") as raw:
        assert raw["relevance"].shape == (3, 3, 224, 224)
        assert raw["targets"].tolist() == [entry["class"] for entry in record["top"][:3]]
        sums = raw["relevance"].astype(np.float64).sum((1, 2, 3))
        np.testing.assert_allclose(sums, raw["logits"][raw["targets"]], atol=1e-4)
        np.testing.assert_allclose(sums, [entry["sum"] for entry in record["explained"]], atol=1e-9)
    assert max(entry["conservation_error"] for entry in record["explained"]) <= 1e-6
    assert set(record["seconds"]) == {"read", "compile", "explain"}
    assert max(row["error"] for row in record["layers"]) <= 1e-6
    for expected in ("class", "map sum", "photo.top3.png", "largest errors of"):
        assert expected in result.stdout


def test_explain_json_is_one_object(tmp_path: Path, photo, weights):
    twin = tmp_path / "other" / "photo.png"
    twin.parent.mkdir()
    twin.write_bytes(photo.read_bytes())
    result = explain("--image", twin, "--json", "--threads", 1, image=photo, weights=weights, out=tmp_path / "out")
    printed = json.loads(result.stdout)
    assert [Path(image["files"][-1]).name for image in printed["images"]] == ["photo-1.json", "photo-2.json"]
    assert printed["images"][0] == json.loads((tmp_path / "out" / "photo-1.json").read_text())


@pytest.mark.parametrize("bias", ["uniform", "receptive_field", "separate"])
def test_explain_in_float64_with_every_bias_policy(tmp_path: Path, photo, weights, bias):
    out = tmp_path / "out"
    result = explain("--bias", bias, "--dtype", "float64", "--target", "class 4", "--json", image=photo, weights=weights, out=out)
    (entry,) = json.loads(result.stdout)["images"][0]["explained"]
    assert entry["class"] == 4
    assert entry["conservation_error"] <= 1e-12
    with np.load(out / "photo.npz") as raw:
        inside = raw["relevance"].sum() + (raw["constants"][0] if bias == "separate" else 0)
        assert inside == pytest.approx(entry["logit"], abs=1e-10)


@pytest.mark.slow  # by default in test_models, without the command
@needs_data
def test_explain_a_real_photo(tmp_path: Path):
    result = explain(
        "--json",
        image=DATA / "images" / "dog_and_cat.png",
        weights=DATA / "weights" / "squeezenet1_0_imagenet.safetensors",
        out=tmp_path,
    )
    (entry,) = json.loads(result.stdout)["images"][0]["explained"]
    assert entry["name"] == "bull mastiff"
    assert entry["logit"] == pytest.approx(22.93, abs=0.005)
    assert entry["sum"] == pytest.approx(entry["logit"], abs=1e-3)
    assert entry["conservation_error"] <= 1e-6


def test_demo(tmp_path: Path):
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "99.5" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "digits.json"}


def test_compile_writes_the_program(tmp_path: Path, tiny):
    result = run("compile", "--model", "squeezenet1_0", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    code = (tmp_path / "out" / "squeezenet1_0.py").read_text()
    compile(code, "squeezenet1_0.py", "exec")
    assert "features.0" in code
    assert "convolution" in (tmp_path / "out" / "squeezenet1_0.table.txt").read_text()
    assert "transposed" in (tmp_path / "out" / "squeezenet1_0.plan.txt").read_text()


def test_examine(tiny):
    result = run("examine", "--model", "squeezenet1_0", "--json")
    printed = json.loads(result.stdout)
    assert (result.exit_code, printed["ok"]) == (0, True)
    assert {"features.0", "classifier"} <= {row["module"] for row in printed["rows"]}


def test_examine_with_gaps_has_its_own_exit_code(monkeypatch):
    monkeypatch.setattr(pretrained, "build_model", lambda name: Uncovered().eval())
    result = run("examine", "--model", "squeezenet1_0")
    assert result.exit_code == 1
    assert "MISSING" in result.stdout
    assert "bessel_j0" in result.stdout


def test_doctor():
    result = run("doctor", "--json")
    printed = json.loads(result.stdout)
    assert (result.exit_code, printed["self_check"]["ok"]) == (0, True)
    assert printed["packages"]["torch"]
    text = run("doctor")
    assert "passed" in text.stdout
    assert "cpu" in text.stdout


def test_version_and_help():
    assert run("--version").stdout.strip() == f"frpc {frpc.__version__}"
    result = run("--help")
    for command in ("demo", "explain", "examine", "compile", "doctor"):
        assert command in result.stdout


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "unknown model": (["--model", "squeeznet1_0"], "ModelNameError", "nearest names: squeezenet1_"),
    "missing picture": (["--image", "none.png"], "ImageError", "no such image file: none.png"),
    "missing weights": (["--weights", "none.safetensors"], "WeightsError", "no such weights file"),
    "pickled weights": (["--weights", "model.pth"], "WeightsError", "is a pickle"),
    "misfitting weights": (["--weights", "other.safetensors", "--model", "resnet18"], "WeightsError", "missing: conv1.weight"),
    "not a picture": (["--image", "text.png"], "ImageError", "is not an image"),
    "truncated picture": (["--image", "half.png"], "ImageError", "truncated"),
    "target out of range": (["--target", "1000"], "TargetError", "target 1000 is out of range"),
    "unknown class": (["--target", "bull mastif"], "TargetError", "nearest names: bull mastiff"),
    "top with a target": (["--target", "3", "--top", "2"], "OptionError", "--top 2 only works with --target auto"),
    "too many targets": (["--top", "1001"], "OptionError", "the model has 1000 classes"),
    "folder is a file": (["--out", "text.png/results"], "OutputFolderError", "text.png is a file"),
}


@pytest.fixture(scope="module")
def untrained() -> dict[str, torch.Tensor]:
    return pretrained.build_model("squeezenet1_1").state_dict()


@pytest.fixture
def squeezenet_files(tmp_path: Path, photo, untrained, monkeypatch) -> dict[str, str]:
    """A folder with good and bad files; the options that would work."""
    monkeypatch.chdir(tmp_path)
    save_file(untrained, "good.safetensors")
    save_file({"conv2.weight": torch.zeros(1)}, "other.safetensors")
    torch.save({}, "model.pth")
    Path("text.png").write_text("no picture")
    Path("half.png").write_bytes(photo.read_bytes()[:9000])
    return {"--model": "squeezenet1_1", "--weights": "good.safetensors", "--image": "photo.png", "--out": "out"}


@pytest.mark.parametrize(("change", "kind", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(squeezenet_files, tmp_path: Path, monkeypatch, change, kind, message):
    monkeypatch.setattr(frpc, "compile", lambda *_, **__: pytest.fail("work started before the input was checked"))
    before = set(tmp_path.rglob("*"))
    options = squeezenet_files | dict(zip(change[::2], change[1::2], strict=True))
    arguments = [text for pair in options.items() for text in pair]
    result = run("explain", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{kind}: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    error = json.loads(run("explain", *arguments, "--json").stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, 2)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--model", "x", "--weights", "y"], "--image"),
        (["explain", "--model", "x", "--image", "y"], "--weights"),
        (["explain", "--model", "x", "--weights", "y", "--image", "z", "--bias", "none"], "none"),
        (["explain", "--model", "x", "--weights", "y", "--image", "z", "--top", "0"], "--top"),
        (["compile", "--model", "resnet18"], "--out"),
        (["demo", "--threads", "0"], "--threads"),
        (["paint"], "paint"),
    ],
)
def test_a_wrong_command_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_operator_without_a_rule_is_bad_input(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pretrained, "build_model", lambda name: Uncovered().eval())
    result = run("compile", "--model", "squeezenet1_0", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("UnsupportedOpError: 1 of")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [RuntimeError("boom"), CompileError("boom")], ids=["any", "own"])
def test_a_defect_has_its_own_exit_code(tmp_path: Path, photo, weights, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(frpc, "compile", broken)
    result = explain(image=photo, weights=weights, out=tmp_path / "out")
    assert result.exit_code == 70
    assert f"{type(error).__name__}: boom\nThis is a bug in frpc" in result.stderr
    assert not (tmp_path / "out").exists()


def test_output_folder(tmp_path: Path):
    folder = OutputFolder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    folder.text("x.txt", "x")
    assert folder.files == [tmp_path / "a" / "b" / "x.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        OutputFolder(tmp_path / "file")
    (tmp_path / "a" / "b" / "y.txt").mkdir()
    with pytest.raises(OutputFolderError, match=r"cannot write .*y\.txt"):
        folder.text("y.txt", "y")


@contextmanager
def nobody() -> Iterator[None]:
    """A block in which the superuser, who may write anywhere, is a user who may not."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_output_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    with nobody(), pytest.raises(OutputFolderError, match="Permission denied"):
        OutputFolder(tmp_path / "out")


def test_output_folder_where_nothing_can_be_made():
    if not Path("/proc/self").is_dir():
        pytest.skip("needs a file system that refuses new files, such as /proc")
    with pytest.raises(OutputFolderError, match="cannot write to"):
        OutputFolder("/proc/self/frpc")
