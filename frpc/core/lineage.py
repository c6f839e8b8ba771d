"""Lineage: how each tensor that a program holds came about from the model's own.

Passes compute tensors from tensors (a folded batch norm, a flipped kernel). While they run, every such call is noted, so that
the result can be computed again: from the same weights in another process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from frpc.core.torch_compat import OpOverload, TorchDispatchMode, schema_of

aten = torch.ops.aten

__all__ = ["Derived", "Ledger", "Lineage", "Literal", "Original"]


@dataclass(frozen=True, eq=False)
class Original:
    """A parameter or buffer of the model, by its name there."""

    name: str


@dataclass(frozen=True, eq=False)
class Literal:
    """A tensor that was made from none of the model's."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Derived:
    """The result of a call, or one of its results.

    Attributes:
        op: the operator.
        args, kwargs: its arguments, with lineages instead of tensors.
        item: which result; None if there is only one.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None


Lineage = Original | Literal | Derived

_SAME = (aten.detach.default, aten.alias.default)


class Ledger:
    """The lineages of tensors, kept as long as the tensors live."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def name(self, module: nn.Module) -> None:
        """Notes the buffers of a captured graph as the model's own."""
        for name, value in module.named_buffers():
            self._known[value] = Original(name)

    def copied(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Ledger:
        """Returns the ledger of copies, given with what they are copies of."""
        copied = Ledger()
        for old, new in pairs:
            if (found := self.lineage(old)) is not None:
                copied._known[new] = found
        return copied

    def lineage(self, value: Tensor) -> Lineage | None:
        """Where a tensor came from, or None for one that was never met."""
        found: Lineage | None = self._known.get(value)
        return found

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes every call on real tensors inside; fake ones pass."""
        with _Recorder(self):
            yield

    def note(self, op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Notes one call. A tensor that is written into loses its lineage: it is what it holds."""
        if schema_of(op).is_mutable:
            for written in (a for a in (*args, *kwargs.values()) if _is_real(a)):
                self._known.pop(written, None)
            return
        if op in _SAME:
            if (same := self.lineage(args[0])) is not None:
                self._known[result] = same
            return
        traced_args, traced_kwargs = self._traced(args), self._traced(dict(kwargs))
        results = list(enumerate(result)) if isinstance(result, tuple | list) else [(None, result)]
        for item, value in results:
            if _is_real(value):
                self._known[value] = Derived(op, traced_args, traced_kwargs, item)

    def _traced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.lineage(value) or Literal(value)
        if isinstance(value, list | tuple):
            return type(value)(self._traced(v) for v in value)
        return {k: self._traced(v) for k, v in value.items()} if isinstance(value, dict) else value


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        flat = [x for g in given for x in (g if isinstance(g, list | tuple) else [g]) if isinstance(x, Tensor)]
        if flat and all(_is_real(x) for x in flat):
            self.ledger.note(func, args, kwargs or {}, result)
        return result


def _is_real(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter)
