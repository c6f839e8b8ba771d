"""Inputs, targets, names and options that do not fit: each a clear error of its own class, before work starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import (
    DeviceError,
    DtypeError,
    EmptyBatchError,
    FrpcError,
    InputError,
    LayerNameError,
    NonFiniteError,
    OptionError,
    ShapeError,
    TargetError,
)
from perceptron import explainer, randn

# Inputs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "kind", "text"),
    [
        ((), InputError, "The explainer takes tensors, batch first; got nothing"),
        ((1.5,), InputError, "The explainer takes tensors, batch first; got float"),
        ((randn(2, 3, 5), randn(2)), ShapeError, r"2 inputs given, 1 expected: x \[B, 3, 5\] torch.float64"),
        ((randn(2, 5, 3),), ShapeError, r"Input 'x' has shape \[2, 5, 3\]; the program takes x \[B, 3, 5\] torch.float64"),
        ((randn(3, 5),), ShapeError, r"has shape \[3, 5\]; the program takes"),
        ((randn(),), ShapeError, r"has shape \[\]; the program takes"),
        (
            (randn(2, 3, 5).float(),),
            DtypeError,
            r"Input 'x' is torch.float32; the program takes torch.float64. Convert it with .to\(torch.float64\)",
        ),
        (
            (torch.empty(2, 3, 5, dtype=torch.float64, device="meta"),),
            DeviceError,
            "Input 'x' is on meta; the program runs on cpu",
        ),
        ((randn(0, 3, 5),), EmptyBatchError, r"Input 'x' has no samples \(shape \[0, 3, 5\]\)"),
    ],
    ids=["nothing", "number", "two", "shape", "rank", "no dimensions", "dtype", "device", "empty"],
)
def test_inputs_that_do_not_fit(inputs: tuple[Any, ...], kind: type[FrpcError], text: str) -> None:
    with pytest.raises(kind, match=text):
        explainer()(*inputs, target=0)
    with pytest.raises(kind, match=text):
        explainer().at("first", *inputs, target=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(bad: float) -> None:
    x = randn(3, 3, 5)
    x[1, 2, :2] = bad
    text = r"Input 'x' contains 2 NaN or Inf values \(samples 1\): a map could not sum to the output"
    with pytest.raises(NonFiniteError, match=text):
        explainer()(x, target=0)


def test_batches_of_different_size() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    compiled = frpc.compile(Sum(), (randn(2, 4), randn(2, 4)))
    with pytest.raises(ShapeError, match=r"The inputs have different batch sizes: \[2, 3\]"):
        compiled(randn(2, 4), randn(3, 4), target=0)
    with pytest.raises(ShapeError, match=r"1 inputs given, 2 expected: a \[B, 4\] torch.float64, b \[B, 4\] torch.float64"):
        compiled(randn(2, 4), target=0)


@pytest.mark.parametrize(
    ("inputs", "kind", "text"),
    [
        ((), InputError, "tensor"),
        (("picture.png",), InputError, "got str|is str, not a tensor"),
        ((randn(0, 4),), EmptyBatchError, r"has shape \[0, 4\]: give at least one sample, batch first|no samples"),
        ((torch.tensor(1.0),), EmptyBatchError, r"has shape \[\]: give at least one sample, batch first|no samples"),
        ((torch.full((1, 4), float("nan")),), NonFiniteError, "contains 4 NaN or Inf values"),
    ],
    ids=["nothing", "text", "empty", "no dimensions", "nan"],
)
def test_example_inputs_are_checked_before_anything_is_captured(
    inputs: tuple[Any, ...], kind: type[FrpcError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead of time and at the first call; nothing is captured, and nothing stays behind."""
    monkeypatch.setattr(
        torch.export, "export", lambda *_, **__: pytest.fail("the model was captured before its input was checked")
    )
    with pytest.raises(kind, match=text):
        frpc.compile(nn.Linear(4, 2), inputs)
    lazy = frpc.compile(nn.Linear(4, 2))
    with pytest.raises(kind, match=text):
        lazy(*inputs, target=0)
    assert not lazy.programs.prepared_models
    assert not lazy.programs.compiled


# Targets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (None, r"Give target= or seed= \(neither given\): the output is \[B, 4\], and only one number of it is explained"),
        (4, r"Target 4 is out of range: the output \[B, 4\] has indices 0 to 3"),
        (-1, r"Target -1 is out of range: the output \[B, 4\] has indices 0 to 3"),
        (True, r"target=True is not an index: use an int, a tuple of ints, or a tensor of class indices"),
        (1.0, r"target=1.0 is not an index: use an int"),
        ("cat", r"target='cat' is not an index: use an int"),
        ((1, 2), r"The output is \[B, 4\]: give target as an int, not \(1, 2\)"),
        ((), r"The output is \[B, 4\]: give target as an int, not \(\)"),
        (torch.tensor([1, 4]), r"Target 4 is out of range: the output \[B, 4\] has classes 0 to 3"),
        (torch.tensor([[-2], [0]]), r"Target -2 is out of range: the output \[B, 4\] has classes 0 to 3"),
        (torch.tensor([1, 2, 3]), r"target has shape \[3\]; give \[B\] or \[B, K\] with B = 2"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), r"target has shape \[2, 1, 1\]; give \[B\] or \[B, K\] with B = 2"),
        (torch.zeros(2, 0, dtype=torch.int64), r"target has shape \[2, 0\]; give \[B\] or \[B, K\]"),
        (torch.tensor([0.0, 1.0]), r"target is torch.float32; give integer class indices, or use seed="),
        (torch.tensor([True, False]), r"target is torch.bool; give integer class indices"),
    ],
)
def test_targets_that_do_not_fit(target: Any, text: str) -> None:
    x = randn(2, 3, 5)
    with pytest.raises(TargetError, match=text):
        explainer()(x, target=target)
    with pytest.raises(TargetError, match=text):
        explainer().at("first", x, target=target)


def test_targets_of_outputs_of_several_dimensions() -> None:
    x = randn(2, 3, 5)
    compiled = frpc.compile(nn.ReLU(), (x,))
    with pytest.raises(TargetError, match=r"The output is \[B, 3, 5\]: give target as a tuple of 2 ints, not 1"):
        compiled(x, target=1)
    with pytest.raises(TargetError, match=r"Target 5 is out of range: the output \[B, 3, 5\] has indices 0 to 4"):
        compiled(x, target=(2, 5))
    with pytest.raises(TargetError, match=r"The output is \[B, 3, 5\]: give target as a tuple of 2 ints, or use seed="):
        compiled(x, target=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("seed", "kind", "text"),
    [
        (randn(2, 3), TargetError, r"seed has shape \[2, 3\]; give \[2, 4\] or \[2, 'K', 4\]"),
        (randn(3, 4), TargetError, r"seed has shape \[3, 4\]; give"),
        (randn(4), TargetError, r"seed has shape \[4\]; give"),
        (randn(2, 0, 4), TargetError, r"seed has shape \[2, 0, 4\]; give"),
        (torch.full((2, 4), float("nan")), NonFiniteError, "seed contains NaN or Inf"),
    ],
)
def test_seeds_that_do_not_fit(seed: Tensor, kind: type[FrpcError], text: str) -> None:
    with pytest.raises(kind, match=text):
        explainer()(randn(2, 3, 5), seed=seed)


def test_target_and_seed_together() -> None:
    with pytest.raises(TargetError, match=r"Give target= or seed= \(both given\)"):
        explainer()(randn(2, 3, 5), target=1, seed=randn(2, 4))


def test_check_takes_one_target() -> None:
    with pytest.raises(TargetError, match="check takes one target per sample; call it for each of the K targets"):
        frpc.check(explainer(), randn(2, 3, 5), target=torch.tensor([[0, 1], [2, 3]]))


# Names and options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("frist", "Perceptron has no layer 'frist'; nearest names: first"),
        ("layer4.1.conv2", "Perceptron has no layer 'layer4.1.conv2'; known names: flat, first, act, last"),
    ],
)
def test_unknown_layers_give_the_nearest(name: str, text: str) -> None:
    with pytest.raises(LayerNameError) as error:
        explainer().at(["first", name], randn(2, 3, 5), target=0)
    assert text in str(error.value)


def test_unknown_options() -> None:
    model, x = nn.Linear(4, 2), torch.ones(1, 4)
    for inputs in (None, (x,)):
        with pytest.raises(OptionError, match="bias='even' is unknown; choose one of uniform, receptive_field, separate"):
            frpc.compile(model, inputs, bias="even")
        with pytest.raises(OptionError, match="strategy='fast' is unknown; choose one of auto, windows, forward, transposed"):
            frpc.compile(model, inputs, strategy="fast")


class Pair(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return {"scores": x, "mask": x > 0, "twice": 2 * x} if self.kind is dict else self.kind((x, 2 * x, x > 0))


@pytest.mark.parametrize(
    ("kind", "output", "text"),
    [
        (tuple, None, r"The model returns 3 tensors \(a tuple of 3\): say which to explain with output="),
        (dict, None, r"The model returns 3 tensors \(a dict with 'scores', 'mask', 'twice'\): say which to explain with output="),
        (tuple, 3, r"The model's result has no entry 3: a tuple of 3"),
        (tuple, "logits", r"The model's result has no entry 'logits': a tuple of 3"),
        (dict, "score", r"The model's result has no entry 'score': a dict with 'scores', 'mask', 'twice'"),
        (list, 2, r"output=2 is not a floating-point tensor of the model's result \(a list of 3\)"),
        (dict, "mask", r"output='mask' is not a floating-point tensor of the model's result \(a dict with"),
    ],
)
def test_which_of_several_outputs(kind: type, output: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        frpc.compile(Pair(kind), (randn(2, 4),), output=output)


def test_nothing_to_look_at_before_compiling() -> None:
    lazy = frpc.compile(nn.Linear(4, 2))
    for name in ("code", "plan", "stages", "refusals", "program"):
        with pytest.raises(InputError, match=r"Nothing is compiled yet: call the explainer once, or give frpc\.compile"):
            getattr(lazy, name)
    with pytest.raises(InputError, match="Nothing is compiled yet"):
        lazy.table()
    with pytest.raises(InputError, match="Nothing is captured yet"):
        lazy.layers()


def test_nothing_floating_to_explain() -> None:
    """Integers that index no embedding have nothing that relevance could be a share of."""

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 3

    with pytest.raises(InputError, match=r"No input is floating-point and none indexes an embedding"):
        frpc.compile(Counts(), (torch.tensor([[1, 2], [3, 4]]),))
