"""What modules return: names of the tensors in it, outputs of any kind, and how targets and indices choose among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import frpc
from captured_nets import Cache, agrees, randn, settled
from frpc.errors import (
    LayerNameError,
    OptionError,
    TargetError,
)

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


# Targets and indices ------------------------------------------------------------------------------------------------------


def test_targets_as_lists_and_arrays() -> None:
    model, x = settled(nn.Linear(4, 3)), randn(3, 4)
    explainer = frpc.compile(model, (x,))
    wanted = explainer(x, target=torch.tensor([2, 0, 1])).relevance
    assert torch.equal(explainer(x, target=[2, 0, 1]).relevance, wanted)
    assert torch.equal(explainer(x, target=np.array([2, 0, 1])).relevance, wanted)
    assert explainer(x, target=np.array([[2, 0], [0, 1], [1, 1]])).relevance.shape == (3, 2, 4)
    with pytest.raises(TargetError, match="target lists 2 targets for 3 samples: give one for each sample"):
        explainer(x, target=[2, 0])
    with pytest.raises(TargetError, match="Target 3 is out of range"):
        explainer(x, target=[0, 3, 1])


def test_a_list_of_tuples_for_outputs_of_several_dimensions() -> None:
    model, x = settled(nn.Linear(4, 3)), randn(2, 5, 4)
    explainer = frpc.compile(model, (x,), bias="separate")
    found = explainer(x, target=[(0, 2), (4, 1)]).relevance
    assert agrees(found[0, 0], x[0, 0] * model.weight[2]) and agrees(found[1, 4], x[1, 4] * model.weight[1])
    assert found.count_nonzero() == 8
    with pytest.raises(TargetError, match="give target as a tuple of 2 ints, not 0"):
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
