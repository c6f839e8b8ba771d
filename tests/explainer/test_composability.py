"""The explainer among other PyTorch code: compiled, mapped, moved, copied, saved in states, inside larger modules, refreshed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from composed_net import PAIRS, TARGETS, Net, X, explainer, net, randn, same
from families import compiled
from frpc.errors import InputError, PickleRefusedError


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> frpc.LoadedExplainer:
    return frpc.load(explainer().save(tmp_path_factory.mktemp("file") / "net.frpc"))


def close(one: frpc.Explanation, other: frpc.Explanation, bound: float = 1e-12) -> bool:
    """Relative L1 of the maps and of the output."""
    pairs = ((one.output, other.output), (one.relevance, other.relevance))
    return all(bool((a - b).abs().sum() <= bound * b.abs().sum()) for a, b in pairs)


# ---- torch.compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", TARGETS)
def test_compiles_into_one_graph(asked: str) -> None:
    """`fullgraph=True` refuses graph breaks; the compiled function gives what the explainer gives, sums in another order."""
    expected = explainer()(X, **TARGETS[asked])
    torch._dynamo.reset()
    compiled = torch.compile(explainer(), fullgraph=True, backend="eager")
    assert close(compiled(X, **TARGETS[asked]), expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_compiles_for_other_batches(lazy: bool) -> None:
    """An explainer that was compiled at its first call, too; a second batch size makes the batch free."""
    asked = frpc.compile(net()) if lazy else explainer()
    expected = [asked(X[:b], target=PAIRS[:b]) for b in (4, 3, 2)]
    torch._dynamo.reset()
    compiled = torch.compile(asked, fullgraph=True, backend="aot_eager")
    assert all(close(compiled(X[: len(e.output)], target=PAIRS[: len(e.output)]), e) for e in expected)


def test_a_loaded_explainer_compiles_into_one_graph(loaded: frpc.LoadedExplainer) -> None:
    expected = [loaded(X, **asked) for asked in (TARGETS["int"], TARGETS["K each"])]
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    for wanted, asked in zip(expected, (TARGETS["int"], TARGETS["K each"]), strict=True):
        assert close(compiled(X, **asked), wanted)


def test_compiled_code_checks_values_when_it_runs() -> None:
    """What plain code refuses by an error of its own, compiled code refuses by an assertion with the same words."""
    torch._dynamo.reset()
    compiled = torch.compile(explainer(), fullgraph=True, backend="eager")
    compiled(X, target=PAIRS)
    broken = X.clone()
    broken[1, 0, 2, 2] = torch.nan
    with pytest.raises(RuntimeError, match="contains NaN or Inf"):
        compiled(broken, target=PAIRS)
    with pytest.raises(RuntimeError, match=r"A target is out of range: the output \[B, 5\] has classes 0 to 4"):
        compiled(X, target=PAIRS + 3)


def test_an_explainer_with_nothing_compiled_says_so_inside_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(frpc.compile(net()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"call the explainer once before torch\.compile"):
        compiled(X, target=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled", "loaded"])
def test_compiles_with_inductor(kind: str, tmp_path: Path) -> None:
    """In float32, where programs for CPUs hold weights that are packed: torch.compile never sees those."""
    model, x = copy.deepcopy(net()).float(), X.float()
    single: Any = frpc.compile(model, (x,))
    single = single if kind == "compiled" else frpc.load(single.save(tmp_path / "net.frpc"))
    expected = single(x, target=2)
    torch._dynamo.reset()
    assert close(torch.compile(single, fullgraph=True)(x, target=2), expected, 1e-5)


# ---- torch.func.vmap --------------------------------------------------------------------------------------------


def mapped(asked: Callable[..., frpc.Explanation]) -> None:
    """Calls mapped over samples of one give what one call for the whole batch gives."""
    for name, whole, pieces in (
        ("int", {"target": 2}, lambda x, t, s: {"target": 2}),
        ("one each", {"target": PAIRS[:, 0]}, lambda x, t, s: {"target": t[:1]}),
        ("K each", {"target": PAIRS}, lambda x, t, s: {"target": t[None]}),
        ("seed", {"seed": TARGETS["seed"]["seed"]}, lambda x, t, s: {"seed": s[None]}),
    ):
        expected = asked(X, **whole)

        def one(x: Tensor, t: Tensor, s: Tensor, pieces: Any = pieces) -> tuple[Tensor, Tensor, Tensor]:
            found = asked(x[None], **pieces(x, t, s))
            return found.output[0], found.relevance[0], found.bias[0]

        output, relevance, bias = torch.func.vmap(one)(X, PAIRS, TARGETS["seed"]["seed"])
        assert torch.equal(output, expected.output) and torch.equal(bias, expected.bias), name
        assert torch.equal(relevance, expected.relevance), name


def test_maps_over_samples() -> None:
    mapped(explainer())


def test_a_loaded_explainer_maps_over_samples(loaded: frpc.LoadedExplainer) -> None:
    mapped(loaded)


def test_maps_over_another_dimension_and_in_two_levels() -> None:
    """Ensembles of inputs, mapped along any dimension, twice over; targets that are not mapped."""
    x = randn(2, 3, 2, 3, 8, 8, seed=5)  # [N, B, M, C, H, W]
    inner = torch.func.vmap(lambda v: explainer()(v, target=PAIRS[:3]).relevance, in_dims=1)
    found = torch.func.vmap(inner)(x)  # [N, M, B, K, C, H, W]
    expected = explainer()(x.transpose(1, 2).reshape(12, 3, 8, 8), target=PAIRS[:3].repeat(4, 1)).relevance
    assert torch.equal(found, expected.reshape(found.shape))


def test_inner_layers_map_over_samples() -> None:
    names = ["stem", "block"]
    whole = explainer().at(names, X, target=PAIRS)

    def one(x: Tensor, t: Tensor) -> list[Tensor]:
        found = explainer().at(names, x[None], target=t[None])
        return [*(found[n][0] for n in names), *(found.activations[n][0] for n in names)]

    expected = [*(whole[n] for n in names), *(whole.activations[n] for n in names)]
    assert all(torch.equal(a, b) for a, b in zip(torch.func.vmap(one)(X, PAIRS), expected, strict=True))


class Halves(nn.Module):
    """Its batch is fixed: it joins the two samples it is made for."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.reshape(2, -1, 4)[0], x.reshape(2, -1, 4)[1]
        return torch.stack([(first**2).sum(0), (second**2).sum(0)])


def test_a_fixed_batch_maps_slice_by_slice() -> None:
    fixed = frpc.compile(Halves(), (randn(2, 3, 4),))
    assert any("free batch" in r.what for r in fixed.refusals)
    x = randn(5, 2, 3, 4, seed=2)
    found = torch.func.vmap(lambda v: fixed(v, target=1).relevance)(x)
    assert torch.equal(found, torch.stack([fixed(v, target=1).relevance for v in x]))


def test_mapped_values_are_checked() -> None:
    asked, broken = explainer(), X.clone()
    broken[1, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or Inf"):
        torch.func.vmap(lambda x: asked(x[None], target=1).relevance)(broken)
    with pytest.raises(InputError, match="out of range"):
        torch.func.vmap(lambda x, t: asked(x[None], target=t[None]).relevance)(X, torch.tensor([0, 1, 5, 2]))


# ---- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compiled", "loaded"])
def test_eight_threads_get_the_same_bits(kind: str, tmp_path: Path) -> None:
    """All start at once, on one that still has to prepare its programs."""
    fresh: Any = frpc.compile(net()) if kind == "compiled" else frpc.load(explainer().save(tmp_path / "net.frpc"))
    start, expected = threading.Barrier(8), [explainer()(X, target=PAIRS), explainer()(X, target=2)]

    def serve(number: int) -> bool:
        start.wait()
        return all(same(fresh(X, target=(PAIRS, 2)[(n + number) % 2]), expected[(n + number) % 2]) for n in range(6))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(serve, range(8)))


# ---- other types and devices ------------------------------------------------------------------------------------


def test_becomes_what_the_model_in_another_type_compiles_to() -> None:
    """Captured graphs and their examples go: no program in the old type is left."""
    single = copy.deepcopy(net()).float()
    turned = frpc.compile(single, (X.float(),))
    turned(X.float(), target=PAIRS)
    assert turned.double() is turned
    assert not turned.programs.compiled and not turned.programs.prepared_models
    expected = frpc.compile(copy.deepcopy(single).double(), (X,))(X, target=PAIRS)
    assert same(turned(X, target=PAIRS), expected)
    with pytest.raises(InputError, match=r"torch\.float32; the program takes torch\.float64"):
        turned(X.float(), target=0)


def test_moving_to_where_it_is_keeps_what_is_compiled() -> None:
    kept = explainer().program
    assert explainer().to("cpu").to(torch.float64).double().program is kept


def test_a_loaded_explainer_refuses_another_type(loaded: frpc.LoadedExplainer) -> None:
    with pytest.raises(frpc.errors.OptionError, match=r"cannot be converted to torch\.float16: compile the model in that dtype"):
        loaded.half()
    assert loaded.to("cpu") is loaded


# ---- states and copies ------------------------------------------------------------------------------------------


def test_its_state_is_the_models() -> None:
    """By the model's own names: a state goes from a model to its explainer, and back."""
    state = explainer().state_dict()
    assert list(state) == list(net().state_dict())
    assert all(torch.equal(state[name], value) for name, value in net().state_dict().items())
    other = Net(seed=1).double().eval()
    taken = compiled(net(), X)
    taken(X, target=PAIRS)
    assert str(taken.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert same(taken(X, target=PAIRS), frpc.compile(other, (X,))(X, target=PAIRS))
    other.load_state_dict(taken.state_dict())


def test_a_state_that_does_not_fit_is_refused() -> None:
    state, taken = net().state_dict(), compiled(net(), X)
    before = taken(X, target=1)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        taken.load_state_dict({k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        taken.load_state_dict({**state, "extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.bias"):
        taken.load_state_dict({**state, "head.bias": torch.zeros(3)})
    assert same(taken(X, target=1), before)


def test_a_deep_copy_has_tensors_of_its_own(tmp_path: Path) -> None:
    """Everything compiled comes along, nothing is compiled or captured; neither notices what becomes of the other."""
    expected, copied = explainer()(X, target=PAIRS), copy.deepcopy(explainer())
    assert same(copied(X, target=PAIRS), expected)
    for mine, other in zip(explainer().programs.compiled.values(), copied.programs.compiled.values(), strict=True):
        theirs = {value.untyped_storage().data_ptr() for value in other.program.buffers()}
        assert theirs.isdisjoint(value.untyped_storage().data_ptr() for value in mine.program.buffers())
    for value in copied.program.buffers():
        value.zero_()
    assert same(explainer()(X, target=PAIRS), expected)
    again = copy.deepcopy(explainer())
    assert same(frpc.load(again.save(tmp_path / "copy.frpc"))(X, target=PAIRS), expected)
    again.refresh(Net(seed=2).double())
    assert same(explainer()(X, target=PAIRS), expected)


def test_a_deep_copy_of_a_loaded_explainer(loaded: frpc.LoadedExplainer) -> None:
    copied = copy.deepcopy(loaded)
    for value in copied.constants.values():
        value.zero_()
    assert same(loaded(X, target=1), explainer()(X, target=1))
    assert not copied(X, target=1).output.any()


def test_pickling_is_refused_with_the_way_out(loaded: frpc.LoadedExplainer) -> None:
    with pytest.raises(PickleRefusedError, match=r"Save it with explainer\.save\(path\), and load it with frpc\.load\(path\)"):
        pickle.dumps(explainer())
    with pytest.raises(pickle.PicklingError, match=r"call frpc\.load\(path\) there"):
        torch.save(loaded, io.BytesIO())
    with pytest.raises(PickleRefusedError):
        pickle.dumps(nn.Sequential(explainer()))


# ---- inside a larger module -------------------------------------------------------------------------------------


class Service(nn.Module):
    """A trainable layer in front of an explainer."""

    def __init__(self) -> None:
        super().__init__()
        self.tone = nn.Conv2d(3, 3, 1).double()
        self.explainer = compiled(net(), X)

    def forward(self, x: Tensor) -> Tensor:
        return self.explainer(self.tone(x), target=1).relevance


def test_inside_a_larger_module() -> None:
    """It adds nothing to train, keeps its mode, lies in the state under its name, moves along."""
    service = Service()
    expected = service(X)
    assert [name for name, _ in service.named_parameters()] == ["tone.weight", "tone.bias"]
    service.train()
    assert torch.equal(service(X), expected) and not any(part.training for part in service.explainer.programs.model.modules())
    service.eval().requires_grad_(True)
    assert torch.equal(service(X), expected)
    other = Service()
    other.explainer.refresh(Net(seed=3).double())
    assert not torch.allclose(other(X), expected)
    assert set(service.state_dict()) == {"tone.weight", "tone.bias", *(f"explainer.{n}" for n in net().state_dict())}
    other.load_state_dict(service.state_dict())
    assert torch.equal(other(X), expected)
    single = service.float()(X.float())
    assert single.dtype is torch.float32 and (single - expected).abs().sum() < 1e-5 * expected.abs().sum()
    copied = copy.deepcopy(service)
    assert torch.equal(copied(X.float()), single)
