"""Capture: what users' modules do in forward, and what comes out: the model's own numbers, or an error that names the line."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from frpc.capture.export import capture
from frpc.errors import (
    CaptureError,
    InputError,
    LayerNameError,
    OptionError,
    TargetError,
    TrainingModeError,
    UnsupportedOpError,
    WeightsError,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model: nn.Module) -> nn.Module:
    """The model in float64, with weights that do not depend on the order of the tests."""
    chance = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=chance, dtype=torch.float64) / 2
    return model.eval()


def agrees(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().sum() <= 1e-10 * other.abs().sum().clamp_min(1e-300))


class Computes(nn.Module):
    """Two linear layers around a function of the module and what the first gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], outputs: int = 3) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, 4), nn.LazyLinear(outputs)
        self.register_buffer("keep", torch.tensor([True, False, True, True]))
        self.register_buffer("places", torch.tensor([3, 1]))
        self.register_buffer("counts", torch.tensor([1, 0, 2, 1]))
        self.register_buffer("flag", torch.tensor(True))
        self.mask = torch.tensor([False, True, True, False])  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


# Values that are known --------------------------------------------------------------------------------------------------


def write_masked(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, m.keep] = 0.5
    return h


def write_many(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, m.keep] = h[:, m.keep] * 2
    return h


def built_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(h.shape[1], dtype=torch.bool)
    mask[1:3] = True
    return h[:, mask]


def viewed_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool)
    mask.view(2, 2)[0] = True  # through memory that is shared
    return h[:, mask]


def branching(m: Any, h: Tensor) -> Tensor:
    return h.relu() if m.flag else h


def counting(m: Any, h: Tensor) -> Tensor:
    return h * int(m.keep.sum())


def looping(m: Any, h: Tensor) -> Tensor:
    return torch.stack([h[:, place] for place in m.places], 1)


def triangle(m: Any, h: Tensor) -> Tensor:
    pairs = h[:, :, None] * h[:, None, :]
    return pairs[:, torch.ones(4, 4).tril().bool()]


KNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mask": lambda m, h: h[:, m.keep],
    "attribute": lambda m, h: h[:, m.mask],
    "opposite": lambda m, h: h[..., ~m.keep],
    "bytes": lambda m, h: h[:, m.keep.long() > 0],
    "two masks": lambda m, h: h[:, m.keep & ~m.mask],
    "comparison of weights": lambda m, h: h[:, m.first.bias > 0.0],
    "where": lambda m, h: h[:, torch.where(m.keep)[0]],
    "nonzero": lambda m, h: h[:, m.keep.nonzero().flatten()],
    "nonzero as tuple": lambda m, h: h[:, m.keep.nonzero(as_tuple=True)[0]],
    "masked_select": lambda m, h: h[:, torch.masked_select(torch.arange(4), m.keep)],
    "unique": lambda m, h: h[:, m.counts.unique()],
    "unique sorted": lambda m, h: h[:, torch.unique(m.counts, return_counts=True)[1]],
    "repeat_interleave": lambda m, h: h.repeat_interleave(m.counts, dim=1),
    "bincount": lambda m, h: h[:, torch.bincount(m.counts)],
    "one_hot": lambda m, h: h @ F.one_hot(m.counts).to(h.dtype),
    "item": lambda m, h: h[:, : m.places[1].item() + 1],
    "index": lambda m, h: h[:, m.places[0]][:, None],
    "slice": lambda m, h: h[:, : m.places[0]],
    "tolist": lambda m, h: h[:, m.places.tolist()],
    "numpy": lambda m, h: h * float(m.counts.numpy().sum()),
    "like": lambda m, h: h[:, torch.ones_like(m.first.bias, dtype=torch.bool)],
    "write number": write_masked,
    "write tensor": write_many,
    "built": built_mask,
    "built through a view": viewed_mask,
    "branch": branching,
    "count": counting,
    "loop": looping,
    "triangle": triangle,
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_model_holds_is_known(name: str) -> None:
    """Indices and branches that follow from parameters, buffers and literals are the model's, at any batch size."""
    model, x = Computes(KNOWN[name]).double(), randn(3, 4)
    settled(model.first)
    model(x)
    settled(model.last)
    explainer = frpc.compile(model, (x,), method="gradient-input")
    given = x.clone().requires_grad_()
    wanted = torch.autograd.grad(model(given).flatten(1)[:, 1].sum(), given)[0] * x
    shape = model(x).shape[1:]
    found = explainer(x, target=1 if len(shape) == 1 else (0, 1))
    assert agrees(found.output, model(x))
    assert agrees(found.relevance, wanted)
    fresh = randn(5, 4, seed=3)
    assert agrees(explainer.predict(fresh), model(fresh))
    assert explainer.conservation is None or explainer.conservation < 1e-10


def written_by_the_input(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool)
    mask.copy_(h[0] > 0)
    return h * h[:, mask].sum(1, keepdim=True)


def random_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.ones(4, dtype=torch.bool)
    mask.bernoulli_(0.5)
    return h * h[:, mask].sum(1, keepdim=True)


def shared_memory(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    row = mask[0]
    row.copy_(h[0, :2] > 0)
    return h * h[:, mask.view(-1)].sum(1, keepdim=True)


def input_itself(m: Any, h: Tensor) -> Tensor:
    return h * h[:, h[0] > 0].sum(1, keepdim=True)


@pytest.mark.parametrize("function", [written_by_the_input, random_mask, shared_memory, input_itself])
def test_what_depends_on_the_input_is_not_known(function: Callable[[Any, Tensor], Tensor]) -> None:
    """A mask that inputs or chance have written is refused, at the user's line."""
    model = Computes(function)
    model.last = nn.Linear(4, 3)
    with pytest.raises((CaptureError, TrainingModeError, UnsupportedOpError), match=r"test_capture\.py:\d+"):
        frpc.compile(settled(model), (randn(2, 4),))


def test_a_renewed_model_has_the_masks_that_shaped_the_graph() -> None:
    model = nn.Sequential(Computes(KNOWN["mask"]))
    model[0].last = nn.Linear(3, 2)
    settled(model)
    explainer, x = frpc.compile(model, (randn(2, 4),)), randn(2, 4, seed=2)
    model[0].first.weight.data.mul_(2)
    assert agrees(explainer.refresh(model).predict(x), model(x))
    model[0].keep[1] = True
    model[0].keep[0] = False
    with pytest.raises(WeightsError, match=r"0\.keep of Sequential has other values than when it was captured"):
        explainer.refresh(model)


def test_the_model_is_left_as_it_is() -> None:
    model = Computes(KNOWN["built"])
    model.last = nn.Linear(2, 2)
    model = settled(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frpc.compile(model, (randn(2, 4),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


# What a layer's name stands for -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    scores: Tensor
    aux: Tensor


class Block(nn.Module):
    """Returns its main result and another, which is computed later."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.main, self.aux = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        main = self.main(x).tanh()
        aux = self.aux(x).sigmoid()
        kinds = {"dict": {"scores": main, "aux": aux}, "dataclass": Result(main, aux), "nested": ([main], {"aux": aux})}
        return {"tuple": (main, aux), "list": [main, aux], "late": (aux, main), **kinds}[self.kind]


class Blocks(nn.Module):
    def __init__(self, kind: str, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.block, self.read, self.last = Block(kind), read, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        main, aux = self.read(self.block(x))
        return self.last(main * 2) + aux[:, :2]


KINDS: dict[str, tuple[Callable[[Any], tuple[Tensor, Tensor]], str, str, bool]] = {
    "tuple": (lambda r: (r[0], r[1]), "block[0]", "block[1]", True),
    "list": (lambda r: (r[0], r[1]), "block[0]", "block[1]", True),
    "dict": (lambda r: (r["scores"], r["aux"]), "block['scores']", "block['aux']", False),
    "dataclass": (lambda r: (r.scores, r.aux), "block['scores']", "block['aux']", False),
    "nested": (lambda r: (r[0][0], r[1]["aux"]), "block[0][0]", "block[1]['aux']", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_of_a_result_has_a_name(kind: str) -> None:
    read, main, aux, plain = KINDS[kind]
    model, x = settled(Blocks(kind, read)), randn(3, 4)
    explainer = frpc.compile(model, (x,))
    wanted = read(model.block(x))
    found = explainer.at([main, aux], x, target=1)
    assert agrees(found.activations[main], wanted[0])
    assert agrees(found.activations[aux], wanted[1])
    assert agrees(found[main], wanted[0] * 2 * model.last.weight[1])
    assert {"block.main", "block.aux", main, aux} <= set(explainer.layers())
    assert agrees(explainer.neuron(aux, (2,), x).output, wanted[1][:, 2])
    if plain:
        assert agrees(explainer.at("block", x, target=1).activations["block"], wanted[0])
    else:
        with pytest.raises(LayerNameError) as error:
            explainer.at("block", x, target=1)
        assert f"it returns several tensors, each with a name: {main}, {aux}" in str(error.value)


def test_the_first_of_a_tuple_though_it_is_computed_first() -> None:
    """Today's program had the last tensor computed in the module, whichever it returned."""
    model, x = settled(Blocks("late", lambda r: (r[1], r[0]))), randn(3, 4)
    found = frpc.compile(model, (x,)).at("block", x, target=0)
    assert agrees(found.activations["block"], model.block(x)[0])


class Passing(nn.Module):
    """Modules that return what they were given, that write into it, and that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.same, self.act = nn.Identity(), nn.Linear(4, 4), nn.Identity(), nn.ReLU(inplace=True)
        self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.same(self.first(self.enter(x))))
        h = self.twice(h)
        h += 1
        h = self.twice(h.sigmoid())
        h.mul_(2)
        return self.last(h)


def test_names_of_modules_that_pass_on_write_into_or_repeat() -> None:
    model, x = settled(Passing()), randn(3, 4)
    explainer = frpc.compile(model, (x,))
    first = model.first(x)
    once = model.twice(first.relu())
    again = model.twice((once + 1).sigmoid())
    wanted = {
        "enter": x,
        "first": first,
        "same": first,
        "act": first.relu(),
        "twice@0": once,
        "twice@1": again,
        "twice": again,
        "last": model(x),
    }
    assert explainer.layers() == ["enter", "first", "same", "act", "twice@0", "twice", "twice@1", "last"]
    found = explainer.at(list(wanted), x, target=1)
    for name, value in wanted.items():
        assert agrees(found.activations[name], value), name
    assert agrees(found["enter"], frpc.compile(model, (x,), bias="separate")(x, target=1).relevance)
    assert agrees(found["twice"], again * 2 * model.last.weight[1])


def test_a_module_with_two_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(self.one(x).tanh()))

    model, x = settled(Shared()), randn(2, 4)
    found = frpc.compile(model, (x,)).at(["one", "other"], x, target=0)
    assert agrees(found.activations["one"], model.one(x))
    assert agrees(found.activations["other"], model.one(model.one(x).tanh()))


def test_source_and_recurrent_layers_take_the_first_of_what_they_return() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            states, end = self.layer(x)
            return self.last(states.mean(1) + end[0])

    model, x = settled(Recurrent()), randn(2, 5, 4)
    states, end = model.layer(x)
    explainer = frpc.compile(model, (x,))
    found = explainer.at(["layer", "layer[0]", "layer[1]"], x, target=1)
    assert agrees(found.activations["layer"], states)
    assert agrees(found.activations["layer[0]"], states)
    assert agrees(found.activations["layer[1]"], end)
    explained = frpc.compile(model, (x,), source="layer", bias="separate")(x, target=1)
    assert explained.relevance.shape == states.shape


# Outputs ----------------------------------------------------------------------------------------------------------------


class Cache:
    """An object that no one has told PyTorch about."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, Cache(y * 2)),
        lambda y: {"logits": y, "cache": Cache(y)},
        lambda y: {"logits": y, "other": y * 3},
        lambda y: Result(y, None),  # type: ignore[arg-type]
        lambda y: (y, None, "text", 3),
    ],
)
def test_outputs_that_are_no_tensors_are_left_out(wrap: Callable[[Tensor], Any]) -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.layer(x))

    model, x = settled(Wraps()), randn(2, 4)
    assert agrees(frpc.compile(model, (x,))(x, target=1).output, model.layer(x))


def test_an_attribute_of_the_output_is_chosen_by_name() -> None:
    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Result(x * 2, x * 3)

    x = randn(2, 4)
    assert agrees(frpc.compile(Wraps(), (x,), output="aux")(x, target=1).output, x * 3)
    with pytest.raises(OptionError, match="say which to explain with output="):
        frpc.compile(Wraps(), (x,))


# Autocast ---------------------------------------------------------------------------------------------------------------


class Applies(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.function(self.layers, x).float()


def chain(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def partly(layers: Any, x: Tensor) -> Tensor:
    h = layers[0](x)
    with torch.autocast("cpu", enabled=False):
        h = layers[1](h.float())
    return layers[2](h)


def without_gradient(layers: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = layers[0](x)
    return layers[1](h + x)


AUTOCAST: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[nn.Module, ...], tuple[int, ...]]] = {
    "layer norm": (chain, (nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (3, 4)),
    "rms norm": (chain, (nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), (3, 4)),
    "batch norm": (chain, (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (3, 4)),
    "group norm": (chain, (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)), (3, 3, 5, 5)),
    "instance norm": (
        chain,
        (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(36, 2)),
        (3, 3, 5, 5),
    ),
    "residual": (lambda m, x: m[2](m[1](x + m[0](x))), (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (3, 4)),
    "concatenation": (lambda m, x: torch.cat([m[0](x), x], -1), (nn.Linear(4, 4),), (3, 4)),
    "disabled inside": (partly, (nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (3, 4)),
    "no_grad inside": (without_gradient, (nn.Linear(4, 4), nn.Linear(4, 2)), (3, 4)),
    "attention": (lambda m, x: m[0](x, x, x)[0], (nn.MultiheadAttention(8, 2, batch_first=True),), (3, 5, 8)),
    "einsum": (lambda m, x: torch.einsum("btd,bsd->bts", m[0](x), x), (nn.Linear(8, 8),), (3, 5, 8)),
    "recurrent cell": (lambda m, x: m[0](x), (nn.GRUCell(4, 3),), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_in_forward(name: str) -> None:
    """The captured graph gives the model's own numbers, casts included; programs add sums in another order of bfloat16."""
    function, layers, shape = AUTOCAST[name]
    torch.manual_seed(0)
    model, x = Applies(function, *layers).eval(), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(capture(frpc.compile(model).programs.model, (x,)).graph_module(x), wanted)
    explainer = frpc.compile(model, (x,))
    found = explainer(x, seed=torch.ones_like(wanted))
    size = wanted.abs().max()
    assert float((found.output - wanted).abs().max() / size) < 2e-2  # two roundings to bfloat16 at its largest number
    total = found.relevance.flatten(1).sum(1)
    assert float((total - wanted.flatten(1).sum(1)).abs().max() / found.relevance.abs().flatten(1).sum(1).min()) < 3e-2


def test_code_under_autocast_keeps_its_names_and_lines() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.special.bessel_j0(self.layer(x).float())

    with pytest.raises(UnsupportedOpError) as error:
        frpc.compile(nn.Sequential(Shifted()), (torch.randn(2, 4),))
    line = inspect.getsourcelines(Shifted)[1] + 7
    assert f"0   test_capture.py:{line}   return torch.special.bessel_j0(self.layer(x).float())" in str(error.value)


# Modules that hold tensors of a graph -----------------------------------------------------------------------------------


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.attribute = self.layer.weight * 2
        self.inside = [{"deep": (self.layer.weight.sum(0),)}]
        self.object = Cache(self.layer.bias * 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.attribute + self.inside[0]["deep"][0] + self.object.value


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        Holds,
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.ReLU()),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()),
    ],
    ids=["attributes", "weight_norm", "spectral_norm", "parametrized", "orthogonal"],
)
def test_tensors_that_hang_on_a_graph_are_copied_without_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), randn(2, 4)
    model(x)  # old norms leave a weight with a graph behind
    held = model.attribute if isinstance(model, Holds) else None
    explainer = frpc.compile(model, (x,), bias="separate")
    given = x.clone().requires_grad_()
    wanted = model(given)
    found = explainer(x, target=1)
    assert agrees(found.output, wanted)
    if isinstance(model, Holds):
        assert model.attribute is held and held.grad_fn is not None
        assert agrees(found.relevance, x * model.attribute[:, 1].detach())
    assert all(p.requires_grad for p in model.parameters())


# What is no module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda z: z, r"got the function <lambda>: write it as the forward of a module.\n  class Model\(nn.Module\):"),
        ("net.pt", r"got the path 'net.pt': make the model, load its weights with model.load_state_dict"),
        (nn.Linear(2, 2).state_dict(), r"got a dict of weights: they have no code. Make the model, load them"),
        (nn.Linear, r"got the class Linear: make one of it first, Linear\(...\)\."),
        (nn.LazyLinear(3), r"LazyLinear has parameters without a shape yet \(weight, bias\): call it once"),
        (3, r"frpc.compile takes a module \(nn.Module\), and got int\."),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_is_no_module(given: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        frpc.compile(given, (torch.ones(1, 2),))
    with pytest.raises(InputError, match=text):
        frpc.examine(given, (torch.ones(1, 2),))


def test_an_exported_program_is_a_model_too() -> None:
    model, x = settled(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), randn(3, 4)
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}
    wanted = frpc.compile(model, (x,))(x, target=1)
    for options in (dynamic, {}):
        program = torch.export.export(model, (x,), **options)
        found = frpc.compile(program, (x,))(x, target=1)
        assert agrees(found.output, wanted.output) and agrees(found.relevance, wanted.relevance)


# Errors -----------------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def branch(h: Tensor) -> Tensor:
    return torch.cond(h.mean() > 0, lambda q: q.relu(), lambda q: q.tanh(), (h,))


def loop(h: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda q: q.sum() < 10, lambda q: (q + 1,), (h,))[0]


def policy(h: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=h, validate_args=True).probs  # the default is off once Dynamo is loaded


def with_numpy(h: Tensor) -> Tensor:
    return h * float(h.detach().numpy().sum())


def own_gradient(h: Tensor) -> Tensor:
    given = h.detach().requires_grad_()
    return torch.autograd.grad((given**2).sum(), given)[0]


def too_wide(h: Tensor) -> Tensor:
    return h @ torch.ones(5, 2)


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (branch, "Operators that take functions (torch.cond, while_loop, map, scan)"),
        (loop, "Operators that take functions (torch.cond, while_loop, map, scan)"),
        (policy, "torch.distributions looks at the values it is given: pass validate_args=False"),
        (with_numpy, "numpy does not see through tensors without values"),
        (too_wide, "Fails itself raises on these inputs, before anything is captured: RuntimeError: "),
        (lambda h: h.half() @ torch.ones(4, 2), "Fails itself raises on these inputs"),
        (lambda h: h if h.sum() > 0 else -h, "Try: replace data-dependent Python branches"),
    ],
)
def test_reasons_and_hints(function: Callable[[Tensor], Tensor], hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One error of frpc's own, the user's line, a hint that fits, and nothing on stderr."""
    with pytest.raises(CaptureError) as error:
        frpc.compile(Fails(function).eval(), (torch.randn(2, 4),))
    text = str(error.value)
    assert hint in text
    assert "test_capture.py:" in text
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_int8_modules() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CaptureError, match="Quantized modules keep weights in a packed form"):
        frpc.compile(model, (torch.randn(2, 4),))


def test_logs_of_other_threads_are_left_alone() -> None:
    import threading

    from frpc.core.reasons import quiet_logs

    class Kept(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())

    logger, kept = logging.getLogger("torch.some.part"), Kept()
    logger.addHandler(kept)
    with quiet_logs():
        logger.error("here")
        other = threading.Thread(target=lambda: logger.error("elsewhere"))
        other.start()
        other.join()
    logger.error("after")
    logger.removeHandler(kept)
    assert kept.lines == ["elsewhere", "after"]


# Targets and indices ------------------------------------------------------------------------------------------------------


def test_targets_as_lists_and_arrays() -> None:
    model, x = settled(nn.Linear(4, 3)), randn(3, 4)
    explainer = frpc.compile(model, (x,))
    wanted = explainer(x, target=torch.tensor([2, 0, 1])).relevance
    assert torch.equal(explainer(x, target=[2, 0, 1]).relevance, wanted)
    assert torch.equal(explainer(x, target=np.array([2, 0, 1])).relevance, wanted)
    assert explainer(x, target=np.array([[2, 0], [0, 1], [1, 1]])).relevance.shape == (3, 2, 4)
    with pytest.raises(TargetError, match="target lists 2 targets for 3 samples: a list holds one for each sample"):
        explainer(x, target=[2, 0])
    with pytest.raises(TargetError, match="Target 3 is out of range"):
        explainer(x, target=[0, 3, 1])


def test_a_list_of_tuples_for_outputs_of_several_dimensions() -> None:
    model, x = settled(nn.Linear(4, 3)), randn(2, 5, 4)
    explainer = frpc.compile(model, (x,), bias="separate")
    found = explainer(x, target=[(0, 2), (4, 1)]).relevance
    assert agrees(found[0, 0], x[0, 0] * model.weight[2]) and agrees(found[1, 4], x[1, 4] * model.weight[1])
    assert found.count_nonzero() == 8
    with pytest.raises(TargetError, match="a target of it is a tuple of 2 ints, not 0"):
        explainer(x, target=[0, 1])


def test_a_neuron_of_a_linear_layer_by_its_number() -> None:
    model, x = settled(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), randn(2, 4)
    explainer = frpc.compile(model, (x,))
    wanted = explainer.neuron("0", (2,), x)
    assert agrees(wanted.output, model[0](x)[:, 2])
    for index in (2, np.int64(2), torch.tensor(2)):
        found = explainer.neuron("0", index, x)  # type: ignore[arg-type]
        assert torch.equal(found.output, wanted.output) and torch.equal(found.relevance, wanted.relevance)
    assert torch.equal(explainer.neurons("0", [2, 0], x).output, model[0](x)[:, [2, 0]])
