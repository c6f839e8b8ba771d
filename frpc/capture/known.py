"""Values that are known while a model is traced: what follows from its parameters, buffers and literals alone.

Tracing runs a model on tensors without values, so ``x[:, self.mask]`` has a result of unknown size and ``if self.flag:`` cannot
be decided, though both are fixed by the model. Here such values are computed beside the trace. A mask becomes the indices it
stands for, a condition its answer; everything else is traced as it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from frpc.core.torch_compat import WeakTensorKeyDictionary, is_fake, outside_the_trace, pytree, storage_of, version_of
from frpc.core.values import is_transformed

__all__ = ["Known"]

_LARGEST = 2**24  # elements of a value that is still computed beside the trace

_MAKERS = {"arange", "as_tensor", "eye", "from_numpy", "full", "linspace", "logspace", "ones", "range", "scalar_tensor", "tensor"}
_MAKERS |= {"tril_indices", "triu_indices", "zeros"}  # which make tensors of numbers; those of noise or of nothing are left out
_NOISE = ("bernoulli", "dropout", "empty", "gumbel", "multinomial", "normal_", "poisson", "rand", "rrelu", "uniform")
_NOISE_NAMES = {"normal", "multi_head_attention_forward", "scaled_dot_product_attention"}

_ANSWERS = {
    "__array__",
    "__bool__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "allclose",
    "equal",
    "is_nonzero",
    "item",
    "numpy",
    "tolist",
}
_SIZED_BY_VALUES = {
    "argwhere",
    "bincount",
    "combinations",
    "masked_select",
    "nonzero",
    "one_hot",
    "repeat_interleave",
    "unique",
    "unique_consecutive",
    "unique_consecutive_impl",
    "unique_impl",
    "where",
}
_INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}
_TAKES_NUMBERS = {"__getitem__", "__setitem__"}  # the others take tensors alone


class Known(TorchFunctionMode):
    """Computes known values during the trace, and provides them where the trace needs values.

    Attributes:
        decisive: names of the module's tensors whose values shaped the trace: with others it would be another graph.
    """

    def __init__(self, traced: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> None:
        """Takes a module's tensors by name, as the trace sees them and with their values."""
        super().__init__()
        self.decisive: set[str] = set()
        self._real = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._changed: dict[int, Any] = {}  # storages that hold what is not known any more
        for name, value in traced.items():
            if name in real:
                self._real[value], self._names[value] = real[name], frozenset((name,))
        self._own = {storage_of(value) for value in real.values()}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        complete = _gives_the_same(name, tensors, args, kwargs) and all(self._knows(x) for x in tensors)
        if name == "__iter__" and complete:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        if complete and tensors and (name in _ANSWERS or (name in _SIZED_BY_VALUES and _is_sized_by_values(name, args, kwargs))):
            return self._answer(func, args, kwargs, tensors)
        func, args, kwargs = self._without_masks(name, func, args, kwargs)
        counted = [x for x in tensors if not x.is_inference()]  # which alone tell whether they were written into
        before = [version_of(x) for x in counted]
        result = func(*args, **kwargs)
        written = [x for x, version in zip(counted, before, strict=True) if version_of(x) != version]
        self._follow(func, args, kwargs, tensors, written, result, complete)
        return result

    # ---- what is known ------------------------------------------------------------------------------------------------

    def _knows(self, x: Tensor) -> bool:
        found = self._value(x)
        return found is not None and found.numel() <= _LARGEST and storage_of(found) not in self._changed

    def _value(self, x: Tensor) -> Tensor | None:
        if x.is_inference():
            return None
        if x in self._real:
            found: Tensor = self._real[x]
            return found
        literal = type(x) in (Tensor, nn.Parameter) and not is_transformed(x)  # or an attribute that is no buffer
        return x if literal else None

    def _sources(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._names.get(x, frozenset()) for x in tensors))

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function on the values, outside the trace."""
        real = pytree.tree_map_only(Tensor, self._value, (args, kwargs))
        with outside_the_trace():
            return func(*real[0], **real[1])

    def _answer(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What a function of known values returns; tensors become literals of the trace."""
        self.decisive |= self._sources(tensors)
        return self._compute(func, args, kwargs)

    def _follow(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], written: list[Tensor], result: Any, complete: bool
    ) -> None:
        """Computes the result of a call, or notes that a value it wrote into is no longer known."""
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        values = [value for x in written if (value := self._value(x)) is not None]
        small = all(_has_numbers_for_sizes(x) and x.numel() <= _LARGEST for x in results)
        if not complete or not small or any(x not in self._real or storage_of(self._real[x]) in self._own for x in written):
            self._changed |= {storage_of(value): value.untyped_storage() for value in values}
            if small and (filled := _filled(func, args, kwargs)) is not None:
                kind = {"dtype": result.dtype, "device": result.device}
                self._real[result] = self._compute(torch.full, (tuple(result.shape), filled), kind)
            return
        if not results and not written:
            return
        real = [leaf for leaf in pytree.tree_leaves(self._compute(func, args, kwargs)) if isinstance(leaf, Tensor)]
        names = self._sources(tensors)
        for x, value in zip(results, real, strict=True):
            if is_fake(x) and x not in self._real:
                self._real[x] = value
        for x in (*results, *written):
            self._names[x] = names

    # ---- masks become indices -------------------------------------------------------------------------------------------

    def _without_masks(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Writes known masks and counts of a call as the indices of what they take."""
        if name in _INDEXED and len(args) > 1:
            index = args[1]
            if isinstance(index, list) and not any(isinstance(entry, Tensor) for entry in index):
                return func, args, kwargs  # numbers in a list are one index
            entries = index if isinstance(index, tuple | list) else (index,)
            numbers = name in _TAKES_NUMBERS
            return func, (args[0], tuple(new for entry in entries for new in self._indices(entry, numbers)), *args[2:]), kwargs
        if name == "repeat_interleave":
            given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
            repeats, dim = given.get("repeats"), given.get("dim")
            if isinstance(repeats, Tensor) and dim is not None and repeats.numel() > 1 and self._knows(repeats):
                taken = self._answer(torch.repeat_interleave, (repeats,), {}, [repeats])
                return torch.index_select, (given.get("input", given.get("self")), dim, taken), {}
        return func, args, kwargs

    def _indices(self, entry: Any, numbers: bool) -> list[Any]:
        """What an entry of an index becomes: a mask one index for each of its dimensions, a known number an int if those fit."""
        if isinstance(entry, slice):
            ends = [self._number(end) for end in (entry.start, entry.stop, entry.step)]
            return [slice(*ends)]
        if not isinstance(entry, Tensor) or not self._knows(entry):
            return [entry]
        if entry.dtype in (torch.bool, torch.uint8) and entry.dim() > 0:
            self.decisive |= self._sources([entry])
            return list(self._compute(lambda mask: mask.nonzero(as_tuple=True), (entry,), {}))
        return [self._number(entry) if numbers else entry]

    def _number(self, value: Any) -> Any:
        """A known integer tensor without dimensions as an int."""
        if not isinstance(value, Tensor) or value.dim() or value.dtype.is_floating_point or value.dtype is torch.bool:
            return value
        return self._answer(Tensor.item, (value,), {}, [value]) if self._knows(value) else value


def _gives_the_same(name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Says whether a call gives the same numbers every time: it draws none, and no size in it depends on the batch."""
    if name in _NOISE_NAMES or any(part in name for part in _NOISE):
        return False
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    if any(isinstance(leaf, symbolic) for leaf in pytree.tree_leaves((args, kwargs))):
        return False
    return bool(tensors) or name in _MAKERS


def _is_sized_by_values(name: str, args: Any, kwargs: Any) -> bool:
    return name != "where" or len(args) + len(kwargs) == 1  # with three arguments it chooses element by element


def _has_numbers_for_sizes(x: Tensor) -> bool:
    return all(isinstance(size, int) for size in x.shape)


def _filled(func: Any, args: Any, kwargs: Any) -> Any:
    """The number that a call fills a tensor with whose size and type are those of another."""
    name = getattr(func, "__name__", "")
    given = [*args, *kwargs.values()]
    numbers: dict[str, Any] = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
    if name in ("full_like", "new_full"):
        numbers[name] = kwargs.get("fill_value", args[-1])
    found = numbers.get(name)
    return found if given and isinstance(found, int | float) else None
