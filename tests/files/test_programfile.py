"""Explainers in files: what is loaded answers what was saved, bit by bit; what is no such file is refused, and runs nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import frpc
from case import Case
from cases import CASES
from families import compiled
from families import net as family_net
from filed_net import Net, X, explainer, net, randn, same
from frpc.errors import InputError, OptionError, OutputFolderError, ProgramFileError, ShapeError
from frpc.files.operators import ARITHMETIC, aten_operator, operators

K = torch.tensor([[1, 2, 0], [3, 0, 1]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explainer().save(tmp_path_factory.mktemp("files") / "net.frpc")


@pytest.fixture(scope="module")
def loaded(saved: Path) -> frpc.LoadedExplainer:
    return frpc.load(saved)


# ---- what is loaded answers what was saved ----------------------------------------------------------------------


def test_answers_one_target_and_several(loaded: frpc.LoadedExplainer) -> None:
    for asked in ({"target": 1}, {"target": K[:, 0]}, {"target": K}, {"seed": randn(2, 4, seed=1)}, {"seed": randn(2, 3, 4)}):
        assert same(loaded(X, **asked), explainer()(X, **asked))
    x = randn(5, 3, 8, 8, seed=2)
    assert same(loaded(x, target=3), explainer()(x, target=3))
    assert torch.equal(loaded.predict(x), explainer()(x, target=0).output)
    found = loaded(X, target=1)
    assert isinstance(found, frpc.Explanation) and found.inputs[0] is X
    total = found.relevance.sum((1, 2, 3))
    assert ((total - found.output[:, 1]).abs() <= 1e-12 * found.relevance.abs().sum((1, 2, 3))).all()


def test_says_what_it_is(loaded: frpc.LoadedExplainer) -> None:
    assert repr(loaded) == (
        f"LoadedExplainer(Net: f64[B, 3, 8, 8] -> f64[B, 4])\n  rules FRP, bias uniform, saved by frpc {frpc.__version__}\n"
        "  2 programs: input for one target; input for K targets"
    )
    assert loaded.model_name == "Net" and loaded.bias_policy == "uniform"
    ast.parse(loaded.code)
    assert "relevance, from the output back" in loaded.code and "f64[B, 3, 8, 8]" in loaded.code


def test_the_code_is_that_of_the_explainer(loaded: frpc.LoadedExplainer) -> None:
    """Line by line the same operators on the same operands, with the same comments; attributes may have other names."""

    def calls(code: str) -> list[str]:
        return [line.replace(" = None", "") for line in code.splitlines() if "torch.ops" in line and "sym_size" not in line]

    assert calls(loaded.code) == calls(explainer().code) != []


RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "LRP": lambda: {"rule": frpc.rules.LRP(epsilon=1e-3)},
    "EpsilonPlus": lambda: {"rule": frpc.rules.EpsilonPlus()},
    "gradient": lambda: {"rule": frpc.rules.Gradient(times_input=False)},
    "receptive field": lambda: {"bias": "receptive_field"},
    "separate": lambda: {"bias": "separate"},
    "probability": lambda: {"rule": frpc.rules.LRP(), "seed": "probability"},
    "sig-lid-ig": lambda: {"method": "sig-lid-ig"},
}


@pytest.mark.parametrize("name", RULES)
def test_methods_and_policies(name: str, tmp_path: Path) -> None:
    model, x = family_net("max pool")
    asked = compiled(model, x, **RULES[name]())
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    for target in (1, torch.tensor([[0, 2]]).expand(len(x), 2)):
        assert same(found(x, target=target), asked(x, target=target))


def test_several_reference_inputs_are_part_of_the_file(tmp_path: Path) -> None:
    references = randn(3, 3, 8, 8, seed=4)
    rule = frpc.rules.LID(reference=references)
    asked = compiled(net(), X, rule=rule)
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    assert same(found(X, target=K), asked(X, target=K))
    assert torch.equal(found.predict(X), asked(X, target=0).output)


def test_bounds_of_inputs_are_part_of_the_file(tmp_path: Path) -> None:
    low, high = torch.tensor([-1.0, -2.0, -3.0]).reshape(3, 1, 1), 4.0
    x = X.clamp(-1, 1)
    asked = compiled(net(), x, rule=frpc.rules.ZBox(low=low, high=high))
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    assert same(found(x, target=1), asked(x, target=1))
    with pytest.raises(InputError, match="this one goes 1 above high"):
        found(x + 4, target=1)


def test_layers_and_tops_that_were_asked_before(tmp_path: Path) -> None:
    asked = compiled(net(), X, rule=frpc.rules.LRP())
    asked.at(["stem", "down"], X, target=K)
    asked(X, target=1, seed="contrastive")
    found = frpc.load(asked.save(tmp_path / "m.frpc", columns=False))
    one, other = found.at(["stem", "down"], X, target=K), asked.at(["stem", "down"], X, target=K)
    for name in other:
        assert torch.equal(one[name], other[name]) and torch.equal(one.activations[name], other.activations[name])
    assert same(found(X, target=1, seed="contrastive"), asked(X, target=1, seed="contrastive"))
    held = "input for one target; layers stem, down for K targets; input for one target, from contrastive"
    with pytest.raises(InputError) as error:
        found(X, target=K)
    assert str(error.value) == (
        f"The file has no program for input for K targets (it has: {'; '.join(found.questions)}). Call the original explainer "
        "that way once, and save it again; columns=True saves the program for K targets."
    )
    assert sorted(found.questions) == sorted(held.split("; "))


class Tokens(nn.Module):
    """Takes integers and a mask by name, gives a structure."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(torch.tanh(x).sum(1))}


def test_inputs_by_name_and_integers(tmp_path: Path) -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 10]]), torch.ones(2, 3, dtype=torch.float64)
    asked = frpc.compile(Tokens().double(), {"ids": ids, "mask": mask})
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    assert same(found(mask=mask, ids=ids, target=2), asked(ids=ids, mask=mask, target=2))
    assert same(found(ids, mask, target=2), asked(ids, mask, target=2))
    with pytest.raises(InputError, match="Inputs ids given by name; the explainer takes ids, mask"):
        found(ids=ids, target=1)


def test_every_kind_of_input_that_was_compiled(tmp_path: Path) -> None:
    """An explainer compiled at its calls holds programs for each image size; the file too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    asked = frpc.compile(model)
    small, large = randn(2, 3, 6, 6), randn(2, 3, 9, 7)
    expected = [asked(small, target=1), asked(large, target=K[:, 1:])]
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    assert same(found(small, target=1), expected[0]) and same(found(large, target=K[:, 1:]), expected[1])
    with pytest.raises(ShapeError, match=r"has shape \[2, 3, 5, 5\]; the program takes input.* \[B, 3, 6, 6\] torch\.float64"):
        found(randn(2, 3, 5, 5), target=0)


def test_a_fixed_batch(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x.reshape(2, -1, 4)[0] ** 2).sum(0), (x.reshape(2, -1, 4)[1] ** 2).sum(0)])

    asked = frpc.compile(Halves(), (randn(2, 3, 4),))
    found = frpc.load(asked.save(tmp_path / "m.frpc"))
    assert same(found(randn(2, 3, 4), target=1), asked(randn(2, 3, 4), target=1))
    with pytest.raises(ShapeError, match="a batch of 3, but this model was captured with a fixed batch of 2"):
        found(randn(3, 3, 4), target=1)


# ---- the file ---------------------------------------------------------------------------------------------------


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Both programs, forward and backward forms of every kernel: still no more than the model's own weights take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 64, 16),
        ).eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = frpc.compile(model, (x,))
    path = asked.save(tmp_path / "m.frpc")
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert path.stat().st_size < 1.1 * weights
    found = frpc.load(path)
    assert same(found(x, target=K[:1]), asked(x, target=K[:1]))
    kept = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found.constants.values()}
    assert sum(kept.values()) < 1.1 * weights


def test_is_a_safetensors_file_with_plain_json(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        document = json.loads(metadata["frpc.program"])
    assert metadata["frpc.format"] == "1" and document["model"] == "Net"
    ops = {node["op"] for program in document["programs"] for node in program["nodes"]}
    assert ops <= operators() | set(ARITHMETIC) | {"input", "constant", "output"}


def test_saving_over_a_file_that_is_open_elsewhere(tmp_path: Path) -> None:
    """The old file stays whole for whoever reads it; nothing but the new file is left in the folder."""
    path = explainer().save(tmp_path / "m.frpc")
    old = frpc.load(path)
    other = frpc.compile(Net(seed=7).double(), (X,))
    other.save(path, columns=False)
    assert same(old(X, target=1), explainer()(X, target=1))
    assert same(frpc.load(path)(X, target=1), other(X, target=1))
    assert [p.name for p in tmp_path.iterdir()] == ["m.frpc"]


# ---- weights outside --------------------------------------------------------------------------------------------


def test_weights_by_reference(tmp_path: Path) -> None:
    """Folded norms are computed again from the serving model's tensors, and the results are the same bits."""
    path = explainer().save(tmp_path / "m.frpc", weights="reference")
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["tilt"] or all(file.get_tensor(k).numel() <= 4 for k in file.keys())  # noqa: SIM118
    for given in ({"model": net()}, {"model": net().train()}, {"state_dict": net().state_dict()}):
        assert same(frpc.load(path, **given)(X, target=K), explainer()(X, target=K))
    net().eval()
    found = frpc.load(path, model=net())
    shared = {value.untyped_storage().data_ptr() for value in found.constants.values()}
    assert net().head.weight.untyped_storage().data_ptr() in shared, "weights that are taken as they are take no memory twice"


def test_weights_by_reference_are_checked(tmp_path: Path) -> None:
    path = explainer().save(tmp_path / "m.frpc", weights="reference")
    state = net().state_dict()
    with pytest.raises(ProgramFileError, match=r"it contains no weights, only a reference to them: give model= or state_dict="):
        frpc.load(path)
    with pytest.raises(ProgramFileError, match=r"'head\.weight' of the model differs from the one that was compiled"):
        frpc.load(path, state_dict={**state, "head.weight": state["head.weight"] * 1.0001})
    with pytest.raises(ProgramFileError, match=r"no tensor 'head\.bias' in the model"):
        frpc.load(path, state_dict={k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(ProgramFileError, match=r"'head\.bias' of the model is \[4\] torch\.float32, but the programs need"):
        frpc.load(path, state_dict={**state, "head.bias": state["head.bias"].float()})
    with pytest.raises(ProgramFileError, match="it contains its own weights: load it without model="):
        frpc.load(explainer().save(tmp_path / "own.frpc"), model=net())
    with pytest.raises(OptionError, match='weights=\'outside\' is unknown; choose "stored" or "reference"'):
        explainer().save(path, weights="outside")


@pytest.mark.parametrize("name", ["residual", "strided", "batch norm", "signed"])
@pytest.mark.parametrize("rule", ["FRP", "ZPlus"])
def test_constants_follow_from_the_models_weights(name: str, rule: str, tmp_path: Path) -> None:
    """Nothing but numbers that come from nowhere else is stored: scales and parts of weights are computed from the model's."""
    model, x = family_net(name)
    asked = compiled(model, x, rule=getattr(frpc.rules, rule)())
    path = asked.save(tmp_path / "m.frpc", weights="reference")
    assert same(frpc.load(path, model=model)(x, target=1), asked(x, target=1))
    with safe_open(path, "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored <= 16


# ---- what cannot be saved ---------------------------------------------------------------------------------------


def test_operators_of_ones_own_are_named(tmp_path: Path) -> None:
    library = torch.library.Library("frpc_file_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: x * 2, "Meta")

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.frpc_file_test.twice(x).sum(-1, keepdim=True)

    asked = frpc.compile(Own(), (randn(2, 3),), rule=frpc.rules.FRP(overrides={torch.ops.frpc_file_test.twice.default: _twice}))
    with pytest.raises(ProgramFileError) as error:
        asked.save(tmp_path / "m.frpc")
    assert str(error.value) == (
        "Own cannot be saved: it contains frpc_file_test.twice.default: registered outside PyTorch, but a file must run where "
        "they are not registered."
    )
    assert not list(tmp_path.iterdir())


def _twice(call: frpc.Call, x: Tensor) -> frpc.Affine:
    from frpc.maps import Scale

    return frpc.Affine({"x": Scale(torch.full_like(x, 2), x.shape)})


def test_nothing_compiled_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Nothing is captured yet: call the explainer once"):
        frpc.compile(net()).save(tmp_path / "m.frpc")
    with pytest.raises(OutputFolderError, match="is not a folder: create it first"):
        explainer().save(tmp_path / "missing" / "m.frpc")


# ---- the closed list --------------------------------------------------------------------------------------------


def test_the_list_names_operators_of_pytorch_that_overwrite_nothing() -> None:
    for name in sorted(operators()):
        schema = aten_operator(name)._schema
        assert not schema.is_mutable, name
        assert str(aten_operator(name)) == name
    assert operators("layout") < operators("constants") < operators()
    dangerous = ("from_file", "set_", "resize", "record_stream", "empty", "rand", "_cuda", "backward_hook", "print", "save")
    assert not [name for name in operators() for word in dangerous if word in name.split(".")[1]]
    with pytest.raises(KeyError):
        aten_operator("aten.from_file.default")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.arguments is None], ids=lambda case: case.id)
def test_every_operator_goes_through_a_file(case: Case, tmp_path: Path) -> None:
    """What is compiled for any operator can be saved, is read with the same calls, and gives the same bits."""
    inputs = case.inputs()
    asked = frpc.compile(case.module(), inputs)
    size = tuple(asked.predict(*inputs).shape)
    weights = torch.linspace(-1, 1, size[0] * max(1, torch.Size(size[1:]).numel()), dtype=torch.float64).reshape(size)
    found = frpc.load(asked.save(tmp_path / "m.frpc", columns=False))
    assert same(found(*inputs, seed=weights), asked(*inputs, seed=weights))


# ---- another process --------------------------------------------------------------------------------------------

SERVE = """
import sys, torch, frpc
from safetensors.torch import load_file, save_file
given = load_file(sys.argv[2])
loaded = frpc.load(sys.argv[1])
one, many = loaded(given["x"], target=1), loaded(given["x"], target=given["k"])
save_file({"output": one.output, "one": one.relevance, "many": many.relevance}, sys.argv[3])
print(loaded.model_name, type(loaded).__name__, "torchvision" in sys.modules)
"""


def test_loads_in_a_process_that_knows_nothing_of_the_model(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"x": X, "k": K}, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", SERVE, str(saved), str(tmp_path / "given.safetensors"), str(tmp_path / "found.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["Net", "LoadedExplainer"]
    found = load_file(tmp_path / "found.safetensors")
    assert torch.equal(found["output"], explainer()(X, target=1).output)
    assert torch.equal(found["one"], explainer()(X, target=1).relevance)
    assert torch.equal(found["many"], explainer()(X, target=K).relevance)
