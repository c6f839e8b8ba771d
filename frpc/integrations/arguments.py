"""Checks the arguments of Captum's ``attribute`` and arranges them as a program takes them: only tensors."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from frpc.core.snapshot import snapshot
from frpc.core.torch_compat import version_of
from frpc.errors import InputError, OptionError, ShapeError, TargetError

__all__ = [
    "Arranged",
    "AttributeCall",
    "Baselines",
    "Inputs",
    "Targets",
    "joined",
    "live",
    "module_of",
    "read",
    "versions",
    "wrapped",
]

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
Baselines: TypeAlias = Tensor | float | tuple[Tensor | float, ...] | None
Targets: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None


P = ParamSpec("P")
R = TypeVar("R")


class SourceInput(nn.Module):
    """An explained input, ``x``, or its increment, ``x - x_ref``: a separate node, which gets the relevance."""

    def forward(self, x: Tensor, reference: Tensor | None) -> Tensor:
        return x * 1 if reference is None else x - reference


class Arranged(nn.Module):
    """The model as a function of tensors alone: the explained ones, their references, and further arguments.

    Increments are explained as ``f(x_ref + (x - x_ref))``, so that one program serves all references, one for each sample.
    """

    def __init__(self, model: nn.Module, asked: AttributeCall) -> None:
        super().__init__()
        self.model = model
        self.sources = nn.ModuleList(SourceInput() for _ in asked.inputs)
        self.referred = bool(asked.references)
        self.further = tuple(None if batch else value for value, batch in zip(asked.further, asked.batched, strict=True))
        self.are_tensors = asked.batched

    def forward(self, *tensors: Tensor) -> Any:
        feed = iter(tensors)
        explained = [next(feed) for _ in self.sources]
        references = [next(feed) if self.referred else None for _ in self.sources]
        carried = [source(x, there) for source, x, there in zip(self.sources, explained, references, strict=True)]
        given = [c if there is None else there + c for c, there in zip(carried, references, strict=True)]
        rest = [next(feed) if batch else value for batch, value in zip(self.are_tensors, self.further, strict=True)]
        return self.model(*given, *rest)


class Called(nn.Module):
    """A plain function of tensors as a module; the modules that it reads are noted, since a change of them is one of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        read = inspect.getclosurevars(function) if inspect.isfunction(function) else None
        seen = {} if read is None else {**read.globals, **read.nonlocals}
        self.reads = tuple(value for value in seen.values() if isinstance(value, nn.Module))

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def module_of(function: Callable[..., Any]) -> nn.Module:
    """The module that is meant: itself, the one whose method is given, or one around a plain function."""
    owner = function.__self__ if isinstance(function, MethodType) and function.__name__ == "forward" else function
    return owner if isinstance(owner, nn.Module) else Called(function)


def live(model: nn.Module, asked: AttributeCall) -> nn.Module:
    """The function in the form that a program has, in evaluation mode; a copy if it is in training mode."""
    arranged = Arranged(model, asked)
    training = not isinstance(model, Called) and any(part.training for part in model.modules())
    return snapshot(arranged) if training else arranged


def versions(model: nn.Module) -> tuple[Any, ...]:
    """Changes when weights change: assigned, moved, or written in place; torch does not count writes through ``.data``."""
    read = (model, *model.reads) if isinstance(model, Called) else (model,)
    tensors = [tensor for part in read for tensor in (*part.parameters(), *part.buffers())]
    return tuple((id(t), t.data_ptr(), t.dtype, 0 if t.is_inference() else version_of(t)) for t in tensors)


@dataclass(frozen=True, eq=False)
class AttributeCall:
    """The arguments of one call of ``attribute``.

    Attributes:
        inputs: the explained tensors, ``[B, ...]`` each.
        references: one like each, or none.
        further: other arguments of the model.
        target: as the explainer takes it, or a list with a tuple for each sample.
        held: every further tensor is compiled into the program, those too that have as many rows as there are samples.
    """

    inputs: tuple[Tensor, ...]
    references: tuple[Tensor, ...]
    further: tuple[Any, ...]
    target: Any
    held: bool = False

    @property
    def count(self) -> int:
        return int(self.inputs[0].shape[0])

    @property
    def batched(self) -> tuple[bool, ...]:
        """Which further arguments are inputs of the program: tensors with a row for each sample. The others are part of it."""
        return tuple(not self.held and _has_rows(value, self.count) for value in self.further)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the program takes."""
        rows = (value for value, batch in zip(self.further, self.batched, strict=True) if batch)
        return (*self.inputs, *self.references, *rows)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What a program that answers this is found by."""
        further = (
            "batch" if batch else key_of(value, at)
            for at, (value, batch) in enumerate(zip(self.further, self.batched, strict=True))
        )  # fmt: skip
        return (len(self.inputs), bool(self.references), *further)

    def at_reference(self) -> AttributeCall:
        """The same with the inputs at their references."""
        return replace(self, inputs=self.references)

    def parts(self, size: int | None) -> Iterator[AttributeCall]:
        """Cuts the batch into parts of ``size`` samples.

        Raises:
            OptionError: for a size below 1.
        """
        if size is not None and size < 1:
            raise OptionError(f"internal_batch_size={size}: give at least 1.")
        step = size or max(self.count, 1)
        for start in range(0, max(self.count, 1), step):
            rows = slice(start, start + step)
            further = tuple(v[rows] if batch else v for v, batch in zip(self.further, self.batched, strict=True))
            target = self.target[rows] if isinstance(self.target, Tensor | list) else self.target
            inputs, references = (tuple(x[rows] for x in given) for given in (self.inputs, self.references))
            yield replace(self, inputs=inputs, references=references, further=further, target=target)


def read(inputs: Inputs, baselines: Baselines, target: Targets, further: Any, referred: bool) -> AttributeCall:
    """Reads Captum's arguments.

    Raises:
        InputError, ShapeError, TargetError: for wrong arguments; each says what is allowed.
    """
    explained = inputs if isinstance(inputs, tuple) else (inputs,)
    for position, x in enumerate(explained):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            kind = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"inputs[{position}] is {kind}; give floating-point tensors, batch first. Other arguments go "
                "into additional_forward_args; for token indices use frpc.compile(model), which explains the embeddings."
            )
    references = _references(explained, baselines) if referred else ()
    arguments = () if further is None else further if isinstance(further, tuple) else (further,)
    explained = tuple(x.detach() for x in explained)
    return AttributeCall(explained, references, arguments, _read_target(target, int(explained[0].shape[0])))


def _references(inputs: tuple[Tensor, ...], baselines: Baselines) -> tuple[Tensor, ...]:
    given = baselines if isinstance(baselines, tuple) else (0 if baselines is None else baselines,)
    if len(given) == 1 and not isinstance(given[0], Tensor):
        given = given * len(inputs)
    if len(given) != len(inputs):
        raise ShapeError(f"{len(given)} baselines given for {len(inputs)} inputs.")
    found = []
    for position, (x, there) in enumerate(zip(inputs, given, strict=True)):
        if not isinstance(there, Tensor):
            found.append(torch.full_like(x, there))
            continue
        fits = there.shape[1:] == x.shape[1:] and there.dim() == x.dim() and there.shape[0] in (1, x.shape[0])
        if not fits:
            raise ShapeError(
                f"baselines[{position}] has shape {list(there.shape)}; inputs[{position}] is {list(x.shape)}: give one baseline, "
                f"{[1, *x.shape[1:]]}, one for each sample, or a number."
            )
        found.append(there.detach().to(x).expand_as(x))
    return tuple(found)


def _read_target(target: Any, count: int) -> Any:
    """Captum's targets as an explainer takes them; a tuple for each sample stays a list."""
    if isinstance(target, Tensor):
        if target.numel() == 1 and not target.is_floating_point():
            return int(target)
        if target.dim() != 1 or len(target) != count:
            raise TargetError(
                f"target has shape {list(target.shape)}; give one index, or one for each of {count} samples. For K targets per "
                "sample call frpc.compile(model)(x, target=[B, K])."
            )
    if not isinstance(target, list):
        return target
    if len(target) != count:
        raise TargetError(f"target lists {len(target)} indices for {count} samples.")
    if all(isinstance(one, tuple) for one in target):
        return target
    if any(isinstance(one, bool) or not isinstance(one, int) for one in target):
        raise TargetError(f"target={target!r}: give a list with an int or a tuple of ints for each sample.")
    return torch.tensor(target)


def _has_rows(value: object, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def key_of(value: object, position: int, inside: bool = False) -> Any:
    """What a program that was compiled with a fixed argument is found by: its value.

    Raises:
        InputError: for an object whose value is not known to be all there is to it.
    """
    if isinstance(value, Tensor) and not (inside and value.dim()):  # a part of the batch would not reach what a list holds
        number = value.detach().cpu().contiguous()
        content = hashlib.sha256(number.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        return "tensor", value.dtype, value.device, tuple(value.shape), content
    if isinstance(value, list | tuple):
        return type(value), tuple(key_of(one, position, True) for one in value)
    if isinstance(value, dict):
        return dict, tuple((name, key_of(one, position, True)) for name, one in value.items())
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return type(value), value
    raise InputError(
        f"additional_forward_args[{position}] {'holds' if inside else 'is'} {type(value).__name__}. Tensors with one row per "
        "sample are inputs of the program. Everything else is compiled into it and may be: other tensors, numbers, strings, "
        "None, and lists, tuples and dicts of numbers and strings."
    )


def joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One tensor for each input, of those of the parts of the batch."""
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def wrapped(method: Callable[P, R]) -> Callable[P, R]:
    """Captum logs calls by wrappers, and its ``NoiseTunnel`` calls ``attribute._wrapped__``."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(*args, **kwargs)

    return call
