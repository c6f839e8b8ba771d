"""One model to be tried: how it is built, what it is given, and how parameters are drawn so that a check means something."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["SAMPLES", "Inputs", "Subject", "Suite", "each", "first_that_runs", "redraw", "settle", "take"]

SAMPLES = 3
Inputs = tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A model with three samples of its input.

    Attributes:
        model: in evaluation mode, nothing in it degenerate.
        inputs: batch first, in order or by keyword.
        options: what :func:`frpc.compile` needs to be told about this model, e.g. which output is explained.
    """

    model: nn.Module
    inputs: Inputs
    options: Mapping[str, str] = field(default_factory=dict)

    def explained(self, inputs: Inputs) -> Tensor:
        """Runs the model and returns the output that is explained."""
        with torch.no_grad():
            return self.result(inputs)

    def result(self, inputs: Inputs) -> Tensor:
        """The same, with gradients where they are asked for."""
        result = self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)
        if "output" in self.options:
            result = result[self.options["output"]]
        elif isinstance(result, dict):
            (result,) = result.values()
        assert isinstance(result, Tensor)
        return result

    def double(self) -> Subject:
        """Returns the subject in float64; the model itself is converted."""
        return Subject(self.model.double(), each(self.inputs, lambda x: x.double() if x.is_floating_point() else x), self.options)


class Suite(Protocol):
    """What a module of a suite provides."""

    def names(self) -> list[str]:
        """Every model of the suite."""

    def build(self, name: str) -> Subject:
        """Builds one, with random weights."""


def take(inputs: Inputs, samples: slice) -> Inputs:
    """Returns some of the samples."""
    return each(inputs, lambda x: x[samples])


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Changes every input."""
    if isinstance(inputs, dict):
        return {name: change(x) for name, x in inputs.items()}
    return tuple(change(x) for x in inputs)


def first_that_runs(attempts: Iterable[Callable[[], Subject]]) -> Subject:
    """Builds the first subject whose model runs on its inputs; attempts go from small inputs to large ones.

    Raises:
        RuntimeError: if none does; carries the last reason.
    """
    last: Exception | None = None
    for attempt in attempts:
        try:
            subject = attempt()
            subject.explained(take(subject.inputs, slice(1)))
        except Exception as error:  # any library's complaint about a size that does not fit
            last = error
        else:
            return subject
    raise RuntimeError(f"no attempt ran: {type(last).__name__}: {last}") from last


def redraw(model: nn.Module) -> nn.Module:
    """Draws parameters and batch statistics anew, so that no part of the model is an identity, a zero or a constant.

    Convolutions ``N(0, 2/fan_in)``, linear layers ``N(0, 1/fan_in)``, their biases ``N(0, 0.1²)``; batch statistics: means
    ``N(0, 0.1²)``, variances ``U(0.5, 1.5)``. Of the others, parameters that hold a single number: zeros become ``N(0, 0.1²)``
    (in norms' gains ``U(0.5, 1.5)``), numbers below 0.1 (layer scales) ``U(0.05, 0.15)``, and the rest is multiplied by
    ``U(0.5, 1.5)``. What a library draws at random by itself stays.
    """
    for part in model.modules():
        convolution = isinstance(part, nn.modules.conv._ConvNd)
        for name, parameter in part.named_parameters(recurse=False):
            with torch.no_grad():
                if name == "weight" and (convolution or isinstance(part, nn.Linear)):
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                    parameter.normal_(std=math.sqrt((2 if convolution else 1) / fan_in))
                elif name == "bias" and (convolution or isinstance(part, nn.Linear)):
                    parameter.normal_(std=0.1)
                else:
                    _enliven(parameter, gain=name == "weight" and "norm" in type(part).__name__.lower())
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
            part.running_mean.normal_(std=0.1)
            assert part.running_var is not None
            part.running_var.uniform_(0.5, 1.5)
    return model.eval()


def settle(model: nn.Module, run: Callable[[], object]) -> nn.Module:
    """Takes batch statistics from what the model sees in one run, as training would: no layer's values grow or vanish."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # the mean of all runs, of which there is one
        part.train()
    with torch.no_grad():
        run()
    return model.eval()


def _enliven(parameter: Tensor, gain: bool) -> None:
    """Draws a parameter anew if all its entries are the same number."""
    if parameter.numel() == 0 or not parameter.is_floating_point() or bool((parameter != parameter.flatten()[0]).any()):
        return
    value = float(parameter.flatten()[0])
    if value == 0 and not gain:
        parameter.normal_(std=0.1)
    elif gain:
        parameter.uniform_(0.5, 1.5)
    elif abs(value) < 0.1:
        parameter.uniform_(0.05, 0.15)
    else:
        parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
