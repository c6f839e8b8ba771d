"""What autograd does not follow: ``detach()``, ``torch.no_grad()``, and functions that define their own backward.

``torch.export`` records what a model computes and not how autograd would differentiate it: in its graph ``detach`` is a copy, a
region under ``no_grad`` is like any other, and of a ``torch.autograd.Function`` only the forward is there. Gradient methods need
the rest. While a model is captured for them, :class:`Watching` puts a mark behind every value that autograd would stop at;
:func:`settle` turns the marks into ``aten.detach`` nodes with ``node.meta["stops"]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from frpc.core.torch_compat import forward_class, is_view, pytree, version_of
from frpc.errors import CaptureError

__all__ = ["Watching", "settle", "stopped_by", "watching"]

aten = torch.ops.aten

_WRITTEN = "written in place under torch.no_grad(): autograd uses the value from before the write"
_DETACHES = (torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]


@torch.library.custom_op("frpc::stop", mutates_args=())
def _stop(x: Tensor, reason: str) -> Tensor:
    """A copy that capture does not take for the value itself; ``reason`` is empty where the gradient is simply zero."""
    return x.clone()


@_stop.register_fake
def _stop_example(x: Tensor, reason: str) -> Tensor:
    return torch.empty_like(x)


class Watching(TorchFunctionMode):
    """Marks values that autograd does not look behind, while a model runs with gradients enabled.

    A marked value is a copy, while ``detach()`` shares memory: who writes into one that shares is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared: list[tuple[Tensor, int]] = []  # values that share memory in the model, and how often they were written to

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DETACHES:
            return self._marked(args[0], "", shares=True)
        if func in (torch.detach_, torch.Tensor.detach_):
            return args[0].copy_(self._marked(args[0], ""))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = [_version(t) for t in given]
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.view and any(isinstance(a, torch.dtype) for a in (*args, *(kwargs or {}).values())):
            return self._marked(out, "", shares=True)  # memory read as another type has no derivative
        written = [t for t, version in zip(given, before, strict=True) if _version(t) != version]
        if any(_version(t) != version for t, version in self.shared):
            raise CaptureError(
                "The model writes in place into a value that was detached, or is a view made under torch.no_grad(), so it "
                "changes two values at once. Gradient methods need separate values: use x.detach().clone()."
            )
        if torch.is_grad_enabled() or not given:
            return out
        function = _function_around(sys._getframe(1))
        reason = f"{function} has a backward of its own" if function else ""
        for t in written:
            t.copy_(self._marked(t, reason or _WRITTEN))
        return pytree.tree_map_only(
            Tensor, lambda t: t if any(t is g for g in given) else self._marked(t, reason, shares=is_view(t)), out
        )

    def _marked(self, value: Tensor, reason: str, shares: bool = False) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):  # autograd never follows those
            return value
        found: Tensor = _stop(value, reason)
        if shares:
            self.shared.extend((t, _version(t)) for t in (value, found))
        return found


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count."""
    return -1 if tensor.is_inference() else version_of(tensor)


def _function_around(frame: FrameType | None) -> str:
    """Names the ``torch.autograd.Function`` whose forward is running, empty if none is."""
    kinds = _forwards()
    while frame is not None:
        context = next((frame.f_locals.get(n) for n in frame.f_code.co_varnames[:1]), None)
        if isinstance(context, torch.autograd.function.BackwardCFunction):
            return forward_class(context).__name__
        if frame.f_code in kinds:
            return kinds[frame.f_code]
        frame = frame.f_back
    return ""


def _forwards() -> dict[CodeType, str]:
    """Returns the code of the forward of every ``torch.autograd.Function`` that keeps no context there, with its name."""
    found: dict[CodeType, str] = {}
    open_ = list(torch.autograd.Function.__subclasses__())
    while open_:
        kind = open_.pop()
        open_.extend(kind.__subclasses__())
        code = getattr(kind.forward, "__code__", None)
        if kind.setup_context is not torch.autograd.Function.setup_context and code is not None:
            found[code] = kind.__name__
    return found


@contextmanager
def watching(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Runs a model with marks at all calls inside, if gradients are needed; else without gradients.

    Hooks switch the marks on and off, so that what else capturing does goes without them.
    """
    if not wanted:
        with torch.no_grad():
            yield
        return
    mode = Watching()
    hooks = (
        model.register_forward_pre_hook(lambda module, given: _ignored(mode.__enter__()), prepend=True),
        model.register_forward_hook(lambda module, given, found: mode.__exit__(None, None, None), always_call=True),
    )
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _ignored(result: Any) -> None:
    """A hook that returns something would change what it is hooked to."""


def settle(graph: fx.Graph) -> None:
    """``frpc.stop(x) -> detach(x)``, with what the mark says in ``node.meta["stops"]``."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.frpc.stop.default):
        node.meta["stops"] = node.args[1]
        node.target, node.args, node.kwargs = aten.detach.default, node.args[:1], {}


def stopped_by(node: fx.Node) -> str | None:
    """Says why autograd stops at a node: empty if it gives zero, else what no rule can differentiate; None at other nodes."""
    found: str | None = node.meta.get("stops")
    return found
