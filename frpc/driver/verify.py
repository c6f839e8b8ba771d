"""A compiled program is compared with the model: its output, and whether samples are treated apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from frpc.capture.export import InputSpec
from frpc.capture.tracing import explained_output, returned_by
from frpc.driver.balance import balance_of, check_balance
from frpc.driver.pipeline import Compiled
from frpc.driver.prepare import PreparedModel
from frpc.errors import BatchError, CompileError, OptionError

__all__ = [
    "VERIFY",
    "Model",
    "Verify",
    "agrees",
    "check_output",
    "check_verify",
    "compare_with_parts",
    "confirm",
    "verify",
    "weights",
]

Verify = Literal["first", "always", "never"]
VERIFY: tuple[Verify, ...] = ("first", "always", "never")


def check_verify(name: str) -> Verify:
    """Returns the choice of that name.

    Raises:
        OptionError: for any other name.
    """
    for choice in VERIFY:
        if choice == name:
            return choice
    raise OptionError(f"verify={name!r} is unknown; choose one of {', '.join(VERIFY)}.")


@dataclass(frozen=True)
class Model:
    """The model as it is called.

    Attributes:
        module: the copy that graphs are captured from.
        names: names to pass inputs by; empty to pass them by position.
        output: which of several outputs is explained.
    """

    module: nn.Module
    names: Sequence[str] = ()
    output: str | int | None = None

    def tensors(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs it on copies, since it may write to what it is given, and returns the output that is explained."""
        given = [x.detach().clone() for x in inputs]
        with torch.no_grad():
            found = self.module(**dict(zip(self.names, given, strict=True))) if self.names else self.module(*given)
        return [explained_output(found, self.output)]


def verify(
    compiled: Compiled,
    prepared: PreparedModel,
    model: Model,
    inputs: Sequence[Tensor],
    functional: Tensor,
    results: Sequence[Tensor],
    apart: bool = False,
) -> str | None:
    """Holds one run of a program against the model: its output, layers that it speaks of, samples given alone, its account.

    Args:
        compiled: the program.
        shared: the graph that it was compiled from.
        model: the model.
        inputs: what the program was given.
        functional: the linear functional that was explained, ``[*K, B, ...]``.
        results: what the program returned.
        apart: it is known that samples are treated apart.

    Returns:
        why samples could not be given alone, or None.

    Raises:
        CompileError: if an output or a layer differs by more than rounding can explain; says how.
        BatchError: if a sample's result depends on the others of its batch.
        ConservationError: if the account does not balance by more than rounding can explain; names the rule.
    """
    query = compiled.plan.query
    asked = (query.of,) if query.of else query.layers
    watched: AbstractContextManager[dict[str, Tensor]] = returned_by(model.module) if asked else nullcontext({})
    with watched as layers:
        given = model.tensors(inputs)
    if not query.of:
        _demand_same(prepared, model, inputs, results[0], given, "")
    values = [results[0]] if query.of else results[len(results) - len(query.layers) :] if query.layers else []
    for name, value in zip(asked, values, strict=True):
        if name in layers and layers[name].shape == value.shape:
            _demand_same(prepared, model, inputs, value, [layers[name]], name)
    reason = None if apart else compare_with_parts(prepared, model, inputs)
    balance = balance_of(compiled, functional, results)
    if balance is not None:
        check_balance(balance, compiled, prepared, inputs, functional, results[0])
    return reason


def check_output(prepared: PreparedModel, model: Model, inputs: Sequence[Tensor], output: Tensor) -> None:
    """Compares an output with the model's.

    Raises:
        CompileError: if they differ by more than rounding can explain; says how.
    """
    _demand_same(prepared, model, inputs, output, model.tensors(inputs), "")


def compare_with_parts(prepared: PreparedModel, model: Model, inputs: Sequence[Tensor]) -> str | None:
    """Runs a model on parts of a batch, twice, so that any two samples are once in different parts, and compares with the whole.

    Returns:
        why that could not be done, or None.

    Raises:
        BatchError: if a sample's result depends on the others of its batch.
    """
    count = int(inputs[0].shape[0])
    tried = count <= min(3, prepared.trial.samples)  # what the trial was given, it has told apart
    if count < 2 or tried or prepared.captured.inputs[0].batch is not None:
        return None
    whole, side = model.tensors(inputs), math.ceil(math.sqrt(count))
    parts = [list(range(first, min(first + side, count))) for first in range(0, count, side)]
    parts += [list(range(first, count, side)) for first in range(side)]
    for part in (p for p in parts if len(p) < count):
        try:
            alone = model.tensors([x[torch.tensor(part, device=x.device)] for x in inputs])
        except Exception as error:  # whatever the user's model raises
            return f"the model fails on samples {part[:5]} alone ({type(error).__name__}: {error})"
        for one, other in zip(alone, whole, strict=False):
            if other.dim() and other.shape[0] == count and one.shape == (len(part), *other.shape[1:]):
                _demand_alike(prepared, inputs, part, one, other[torch.tensor(part, device=other.device)])
    return None


def _demand_alike(prepared: PreparedModel, inputs: Sequence[Tensor], part: Sequence[int], alone: Tensor, among: Tensor) -> None:
    apart = _difference(alone, among)
    if apart <= _allowed(prepared, inputs, apart) or not bool(torch.isfinite(among).all()):
        return
    raise BatchError(
        f"One sample's result depends on the other samples of the batch: results of samples {list(part[:5])} differ by "
        f"{apart:.1e} of the largest value if they are run alone. A map of one sample could not sum to it.\n"
        "  Make samples independent in the model; if it compares samples, store fixed partners as buffers."
    )


# ---- outputs -------------------------------------------------------------------------------------------------------------


def _demand_same(
    prepared: PreparedModel, model: Model, inputs: Sequence[Tensor], got: Tensor, given: Sequence[Tensor], layer: str
) -> None:
    """Compares a result of a program with what the model gives: one of these tensors it has to be.

    Raises:
        CompileError: if it is none of them; says whether the model repeats itself, and whether it was captured as it is.
    """
    like = [x for x in given if x.shape == got.shape] or [x.reshape(got.shape) for x in given if x.numel() == got.numel()]
    what = f"the compiled program's value of {layer}" if layer else "the compiled program's output"
    if not like:
        shapes = ", ".join(str(list(x.shape)) for x in given) or "no tensors"
        raise CompileError(f"{what} has shape {list(got.shape)}, but the model gives {shapes}.")
    errors = [_difference(got, x) for x in like]
    error = min(errors, key=lambda e: (e != e, e))
    expected = like[errors.index(error)] if error == error else like[0]
    bound = _allowed(prepared, inputs, error)
    if error <= bound or not bool(torch.isfinite(expected).all()):
        return
    differs = f"{what} differs from the model's by {error:.1e} of its largest value (bound {bound:.1e})"
    again = [x.reshape(got.shape) for x in model.tensors(inputs) if x.numel() == got.numel()]
    if not layer and not any(_difference(x, expected) <= bound for x in again):
        raise CompileError(
            f"{differs}: the model's output changes from call to call. It draws random numbers, or keeps a state; make it give "
            "the same output for the same input, or store what it draws as a buffer."
        )
    with torch.no_grad():
        captured = prepared.captured.graph_module(*inputs)
    if not layer and captured.numel() == got.numel() and not _difference(captured.reshape(got.shape), expected) <= bound:
        raise CompileError(
            f"{differs}: the graph that torch.export captured from {prepared.captured.model_name} does not compute the same as "
            "the model itself. Its code depends on more than its inputs and tensors, e.g. on torch.compiler.is_compiling()."
        )
    raise CompileError(differs)


def agrees(prepared: PreparedModel, module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor], got: Tensor) -> bool:
    """Says whether a module gives, up to rounding, the output that a program gave for these inputs.

    Args:
        shared: the graph of the program.
        module: not a copy: whatever it has become since it was captured.
        names: as for :class:`Model`.
        inputs: what the program was given.
        got: its output.
    """
    errors = [_difference(got, x) for x in Model(module, names).tensors(inputs) if x.shape == got.shape]
    return any(error <= _allowed(prepared, inputs, error) for error in errors)


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN where one has NaN and the other has not."""
    if not expected.numel():
        return 0.0
    one, other = got.double(), expected.double()
    apart = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    largest = other[torch.isfinite(other)].abs()
    scale = float(largest.amax()) if largest.numel() else 1.0
    return float(apart.amax()) / (scale + torch.finfo(expected.dtype).tiny)


def _allowed(prepared: PreparedModel, inputs: Sequence[Tensor], error: float) -> float:
    """How far outputs may be apart: folding and another memory order re-associate sums, no more.

    What a deep net makes of that is measured where it has to be known: by how much its output moves with its input's last place.
    """
    bound = min(1e4 * prepared.rounding, 0.1)
    if error <= bound or error != error:
        return bound
    return max(bound, (10 if prepared.rounding > 1e-4 else 100) * _sensitivity(prepared, inputs))


def _sensitivity(prepared: PreparedModel, inputs: Sequence[Tensor]) -> float:
    """How much the model's own output moves, relative to its largest value, where its input moves by about one rounding.

    A deep net with weights that nobody trained can blow such a change up a millionfold; its output is then known no better.
    """
    chance = torch.Generator(device=inputs[0].device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=chance, device=x.device) if x.is_floating_point() else None
        return x if noise is None else x * (1 + prepared.rounding * noise.to(x.dtype))

    with torch.no_grad():
        expected = prepared.captured.graph_module(*inputs)
        return max(_difference(prepared.captured.graph_module(*(moved(x) for x in inputs)), expected) for _ in range(3))


# ---- other weights ---------------------------------------------------------------------------------------------------------


def confirm(prepared: PreparedModel, model: Model) -> None:
    """Runs a model and its captured graph on one made-up input and compares: code may depend on more than weights.

    Raises:
        CompileError: if they differ.
    """
    inputs = [_made_up(spec) for spec in prepared.captured.inputs]
    with torch.no_grad():
        got = prepared.captured.graph_module(*inputs)
    given = [x for x in model.tensors(inputs) if x.numel() == got.numel()]
    bound = 1e4 * prepared.rounding
    if bool(torch.isfinite(got).all()) and not any(_difference(got, x.reshape(got.shape)) <= bound for x in given):
        raise CompileError(
            f"{type(model.module).__name__} no longer computes the same as when it was captured, with the same weights: its "
            "code has changed, or an attribute that is not a parameter or buffer. Compile it again."
        )


def _made_up(spec: InputSpec) -> Tensor:
    """An input of the right kind: standard normal numbers, the index 0, masks that hide nothing."""
    shape = [spec.batch or 2, *spec.shape]
    if spec.dtype.is_floating_point:
        chance = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=chance).to(spec.device, spec.dtype)
    return torch.full(shape, spec.dtype is torch.bool, dtype=spec.dtype, device=spec.device)


def weights(output: Tensor) -> Tensor:
    """A functional that weighs every output differently: errors that cancel in their sum do not in it."""
    angles = torch.arange(output.numel(), dtype=torch.float64) * 2.4 + 1.0  # no two alike, and nothing drawn at random
    return torch.sin(angles).reshape(output.shape).to(output.device, output.dtype)
