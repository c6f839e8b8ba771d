"""From the tensors of compiled programs to a file's constants: stored, taken from the model, or computed again."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.lineage import Derived, Lineage, Literal, Original
from frpc.files.constants import Entry, Ref, called, computed, originals
from frpc.files.container import checksum
from frpc.files.operators import DTYPES, may_hold
from frpc.files.values import FaultError

__all__ = ["Gathered", "gather"]

_LAID_OUT, _TURNED, _SPREAD = "aten.clone.default", "aten.permute.default", "aten.expand.default"


class Gathered:
    """A file's constants.

    Attributes:
        entries: in the order they are computed.
        stored: tensors for the file.
        names: the constant of each program tensor, by its identity.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.stored: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}


def gather(
    tensors: Sequence[tuple[str, Tensor]], lineage: Callable[[Tensor], Lineage | None], model: Mapping[str, Tensor] | None
) -> Gathered:
    """Lays out the constants of programs.

    Every constant is computed once and compared with what the programs hold, bit by bit: one that would differ is stored.

    Args:
        tensors: names and tensors of all programs.
        lineage: how a tensor came about.
        model: the model's tensors by name, where the file is to refer to them; None to store weights.

    Raises:
        FaultError: a tensor of a type no file holds.
    """
    as_is: set[int] = set()
    for _ in range(2):
        found = _Gathering(tensors, lineage, model, as_is).run()
        values = computed(found.entries, originals(found.entries, found.stored, model), torch.device("cpu"))
        differing = {id(t) for _, t in tensors if not _same(values[found.names[id(t)]], t)}
        if not differing:
            break
        as_is |= differing
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu()
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and (torch.equal(one, other) or checksum(one) == checksum(other))  # a NaN equals nothing but its bytes


class _Gathering:
    def __init__(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        lineage: Callable[[Tensor], Lineage | None],
        model: Mapping[str, Tensor] | None,
        as_is: Collection[int],
    ) -> None:
        self.tensors, self.model, self.found = tensors, model, Gathered()
        self.lineages: dict[int, Lineage] = {
            id(t): Literal(t) if id(t) in as_is else (lineage(t) or Literal(t)) for _, t in tensors
        }
        self.numbers: dict[Any, int] = {}
        self.memo: dict[int, tuple[Lineage, int]] = {}
        self.examples: dict[str, Tensor] = {}
        self.placed: dict[int, str] = {}
        self.laid_out: dict[tuple[str, torch.memory_format], str] = {}
        self.values = {self.number(_bare(self.lineages[id(t)])): t for _, t in tensors}

    def run(self) -> Gathered:
        for name, tensor in self.tensors:
            if id(tensor) not in self.found.names:
                self.found.names[id(tensor)] = self._in_order(self.place(self.lineages[id(tensor)], name), tensor)
        return self.found

    def number(self, lineage: Lineage) -> int:
        """The same number for lineages of the same value."""
        if id(lineage) not in self.memo:
            self.memo[id(lineage)] = (lineage, self.numbers.setdefault(self._key(lineage), len(self.numbers)))
        return self.memo[id(lineage)][1]

    def _key(self, lineage: Lineage) -> Any:
        if isinstance(lineage, Original):
            return ("original", lineage.name)
        if isinstance(lineage, Literal):
            return ("literal", lineage.value.dtype, tuple(lineage.value.shape), checksum(lineage.value))
        return (lineage.op, self._shallow(lineage.args), self._shallow(lineage.kwargs), lineage.item)

    def _shallow(self, value: Any) -> Any:
        if isinstance(value, Original | Literal | Derived):
            return ("value", self.number(value))
        if isinstance(value, list | tuple):
            return tuple(self._shallow(v) for v in value)
        return tuple((k, self._shallow(v)) for k, v in value.items()) if isinstance(value, Mapping) else (type(value), value)

    def place(self, lineage: Lineage, hint: str) -> str:
        """Adds a constant and what it is computed from, unless there is one with the same value; returns its name."""
        number = self.number(lineage)
        if number not in self.placed:
            self.placed[number] = self._add(lineage, hint)
        return self.placed[number]

    def _add(self, lineage: Lineage, hint: str) -> str:
        if isinstance(lineage, Derived) and self._computable(lineage):
            return self._derive(str(lineage.op), lineage.args, lineage.kwargs, lineage.item, hint)
        if isinstance(lineage, Original) and self.model is not None and lineage.name in self.model:
            value = self.model[lineage.name]
            return self._enter(hint, value, model=lineage.name, sha256=checksum(value))
        value = lineage.value if isinstance(lineage, Literal) else self.values[self.number(_bare(lineage))]
        return self._store(value.detach(), hint)

    def _store(self, value: Tensor, hint: str) -> str:
        """Stores a tensor; one that lies in memory in another order of dimensions comes back in that order."""
        spread = [d for d in range(value.dim()) if value.stride()[d] == 0 and value.shape[d] > 1]
        if spread:  # the same elements again and again
            once = self._store(
                value[tuple(slice(0, 1) if d in spread else slice(None) for d in range(value.dim()))], f"{hint}_once"
            )
            return self._derive(_SPREAD, [Ref(once), list(value.shape)], {}, None, hint)
        order = sorted(range(value.dim()), key=lambda d: -value.stride()[d])
        turned = not value.is_contiguous() and value.permute(order).is_contiguous()
        name = self._enter(f"{hint}_turned" if turned else hint, value.permute(order) if turned else value.contiguous())
        self.found.stored[name] = self.examples[name]
        if not turned:
            return name
        return self._derive(_TURNED, [Ref(name), [order.index(d) for d in range(value.dim())]], {}, None, hint)

    def _computable(self, lineage: Derived) -> bool:
        """Says whether a value is computed when a file is read: with weights outside, from them; else from what is moved."""
        if self.model is not None:
            return may_hold(str(lineage.op), "constants") and all(
                self._reachable(a) for a in _flat((lineage.args, lineage.kwargs))
            )
        return may_hold(str(lineage.op), "layout") and self._reachable(lineage.args[0])

    def _reachable(self, lineage: Lineage) -> bool:
        """Says whether a value is available: it is a tensor of a program, or computed from such tensors."""
        if self.number(_bare(lineage)) in self.values or isinstance(lineage, Literal):
            return True
        if isinstance(lineage, Original):
            return self.model is not None and lineage.name in self.model
        return self._computable(lineage)

    def _derive(self, op: str, args: Any, kwargs: Mapping[str, Any], item: int | None, hint: str) -> str:
        placed = self._placed_arguments(args, hint), self._placed_arguments(dict(kwargs), hint)
        entry = Entry("", torch.bool, (), op=op, args=tuple(placed[0]), kwargs=placed[1], item=item)
        return self._enter(hint, called(entry, self.examples), op=op, args=entry.args, kwargs=entry.kwargs, item=item)

    def _placed_arguments(self, value: Any, hint: str) -> Any:
        if isinstance(value, Original | Literal | Derived):
            return Ref(self.place(value, value.name if isinstance(value, Original) else f"{hint}_of"))
        if isinstance(value, list | tuple):
            return [self._placed_arguments(v, hint) for v in value]
        return {k: self._placed_arguments(v, hint) for k, v in value.items()} if isinstance(value, dict) else value

    def _enter(self, hint: str, value: Tensor, **parts: Any) -> str:
        if value.dtype not in DTYPES.values():
            raise FaultError(f"{hint} is a tensor of {value.dtype}")
        name = base = re.sub(r"\W", "_", hint)
        count = 0
        while name in self.examples:
            count += 1
            name = f"{base}_{count}"
        self.examples[name] = value
        self.found.entries.append(Entry(name, value.dtype, tuple(value.shape), **parts))
        return name

    def _in_order(self, name: str, tensor: Tensor) -> str:
        """Lays a constant out in channels-last order where the program's tensor is."""
        for memory_format in (torch.channels_last, torch.channels_last_3d):
            fits = tensor.dim() == (4 if memory_format is torch.channels_last else 5)
            if fits and tensor.is_contiguous(memory_format=memory_format) and self.examples[name].stride() != tensor.stride():
                if (name, memory_format) not in self.laid_out:
                    kwargs = {"memory_format": memory_format}
                    derived = self._derive(_LAID_OUT, [Ref(name)], kwargs, None, f"{name}_laid_out")
                    self.laid_out[name, memory_format] = derived
                return self.laid_out[name, memory_format]
        return name


def _bare(lineage: Lineage) -> Lineage:
    """What a lineage is a copy of."""
    while isinstance(lineage, Derived) and str(lineage.op) == _LAID_OUT:
        lineage = lineage.args[0]
    return lineage


def _flat(value: Any) -> list[Lineage]:
    if isinstance(value, Original | Literal | Derived):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [x for part in parts for x in _flat(part)]
