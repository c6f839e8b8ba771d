"""What an exported program computes, with its inputs and outputs: written into the file, so that a file describes itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from frpc.errors import InputError, OptionError

__all__ = ["TARGETS", "Input", "Question", "Signature", "Targets", "described", "examples"]

Targets = Literal["one", "several", "seed", "top"]
TARGETS: tuple[Targets, ...] = ("one", "several", "seed", "top")


@dataclass(frozen=True)
class Question:
    """What an exported program computes.

    Attributes:
        targets: ``one`` class index a sample, ``[B]``; ``several``, ``[B, K]``; a ``seed``, a linear functional of the output,
            ``[B, *O]``; or ``top``: the class of the largest output, found by the program itself.
        at: module paths whose relevance is wanted instead of the input's.
        grad_cam: module path of the layer whose class activation map is wanted instead.
        layer: module path of the layer whose neurons are all explained; needs no target.
    """

    targets: Targets = "one"
    at: tuple[str, ...] = ()
    grad_cam: str = ""
    layer: str = ""

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise OptionError(f"targets={self.targets!r} is unknown; choose {', '.join(TARGETS)}.")
        if sum(map(bool, (self.at, self.grad_cam, self.layer))) > 1:
            raise OptionError("Give only one of at=, grad_cam= and layer=: a file computes one of them.")

    @property
    def columns(self) -> bool:
        """Whether there are K numbers a sample."""
        return self.targets == "several"


@dataclass(frozen=True)
class Input:
    """One input of an exported program.

    Attributes:
        name: as the model's ``forward`` calls it; ``target`` or ``seed`` for the last.
        shape: of one sample, without the batch.
        dtype: element type, ``float32``.
        low, high: the range of the example's values; None where no example was given.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an exported file, in order.

    Attributes:
        frpc: the version that wrote it.
        model: class name of the model.
        rules: name of the rule set.
        bias: where constants go.
        device: the kind of device it runs on.
        question: what it computes.
        batch: the fixed number of samples, or None where any is taken.
        inputs: its inputs before the target or seed.
        classes: how many outputs a target chooses from; 0 where none is taken.
        outputs: names of its outputs.
        window: of a layer's neurons, along rows and columns: ``(jump, offset, side)``.
    """

    frpc: str
    model: str
    rules: str
    bias: str
    device: str
    question: Question
    batch: int | None
    inputs: tuple[Input, ...]
    classes: int
    outputs: tuple[str, ...]
    window: tuple[tuple[int, int, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all inputs."""
        asked = {"one": ("target",), "several": ("target",), "seed": ("seed",), "top": ()}[self.question.targets]
        return (*(i.name for i in self.inputs), *(() if self.question.layer else asked))

    @property
    def free(self) -> dict[str, dict[int, str]]:
        """Which sizes of the inputs are free: axis and name."""
        found = {name: {} if self.batch is not None else {0: "batch"} for name in self.names}
        if self.question.columns and not self.question.layer:
            found["target"][1] = "targets"
        return found

    def to_json(self) -> str:
        """Writes it as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, path: object) -> Signature:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: if the text is not a signature.
        """
        try:
            found = json.loads(text)
            question = found.pop("question")
            inputs = tuple(Input(**{**i, "shape": tuple(i["shape"])}) for i in found.pop("inputs"))
            asked = Question(**{**question, "at": tuple(question["at"])})
            window = tuple(tuple(axis) for axis in found.pop("window"))
            return cls(**{**found, "question": asked, "inputs": inputs, "outputs": tuple(found["outputs"]), "window": window})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} has a damaged signature ({error}); export it again.") from error


def examples(inputs: Sequence[Input], batch: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Draws ``[batch, ...]`` for each input, within its example's range; from a standard normal distribution without one."""
    return [_drawn(i, batch, generator) for i in inputs]


def _drawn(given: Input, batch: int, generator: torch.Generator) -> torch.Tensor:
    dtype = getattr(torch, given.dtype)
    size = [batch, *given.shape]
    if dtype.is_floating_point:
        if given.low is None or given.high is None:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return (given.low + (given.high - given.low) * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype)
    assert given.low is not None and given.high is not None
    return torch.randint(int(given.low), int(given.high) + 1, size, generator=generator).to(dtype)


def described(name: str, x: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Input:
    """Describes an input by an example of it.

    Raises:
        InputError: for an input of integers without an example: nobody knows which are meant.
    """
    text = str(dtype).removeprefix("torch.")
    if x is None:
        if not dtype.is_floating_point:
            raise InputError(f"Input {name!r} is {dtype}: give an example as inputs=, to draw new inputs from its range.")
        return Input(name, tuple(shape), text)
    return Input(name, tuple(shape), text, float(x.min()), float(x.max()))
