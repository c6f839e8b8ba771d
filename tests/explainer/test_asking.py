"""The same arguments in every question: inputs by name, a strategy chosen once, answers that can be compared."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import FrpcError, InputError, OptionError


class Scaled(nn.Module):
    """Two inputs in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(2, 3, 3), nn.Linear(12, 4)

    def forward(self, picture: Tensor, gain: Tensor) -> Tensor:
        return self.out((self.conv(picture).relu() * gain[:, None, None]).flatten(1))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3), nn.Linear(27, 4)

    def forward(self, picture: Tensor) -> Tensor:
        return self.out(self.conv(picture).relu().flatten(1))


def scaled() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Scaled().double().eval(), torch.randn(2, 2, 6).double(), torch.rand(2).double()


def single() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Single().double().eval(), torch.randn(2, 2, 5, 5).double()


def test_every_question_takes_inputs_by_name() -> None:
    model, picture = single()
    named, plain = frpc.compile(model, {"picture": picture}), frpc.compile(model, (picture,))
    assert torch.equal(named.layer("conv", picture=picture).dense(), plain.layer("conv", picture).dense())
    assert torch.equal(
        named.neuron("conv", (1, 0, 2), picture=picture).relevance, plain.neuron("conv", (1, 0, 2), picture).relevance
    )
    assert torch.equal(named.at("conv", picture=picture, target=1)["conv"], plain.at("conv", picture, target=1)["conv"])
    assert torch.equal(named.seed_for(picture=picture, target=1), plain.seed_for(picture, target=1))
    assert named.compiled(picture=picture).plan.query == plain.compiled(picture).plan.query
    assert frpc.check(named, picture=picture, target=1).error == frpc.check(plain, picture, target=1).error <= 1e-12


def test_a_neuron_of_several_inputs_by_name() -> None:
    """Lazily: the names must reach the capture through every question."""
    model, picture, gain = scaled()
    one = frpc.compile(model).neuron("conv", (1, 2), gain=gain, picture=picture)
    two = frpc.compile(model).neuron("conv", (1, 2), picture, gain)
    assert all(torch.equal(a, b) for a, b in zip(one.relevance, two.relevance, strict=True))


def test_a_first_call_that_fails_settles_nothing() -> None:
    model, picture, gain = scaled()
    explainer = frpc.compile(model)
    with pytest.raises(FrpcError):
        explainer(picture=picture, target=0)  # the gain is missing
    found = explainer(gain=gain, picture=picture, target=0)
    assert torch.equal(found.output, model(picture, gain))
    lazily = frpc.compile(model)
    with pytest.raises(InputError):
        lazily(picture=picture, gain="loud", target=0)
    assert torch.equal(lazily(picture, gain, target=0).output, found.output)


def test_strategy_is_what_questions_about_neurons_use() -> None:
    model, picture = single()
    for strategy in ("windows", "forward", "transposed"):
        explainer = frpc.compile(model, (picture,), strategy=strategy)
        assert explainer.layer("conv", picture).plan.strategy == strategy
        assert explainer.layer("conv", picture, strategy="windows").plan.strategy == "windows"
    with pytest.raises(OptionError, match="windows end at"):
        frpc.compile(model, (picture,), strategy="windows").layer("out", picture)
    with pytest.raises(OptionError, match="windows end at"):
        frpc.compile(model, (picture,), strategy="windows").neuron("out", (1,), picture)


def test_answers_are_compared_by_identity() -> None:
    model, picture = single()
    explainer = frpc.compile(model, (picture,))
    for ask in (lambda: explainer(picture, target=1), lambda: explainer.at("conv", picture, target=1)):
        one, two = ask(), ask()
        assert one == one and one != two and len({one, two}) == 2 and one in [two, one]


def modules(package: ModuleType) -> list[ModuleType]:
    names = [name for _, name, _ in pkgutil.walk_packages(package.__path__, "frpc.") if ".assets" not in name]
    return [importlib.import_module(name) for name in names if name not in {"frpc.integrations.lightning", "frpc.__main__"}]


def test_no_record_compares_tensors() -> None:
    """A dataclass that compares its fields raises where one of them is a tensor with several elements."""
    records = {
        value for module in modules(frpc) for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__.startswith("frpc")
    }  # fmt: skip
    comparing = [
        f"{record.__module__}.{record.__name__}.{field.name}"
        for record in records
        for field in dataclasses.fields(record)
        if "Tensor" in str(field.type) and "Callable" not in str(field.type) and field.compare and "__eq__" in vars(record)
        and vars(record)["__eq__"] is not object.__eq__
    ]  # fmt: skip
    assert not comparing
