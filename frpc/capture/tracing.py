"""The module that torch.export sees: it takes only tensors, and returns the explained output and every module's results."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from frpc.capture.known import Known
from frpc.core.graph import Returned, entry_names
from frpc.core.reasons import StoppedError
from frpc.core.torch_compat import pytree
from frpc.core.values import is_transformed
from frpc.errors import OptionError

__all__ = ["Traced", "explained_output", "returned_by", "tensors_by_name"]


class Traced(nn.Module):
    """A model as torch.export sees it.

    It returns the explained tensor, then a copy of every floating-point tensor that its modules returned, in order. The copies
    are taken when a module returns: what is written into its result later does not reach them.

    Attributes:
        model: the model.
        returned: what each copy is, call by call, once it was traced.
        decisive: names of the tensors of the model whose values shaped the trace, see :class:`frpc.capture.known.Known`.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], output: str | int | None) -> None:
        super().__init__()
        self.model = model
        self.names, self._output = tuple(names), output
        self._notes = _Notes(model)

    @property
    def returned(self) -> list[Returned]:
        return self._notes.returned

    @property
    def decisive(self) -> set[str]:
        return self._notes.decisive

    def called(self, tensors: Sequence[Tensor]) -> Any:
        """What the model returns for inputs."""
        return self.model(**dict(zip(self.names, tensors, strict=True))) if self.names else self.model(*tensors)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        known = Known(dict(tensors_by_name(self.model)), self._notes.real)
        try:
            with self._notes.taken() as copies, known:
                result = self.called(tensors)
            explained = explained_output(result, self._output)
        except Exception as error:
            raise StoppedError(error) from error
        self._notes.decisive = known.decisive
        return (explained, *copies)


class _Notes:
    """Records what modules return; a separate object, since torch.export watches the module's attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.returned: list[Returned] = []
        self.decisive: set[str] = set()
        self.real = dict(tensors_by_name(model))
        self._model = model
        self._paths: dict[int, tuple[str, ...]] = {}
        for path, part in model.named_modules(remove_duplicate=False):
            self._paths[_key(part)] = (*self._paths.get(_key(part), ()), path)

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Copies what modules return inside this context, in this thread."""
        thread, self.returned = threading.get_ident(), []
        copies: list[Tensor] = []
        running: list[tuple[int, int]] = []  # modules that were called and have not returned, and the order of their calls
        begun = count()

        def elsewhere() -> bool:  # the body of a higher-order operator is no part of this graph
            return torch.compiler.is_dynamo_compiling() or threading.get_ident() != thread

        def begin(part: nn.Module, args: Any) -> None:
            if not elsewhere():
                running.append((_key(part), next(begun)))

        def note(part: nn.Module, args: Any, result: Any) -> None:
            if elsewhere():
                return
            order = next(begun)
            while running and (last := running.pop())[0] != _key(part):
                pass  # one that raised, and was caught
            order = last[1] if last[0] == _key(part) else order
            found = [(suffix, x) for suffix, x in _entries(result) if not is_transformed(x)]
            copies.extend(torch.ops.aten.clone.default(x) for _, x in found)
            suffixes = tuple(suffix for suffix, _ in found)
            self.returned.append(Returned(self._paths[_key(part)], order, suffixes, _main(suffixes)))

        parts = [part for part in self._model.modules() if part is not self._model]
        handles = [
            handle
            for part in parts
            if not isinstance(part, torch.jit.ScriptModule)
            for handle in (part.register_forward_pre_hook(begin, prepend=True), part.register_forward_hook(note))
        ]
        try:
            yield copies
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def returned_by(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects by name what a model's modules return while it runs inside; those with several paths are left out.

    The dictionary is filled when the block ends.
    """
    notes, found = _Notes(model), dict[str, Tensor]()
    with notes.taken() as copies:
        yield found
    calls = [(call.paths[0], call) for call in notes.returned]
    feed = iter(copies)
    for (_, call), named in zip(calls, entry_names(calls), strict=True):
        for these in named:
            value = next(feed)
            found.update(dict.fromkeys(these if len(call.paths) == 1 else [], value))


def _key(part: nn.Module) -> int:
    """A key that identifies a module; torch.export's stand-ins share the attributes of the originals."""
    return id(part.__dict__)


def tensors_by_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names all parameters and buffers; one that has several names comes with each."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _entries(result: Any, suffix: str = "") -> list[tuple[str, Tensor]]:
    """Lists the floating-point tensors of a result, and how each is reached: ``[0]``, ``['logits']``.

    They are looked for in tuples, lists, mappings and dataclasses; other objects (caches) are left out.
    """
    if isinstance(result, Tensor):
        return [(suffix, result)] if result.is_floating_point() or result.is_complex() else []
    return [entry for key, value in _parts(result) for entry in _entries(value, f"{suffix}[{key!r}]")]


def _parts(result: Any) -> list[tuple[Any, Any]]:
    if isinstance(result, Mapping):
        return list(result.items())
    if isinstance(result, tuple | list):
        return list(enumerate(result))
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [(field.name, getattr(result, field.name)) for field in dataclasses.fields(result)]
    return []


def _main(suffixes: Sequence[str]) -> int | None:
    """The entry that a module's name means: the only one, or the first of a tuple or list."""
    if len(suffixes) == 1 or (suffixes and suffixes[0] == "[0]"):
        return 0
    return None


def explained_output(result: Any, output: str | int | None) -> Tensor:
    """Picks the tensor to explain: the one named by ``output``, else ``logits``, else the only floating-point one.

    Raises:
        OptionError: if there is no such tensor, or several are possible.
    """
    if output is not None:
        chosen = _entry(result, output)
        if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
            raise OptionError(f"output={output!r} is not a floating-point tensor of the model's result ({_outline(result)}).")
        return chosen
    logits = dict(_parts(result)).get("logits") if not isinstance(result, tuple | list) else getattr(result, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    found = [x for _, x in _entries(result)]
    floating = [x for x in found if x.is_floating_point()]
    if found and not floating:
        raise OptionError("The model's output is complex, but relevance is defined for real numbers: return z.abs(), or z.real.")
    if len(floating) != 1:
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        raise OptionError(f"The model returns {len(tensors)} tensors ({_outline(result)}): say which to explain with output=.")
    return floating[0]


def _entry(result: Any, output: str | int) -> Any:
    try:
        return getattr(result, output) if isinstance(output, str) and hasattr(result, output) else result[output]
    except (KeyError, IndexError, TypeError) as error:
        raise OptionError(f"The model's result has no entry {output!r}: {_outline(result)}.") from error


def _outline(result: Any) -> str:
    if isinstance(result, Mapping):
        return "a dict with " + ", ".join(map(repr, result))
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)}"
    return f"a {type(result).__name__}"
