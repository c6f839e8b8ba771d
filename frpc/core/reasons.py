"""Why a model could not be captured: the error, the user's line, and what to change; nothing else on stderr."""

from __future__ import annotations

import logging
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from frpc.core.graph import origin_of
from frpc.errors import CaptureError, CompileError, FrpcError

__all__ = ["StoppedError", "failure", "first_line", "itself", "pass_failure", "quiet_logs", "without_warnings"]


class StoppedError(Exception):
    """Carries an error of the model out of torch.export, which prints the graph traced so far where an error lets it.

    Attributes:
        error: what the model raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Suppresses PyTorch's log messages in this thread: the raised error says what matters about a failed capture."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    found = [logger for name, logger in logging.root.manager.loggerDict.items() if name.split(".")[0] == "torch"]
    handlers = {handler for logger in found if isinstance(logger, logging.Logger) for handler in logger.handlers}
    for handler in handlers:
        handler.addFilter(others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(others)


@contextmanager
def without_warnings(message: str) -> Iterator[None]:
    """Leaves out warnings that begin so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message)
        yield


def first_line(error: BaseException) -> str:
    """``RuntimeError: its first line``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def failure(model: nn.Module, call: Callable[[], Any], error: Exception, what: str = "torch.export cannot capture") -> FrpcError:
    """Returns the error to raise if capture failed: the model's own error if it raises one, else the reason and a hint.

    Args:
        model: the model.
        call: calls it on the example inputs.
        error: what was raised while it was captured.
        what: what failed; the model's name follows.
    """
    if isinstance(error, StoppedError):
        error = error.error
    if isinstance(error, FrpcError):
        return error
    if (own := itself(model, call)) is not None:
        return own
    name = type(model).__name__
    hint = next((hint for fits, hint in _HINTS if fits(_Symptoms(error))), _GENERAL)
    return CaptureError(f"{what} {name}: {first_line(error)}\n  at {_user_line(error)}\n  {hint}")


def itself(model: nn.Module, call: Callable[[], Any]) -> CaptureError | None:
    """Returns the error to raise if the model itself raises one; None if it does not."""
    try:
        with torch.enable_grad():  # a model may differentiate inside
            call()
    except Exception as own:
        return CaptureError(
            f"{type(model).__name__} itself raises an error on these inputs, before capture: {first_line(own)}\n"
            f"  at {_user_line(own)}"
        )
    return None


def pass_failure(name: str, error: Exception) -> CompileError:
    """Returns the error to raise if a pass failed: the pass, and the node and the user's line it was at."""
    at: fx.Node | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        at = node if isinstance(node, fx.Node) and node.op == "call_function" else at
    place = ""
    if at is not None:
        origin = origin_of(at)
        place = f"\n  at {at.target} in {origin.module or '(top level)'}   {origin.where}   {origin.source}"
    return CompileError(
        f"pass {name} failed: {first_line(error)}{place}\n"
        "  This is a bug in frpc. Write the line with other operators, or report it with the model."
    )


class _Symptoms:
    """What an error shows: its text, and the functions it came through."""

    def __init__(self, error: BaseException) -> None:
        self.text = f"{type(error).__name__}: {error}"
        self.frames: list[FrameType] = []
        seen: BaseException | None = error
        while seen is not None:
            self.frames += [frame for frame, _ in traceback.walk_tb(seen.__traceback__)]
            seen = seen.__cause__

    def inside(self, file: str) -> bool:
        """Says whether a function of a file, named by the end of its path, was running."""
        return any(file in frame.f_code.co_filename.replace("\\", "/") for frame in self.frames)

    def called(self, function: str) -> bool:
        return any(frame.f_code.co_name == function for frame in self.frames)

    def holds(self, variable: str) -> bool:
        return any(frame.f_locals.get(variable) is not None for frame in self.frames)

    def says(self, *words: str) -> bool:
        return any(word in self.text for word in words)


_GENERAL = (
    "Try: replace data-dependent Python branches and .item() by tensor operators (torch.where), keep numpy out of forward, and "
    "pass every varying quantity as an input."
)
_HINTS: tuple[tuple[Callable[[_Symptoms], bool], str], ...] = (
    (
        lambda seen: seen.inside("utils/rnn.py") or seen.holds("batch_sizes"),
        "Packed sequences have sizes that depend on the lengths: call frpc.recurrent.masked(layer, x, lengths) instead.",
    ),
    (
        lambda seen: seen.inside("torch/distributions/"),
        "torch.distributions checks the values of its arguments: pass validate_args=False to the distribution.",
    ),
    (
        lambda seen: seen.called("_detect_is_causal_mask"),
        "nn.Transformer looks at the values of a mask to find out whether it is causal: pass is_causal= (tgt_is_causal= "
        "and memory_is_causal= in a decoder), True or False.",
    ),
    (
        lambda seen: seen.says("__obj_flatten__", "PackedParams", "ScriptObject", "torch.classes"),
        "Quantized modules keep weights in a packed form that torch.export does not support: explain the floating-point model "
        "that was quantized.",
    ),
    (
        lambda seen: seen.says("torch.jit", "ScriptModule", "ScriptFunction", "RecursiveScriptModule"),
        "A part of the model is TorchScript, which torch.export does not support: use the module it was made from.",
    ),
    (
        lambda seen: seen.inside("_higher_order_ops/") or seen.says("HigherOrderOperator", "torch.cond"),
        "Operators that take functions (torch.cond, while_loop, map, scan) run code that depends on values: write the cases with "
        "torch.where, and loops of a fixed length in Python.",
    ),
    (
        lambda seen: seen.says("numpy", "array interface", "__array__"),
        "numpy does not work with tensors that have no values during capture: write this line with torch operators.",
    ),
    (
        lambda seen: seen.says("does not require grad", "requires_grad", "autograd.grad"),
        "The model computes gradients inside forward, which cannot be captured: explain the function it differentiates.",
    ),
    (
        lambda seen: seen.says("DataDependent", "data-dependent", "unbacked") and not seen.says("_is_all_true"),
        "Try: replace data-dependent Python branches and .item() by tensor operators (torch.where), and masks that choose "
        "elements (x[mask], nonzero) by a product with the mask. Masks that are buffers of the model may stay.",
    ),
)
"""Symptoms, and what to do about them; the first that matches is used."""


def _user_line(error: BaseException) -> str:
    """Names the innermost line outside PyTorch and the standard library, and quotes it."""
    ours = str(PurePath(__file__).parents[1])
    frames: list[traceback.FrameSummary] = []
    seen: BaseException | None = error
    while seen is not None:
        frames = [*frames, *traceback.extract_tb(seen.__traceback__)]
        seen = None if frames else seen.__cause__
    library = str(PurePath(traceback.__file__).parent)
    away = (torch.__path__[0], ours, "<")
    user = [f for f in frames if not f.filename.startswith(away)]
    user = [f for f in user if not f.filename.startswith(library) or "site-packages" in f.filename]
    if not user:
        return "(no line of yours is in the traceback)"
    return f"{user[-1].filename}:{user[-1].lineno}   {user[-1].line or ''}".rstrip()
