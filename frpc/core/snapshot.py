"""The copy of a user's module that everything is captured from, in evaluation mode; the module itself is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from frpc.errors import CaptureError, InputError, TrainingModeError

__all__ = ["as_module", "snapshot"]


def snapshot(model: Any) -> nn.Module:
    """Returns a copy of the module in evaluation mode; the original keeps its mode, parameters and hooks.

    Tensors that hang on a graph of autograd are copied without it, wherever the module holds them.

    Raises:
        InputError: if it is not a module, or has parameters without a shape yet.
        TrainingModeError: if the module cannot be copied, or a part of it stays in training mode after ``eval()``.
        CaptureError: if it is a TorchScript module.
    """
    model = as_module(model)
    name = type(model).__name__
    if lazy := [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]:
        raise InputError(
            f"{name} has parameters without a shape ({', '.join(lazy[:3])}): call it once on an example before compiling it."
        )
    try:
        with _Detached():
            copied = copy.deepcopy(model)
    except Exception as error:
        raise TrainingModeError(
            f"{name} cannot be copied ({error}), so frpc cannot set a copy to evaluation mode. Remove from the "
            "module what cannot be copied (locks, files, generators), or define __deepcopy__."
        ) from error
    if isinstance(copied, fx.GraphModule) and not hasattr(type(copied), "training"):
        nn.Module.train(copied, False)  # an exported module has no eval()
    else:
        copied.eval()
    training = [name or "(the model itself)" for name, part in copied.named_modules() if part.training]
    if training:
        raise TrainingModeError(
            f"{', '.join(training[:5])} of {name} stays in training mode after eval(): its train() is "
            "overridden. The model must be in evaluation mode: make train(False) reach every part."
        )
    return copied.requires_grad_(False)


class _Detached(TorchFunctionMode):
    """Copies non-leaf tensors, which PyTorch does not allow, by value; in this thread only."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = copy.deepcopy(x.detach(), memo)
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


def as_module(model: Any) -> nn.Module:
    """Returns what is to be compiled as a module; an exported program becomes one again.

    Raises:
        InputError: for anything else; says how to make a module of it.
        CaptureError: if it is a TorchScript module.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "This is a TorchScript module, which torch.export does not support: compile the module it was made from."
        )
    if isinstance(model, ExportedProgram):
        return model.module(check_guards=False)  # inputs are checked here
    if isinstance(model, nn.Module):
        return model
    raise InputError(f"frpc.compile takes a module (nn.Module), but got {_what_else(model)}")


def _what_else(model: Any) -> str:
    """Says what was given instead of a module, and how to make a module of it."""
    if isinstance(model, type):
        how = f": make one of it first, {model.__name__}(...)."
        return f"the class {model.__name__}{how if issubclass(model, nn.Module) else '.'}"
    if isinstance(model, str | PurePath):
        return f"the path {str(model)!r}: make the model, load its weights with model.load_state_dict(...), and compile it."
    if isinstance(model, Mapping):
        return "a dict of weights: they have no code. Make the model, load them with model.load_state_dict(...), and compile it."
    if callable(model):
        return (
            f"the function {getattr(model, '__name__', type(model).__name__)}: write it as the forward of a module.\n"
            "  class Model(nn.Module):\n      def forward(self, x):\n          return ..."
        )
    return f"{type(model).__name__}."
