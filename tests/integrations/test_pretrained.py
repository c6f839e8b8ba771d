"""Models by name and weights from files: nothing is executed, and a misfit is told completely, before anything changes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from frpc.errors import ModelNameError, TargetError, WeightsError
from frpc.integrations import torchvision as pretrained


class Trap:
    """A pickle of this makes the folder named in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()


def test_weights_round_trip(tmp_path: Path, net):
    save_file({name: tensor + 1 for name, tensor in net.state_dict().items()}, tmp_path / "w.safetensors")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pretrained.load_weights(net, tmp_path / "w.safetensors")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name] + 1), name


def test_the_step_counter_may_be_missing_and_half_precision_is_cast(net):
    weights = {name: t.half() for name, t in net.state_dict().items() if "num_batches" not in name}
    pretrained.fit_weights(net, weights)
    assert net[0].weight.dtype == torch.float32


def test_all_misfits_at_once_and_nothing_changes(net):
    weights = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    del weights["0.weight"]
    weights["extra"] = torch.zeros(1)
    weights["3.weight"] = torch.zeros(3, 16)
    weights["3.bias"] = torch.full((2,), float("nan"))
    before = net[1].weight.clone()
    with pytest.raises(WeightsError) as caught:
        pretrained.fit_weights(net, weights, source="w.safetensors")
    assert str(caught.value) == (
        "w.safetensors does not fit Sequential: 1 missing, 1 unexpected, 1 of another shape or kind, 1 with NaN or Inf.\n"
        "  missing: 0.weight\n"
        "  unexpected: extra\n"
        "  of another shape or kind: 3.weight (file float32[3, 16], model float32[2, 16])\n"
        "  with NaN or Inf: 3.bias"
    )
    assert torch.equal(net[1].weight, before)


def test_a_wrapper_prefix_is_recognised(net):
    with pytest.raises(WeightsError, match=r"strip the prefix 'module\.'"):
        pretrained.fit_weights(net, {f"module.{name}": tensor for name, tensor in net.state_dict().items()})


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickles_are_refused_unopened(tmp_path: Path, net, name, writer):
    trap = tmp_path / "sprung"
    if writer == "torch":
        torch.save({"x": Trap(trap)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(WeightsError, match=r"is a pickle[\s\S]*convert it once"):
        pretrained.load_weights(net, tmp_path / name)
    assert not trap.exists()


def test_the_advised_conversion_works(tmp_path: Path, net, monkeypatch):
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        pretrained.read_weights(tmp_path / "w.pth")
    code = str(caught.value).split('python -c "')[1].rsplit('"', 1)[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    pretrained.load_weights(net, tmp_path / "w.safetensors")


def test_damaged_or_missing_file(tmp_path: Path, net):
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    for length in (0, 5, 60, len(data) - 10):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(WeightsError, match="not a safetensors file, or is truncated"):
            pretrained.read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="no such weights file"):
        pretrained.read_weights(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        pretrained.read_weights(tmp_path)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ModelNameError, match=r"no classifier named 'squeezenet'; nearest names: squeezenet1_"):
        pretrained.build_model("squeezenet")


def test_training_heads_are_left_out():
    model = pretrained.build_model("googlenet")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights |= {"aux1.conv.conv.weight": torch.zeros(1), "aux2.fc1.bias": torch.zeros(1)}
    pretrained.fit_weights(model, weights, unused=pretrained.TRAINING_HEADS["googlenet"])
    assert model.transform_input
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_plain_file_fits_mnasnet():
    """MNASNet refuses a state dict without a format version, which safetensors cannot hold."""
    model = pretrained.build_model("mnasnet0_5")
    pretrained.fit_weights(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_torchvisions_old_densenet_names_fit():
    model = nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(1, 1, 1)})})
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): t for name, t in model.state_dict().items()}
    assert "denselayer1.norm.1.weight" in old
    pretrained.fit_weights(model, old)


def test_default_weights_come_through_the_restricted_reader(monkeypatch):
    asked = {}

    def fetch(url, **options):
        asked.update(options)
        return {"classifier.bias": torch.ones(1)}

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert set(pretrained.download_weights("densenet121", progress=False)) == {"classifier.bias"}
    assert asked == {"progress": False, "check_hash": True, "weights_only": True}


def test_no_network_says_what_to_do(monkeypatch):
    def fetch(url, **options):
        raise OSError("name not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(
        WeightsError, match=r"cannot get torchvision's weights from https://.*: name not known[\s\S]*--weights resnet18"
    ):
        pretrained.download_weights("resnet18")


def test_recipes_are_torchvisions():
    assert pretrained.recipe("resnet50").resize == 256
    assert pretrained.recipe("resnet50", default=True).resize == 232
    assert pretrained.recipe("inception_v3").crop == 299


def test_class_names():
    names = pretrained.class_names(1000)
    assert pretrained.class_index("243", names) == pretrained.class_index("Bull Mastiff", names) == 243
    assert pretrained.class_names(2) == ["class 0", "class 1"]
    for text, message in {
        "1000": "target 1000 is out of range: the model has classes 0 to 999",
        "-1": "target -1 is out of range",
        "bull mastif": "there is no class named 'bull mastif'; nearest names: bull mastiff",
        "cardigan": "the classes 264, 474 are all named 'cardigan'; give the number",
    }.items():
        with pytest.raises(TargetError, match=message):
            pretrained.class_index(text, names)
