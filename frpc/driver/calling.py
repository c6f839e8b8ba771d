"""Calls with arguments that are no tensors: the module that makes such a call out of tensors alone, written out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frpc.capture.export import argument_order
from frpc.core.values import is_traced
from frpc.errors import InputError

__all__ = ["InputKinds", "NamedInputs", "in_order_of", "kinds_of", "named_inputs", "refuse_inside_torch_compile", "wrapper"]

InputKinds = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
"""The sizes of one sample, type and device of each input: what a captured graph depends on."""


def kinds_of(inputs: Sequence[Tensor]) -> InputKinds:
    """Returns the kind of each input."""
    return tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in inputs)


def refuse_inside_torch_compile() -> None:
    """Raises where ``torch.compile`` traces the caller: nothing can be compiled in the midst of it.

    Raises:
        InputError: says what to do first.
    """
    if is_traced():
        raise InputError("There is no program for these arguments yet: call the explainer once before torch.compile traces it.")


class NamedInputs(tuple[Tensor, ...]):
    """Inputs that were given by keyword, in the order of the model's ``forward``.

    Attributes:
        names: the name of each.
    """

    names: tuple[str, ...] = ()


def named_inputs(model: nn.Module, named: Mapping[str, Tensor]) -> NamedInputs:
    """Puts keyword inputs into the order of the model's ``forward``."""
    return in_order_of(argument_order(model, list(named)), named)


def in_order_of(names: tuple[str, ...], named: Mapping[str, Tensor]) -> NamedInputs:
    """Puts keyword inputs into an order."""
    ordered = NamedInputs(named[name] for name in names)
    ordered.names = names
    return ordered


def wrapper(arguments: Sequence[Any], names: Sequence[str] = ()) -> str:
    """Writes a module that takes the tensors of a call and makes the call, with what else it was given as it is.

    Nothing where the call has no tensors.

    Args:
        arguments: of the model, tensors inside them.
        names: their names, where they are given by name.
    """
    taken: list[str] = []
    wanted = names or [""] * len(arguments)
    written = [_written(value, name, taken) for value, name in zip(arguments, wanted, strict=True)]
    call = ", ".join(f"{name}={text}" if name else text for name, text in zip(wanted, written, strict=True))
    if not taken:
        return ""
    return (
        "  class Call(nn.Module):\n"
        "      def __init__(self, model):\n"
        "          super().__init__()\n"
        "          self.model = model\n"
        f"      def forward(self, {', '.join(taken)}):\n"
        f"          return self.model({call})\n"
        f"  frpc.compile(Call(model), ({', '.join(taken)},))"
    )


def _written(value: Any, name: str, taken: list[str]) -> str:
    """Writes a value as code; each tensor in it is an argument."""
    if isinstance(value, Tensor):
        plain = re.sub(r"\W", "_", name)
        free = plain if plain.isidentifier() and plain not in (*taken, "self") else f"x{len(taken)}"
        taken.append(free)
        return free
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_written(one, str(key), taken)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        inside = ", ".join(_written(one, f"{name}_{i}" if name else "", taken) for i, one in enumerate(value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return f"{type(value).__name__}(" + ", ".join(f"{key}={_written(one, key, taken)}" for key, one in fields) + ")"
    return repr(value)
