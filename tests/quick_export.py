"""Takes from `torch.export` two things that it does again at every capture, the same each time; tests capture thousands of nets.

Making a captured graph functional, PyTorch puts some twenty kernels before each of five hundred operators, one by one in Python,
and takes them out again: a quarter of the time in which a small net is compiled. Here the kernels are those that PyTorch made
the first time, put in place as whole tables. It also looks through all operators once for every name space there is; once is
enough. What is not as it was the first time goes PyTorch's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._export import utils
from torch._subclasses import fake_impls
from torch.export import exported_program

Kernels = dict[Any, Callable[..., Any]]
Choices = dict[Any, Callable[..., Any]]

NAMES: tuple[tuple[Any, str], ...] = (
    (exported_program, "_override_composite_implicit_decomp"),
    (exported_program, "_collect_all_valid_cia_ops"),
    (utils, "_materialize_cpp_cia_ops"),
    (fake_impls, "op_implementations_dict"),
    (fake_impls, "register_op_impl"),
    (fake_impls, "_deregister_op_impl"),
)
missing = [name for module, name in NAMES if not hasattr(module, name)]
"""Private names that this release of PyTorch does not have: where there are any, nothing is taken from it."""

_override, _collect, _materialize = (getattr(module, name, None) for module, name in NAMES[:3])


@dataclass(frozen=True)
class Table:
    """What PyTorch had for one operator, and what it put there; `fake` is what it registered for fake tensors."""

    before: Kernels
    inside: Kernels
    fake: Callable[..., Any]


_seen: dict[Any, tuple[Callable[..., Any], Table]] = {}
taken = [0, 0]
"""How often tables were put in place, and how often PyTorch made them."""


def _is_as_seen(choices: Choices) -> bool:
    return all(
        (known := _seen.get(op)) is not None and known[0] is choice and known[1].before == op.py_kernels
        for op, choice in choices.items()
    )


@contextmanager
def overridden(choices: Choices) -> Iterator[None]:
    """Holds operators whole, or to what they are decomposed into, as PyTorch's function of this purpose does."""
    registered = {op for op in choices if op in fake_impls.op_implementations_dict}
    if registered or not _is_as_seen(choices):
        taken[1] += 1
        before = {op: dict(op.py_kernels) for op in choices}
        with _override(choices):
            for op, choice in choices.items():
                fake = fake_impls.op_implementations_dict.get(op)
                if op not in registered and fake is not None:
                    _seen[op] = choice, Table(before[op], dict(op.py_kernels), fake)
            yield
        return
    taken[0] += 1
    for op in choices:
        _put(op, _seen[op][1].inside)
        fake_impls.register_op_impl(op)(_seen[op][1].fake)
    try:
        yield
    finally:
        for op in choices:
            _put(op, _seen[op][1].before)
            fake_impls._deregister_op_impl(op)


def _put(op: Any, kernels: Kernels) -> None:
    op.py_kernels.clear()
    op.py_kernels.update(kernels)
    op._dispatch_cache.clear()


def _collected() -> set[Any]:
    """Every operator that may stay whole; C++'s are looked up for the first name space and not again for each other one."""
    _materialize()
    utils._materialize_cpp_cia_ops = lambda: None
    try:
        return _collect()
    finally:
        utils._materialize_cpp_cia_ops = _materialize


def install() -> None:
    """Has `torch.export` of this process work so."""
    if missing:
        return
    exported_program._override_composite_implicit_decomp = overridden
    exported_program._collect_all_valid_cia_ops = _collected
