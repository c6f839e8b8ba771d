"""The one door to what PyTorch keeps private: every such name, where it was seen, and what frpc does with it.

Private names move and vanish from one release to the next. No other file of frpc imports or touches one; a test reads the sources
for that, and another looks up every name of :data:`PRIVATE`, so that a release without it is found by name. Operators
(``torch.ops.aten._softmax``) are no private names, whatever they are called: graphs of ``torch.export`` hold them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "PRIVATE",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "Private",
    "SubgraphMatcher",
    "TorchDispatchMode",
    "WeakTensorKeyDictionary",
    "aoti_compile",
    "aoti_load",
    "assert_async",
    "buffers_of",
    "builtin_of",
    "called_apart",
    "copied_by",
    "enable_python_dispatcher",
    "expression_of",
    "fake_mode_of",
    "fixed_size",
    "flat_weights",
    "forward_class",
    "get_decompositions",
    "has_autocast_kernel",
    "has_composite_kernel",
    "hint_of",
    "in_dispatch_mode",
    "is_batched",
    "is_composite",
    "is_fake",
    "is_view",
    "is_wrapped",
    "make_fx",
    "outside_the_trace",
    "overload_name",
    "pytree",
    "schema_of",
    "shape_env",
    "storage_of",
    "submodules_of",
    "symbolic",
    "trace_lock",
    "traced_graph",
    "unset_fake_temporarily",
    "unwrapped",
    "version_of",
]

SEEN = "2.13.0, 2.14.1, 2.15.0"  # pyproject.toml allows no others; docs/index.md has what was run


@dataclass(frozen=True)
class Private:
    """One private name.

    Attributes:
        name: dotted, from ``torch`` on; an attribute of objects stands behind one of them, or behind its class.
        used_for: what frpc does with it.
        seen: the releases with which frpc's tests passed.
    """

    name: str
    used_for: str
    seen: str = SEEN


PRIVATE = (
    Private("torch._ops.OpOverload", "operators in graphs, and keys of the tables of rules"),
    Private("torch._ops.OpOverloadPacket", "an operator with all its overloads, in what users ask for"),
    Private("torch._ops.HigherOrderOperator", "operators that take functions, like torch.cond"),
    Private("torch.ops.aten.relu.default._op_dk", "calls the operators that one is made of"),
    Private("torch._C._DisablePythonDispatcher", "calls the operators that one is made of, though it is to stay whole"),
    Private("torch._C.DisableTorchFunction", "computes what is known beside a trace"),
    Private("torch.utils._python_dispatch._disable_current_modes", "computes what is known beside a trace"),
    Private("torch.fx.experimental.sym_node.SymNode.maybe_as_int", "has an operator fixed the batch size?"),
    Private("torch.ops.aten.relu.default._schema", "names, types and aliasing of an operator's arguments and results"),
    Private("torch.ops.aten.relu.default._overloadname", "finds the form of an operator that does not write in place"),
    Private("torch.ops.aten.relu.default._op", "calls an operator with less of Python in between"),
    Private("torch.ops.aten.relu.default.has_kernel_for_dispatch_key", "is an operator made of others?"),
    Private("torch._C.DispatchKey.CompositeImplicitAutograd", "is an operator made of others?"),
    Private("torch._C._dispatch_has_kernel_for_dispatch_key", "is an operator made of others, in C++?"),
    Private("torch._decomp.get_decompositions", "an operator in terms of others"),
    Private("torch._dispatch.python.enable_python_dispatcher", "keeps C++ from fixing a symbolic size at its example"),
    Private("torch._subclasses.fake_tensor.FakeTensorMode", "shapes and types of values that are not computed"),
    Private("torch._subclasses.fake_tensor.FakeTensor.fake_mode", "the mode an example value lives in"),
    Private("torch._subclasses.fake_tensor.unset_fake_temporarily", "a real tensor made while a program is traced"),
    Private("torch.fx.experimental.symbolic_shapes.ShapeEnv", "free sizes of a program that is read from a file"),
    Private("torch.fx.experimental.symbolic_shapes.DimDynamic", "the number of targets stays free in a program"),
    Private("torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext", "the number of targets stays free in a program"),
    Private("torch._dynamo.source.LocalSource", "names the number of targets in messages of PyTorch's"),
    Private("torch.fx.experimental.sym_node.SymNode.expr", "a free size as a formula of sympy's"),
    Private("torch.fx.experimental.sym_node.SymNode.hint", "the size of the example where a size is free"),
    Private("torch.fx.experimental.proxy_tensor.make_fx", "traces programs"),
    Private("torch.fx.experimental.proxy_tensor.get_proxy_mode", "the graph that is being traced"),
    Private("torch.fx.passes.utils.matcher_utils.SubgraphMatcher", "finds what a graph spells out", "2.14.1"),
    Private("torch.utils._pytree", "tensors inside lists, tuples and dictionaries of arguments and outputs"),
    Private("torch.utils._python_dispatch.TorchDispatchMode", "sees every operator that runs"),
    Private("torch.utils._python_dispatch._get_current_dispatch_mode_stack", "is this thread being traced?"),
    Private("torch._C._functorch.is_functorch_wrapped_tensor", "is a tensor one sample of vmap's, or inside another transform?"),
    Private("torch._C._functorch.is_batchedtensor", "is a tensor one sample of vmap's?"),
    Private("torch._C._functorch.get_unwrapped", "the tensor of all samples behind it"),
    Private("torch._assert_async", "a condition that a compiled program checks when it runs"),
    Private("torch._inductor.aoti_compile_and_package", "AOTInductor files"),
    Private("torch._inductor.aoti_load_package", "AOTInductor files"),
    Private("torch.Tensor._version", "has a weight been written to?"),
    Private("torch.Tensor._is_view", "does a result share memory with an operand?"),
    Private("torch._C.StorageBase._cdata", "do two tensors share memory?"),
    Private("torch.autograd.function.BackwardCFunction._forward_cls", "names the function whose forward is running"),
    Private("torch.nn.Module._modules", "parts of a module, twice where they have two names"),
    Private("torch.nn.Module._buffers", "buffers of one module alone"),
    Private("torch.nn.Module._apply", "moves a module as .to() does; explainers have one of their own"),
    Private("torch.nn.Module._load_from_state_dict", "explainers have one of their own"),
    Private("torch.nn.RNNBase._flat_weights", "a recurrent layer's weights in the order its operator takes them"),
)

_functorch = torch._C._functorch
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


# ---- operators --------------------------------------------------------------------------------------------------


def schema_of(op: Any) -> Any:
    """Returns an operator's signature: names, types, defaults and aliasing of arguments and results."""
    return op._schema


def overload_name(op: OpOverload) -> str:
    """Returns what stands behind the dot of an operator's name: ``Tensor`` of ``aten.add.Tensor``."""
    return op._overloadname


def builtin_of(op: OpOverload) -> Callable[..., Any]:
    """Returns the C++ function behind an operator: the same results, sooner."""
    return op._op


def is_composite(op: OpOverload) -> bool:
    """Says whether PyTorch defines an operator as a composition of others, in C++ or in Python."""
    return bool(op.has_kernel_for_dispatch_key(_COMPOSITE))


def has_composite_kernel(op: OpOverload) -> bool:
    """Says whether PyTorch defines an operator as a composition of others in C++."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def has_autocast_kernel(op: OpOverload, device: str) -> bool:
    """Says whether autocast knows what to cast for an operator on a kind of device."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), f"Autocast{device.upper()}"))


def called_apart(op: OpOverload, args: Any, kwargs: Any) -> Any:
    """Calls the operators that an operator is made of, also where ``torch.export`` has it stay whole."""
    with torch._C._DisablePythonDispatcher():
        return op._op_dk(_COMPOSITE, *args, **kwargs)


# ---- turns ------------------------------------------------------------------------------------------------------

# While one thread exports, PyTorch keeps the trace where all threads see it: whatever another thread asks of a free size is
# written into that trace, or raises since the size is not in it. Whoever captures, compiles or touches free sizes holds this.
trace_lock = threading.RLock()


# ---- example values and free sizes ------------------------------------------------------------------------------


def fake_mode_of(value: Any) -> FakeTensorMode:
    """Returns the mode an example value lives in."""
    return value.fake_mode


def is_fake(tensor: Tensor) -> bool:
    """Says whether a tensor is an example value, which has a shape and no numbers."""
    return hasattr(tensor, "fake_mode")


def shape_env() -> Any:
    """Returns a new environment for free sizes."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # loads sympy

    return ShapeEnv()


def expression_of(size: torch.SymInt) -> Any:
    """Returns a free size as a formula of sympy's."""
    return size.node.expr


def hint_of(size: torch.SymInt) -> Any:
    """Returns the example's number where a size is free; None where no example decided it."""
    return size.node.hint


def fixed_size(size: Any) -> int | None:
    """Returns the number that a size is, or None where it is free."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)


def symbolic(mode: FakeTensorMode, shape: Sequence[int], name: str, free: Sequence[bool]) -> Tensor:
    """Returns an example value in a mode, some sizes of which are free.

    Args:
        mode: where it lives.
        shape: the example's sizes.
        name: of the value, in PyTorch's messages.
        free: for each size, whether it is.
    """
    from torch._dynamo.source import LocalSource  # loads all of Dynamo: seconds that a first look need not pay
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC if f else DimDynamic.STATIC for f in free])
    with unset_fake_temporarily():
        like = torch.empty(*shape)
    return mode.from_tensor(like, source=LocalSource(name), symbolic_context=context)


def traced_graph() -> fx.Graph:
    """Returns the graph that is being traced."""
    mode = get_proxy_mode()
    assert mode is not None
    graph: fx.Graph = mode.tracer.graph
    return graph


# ---- what is going on in this thread ----------------------------------------------------------------------------


def in_dispatch_mode() -> bool:
    """Says whether something sees every operator that this thread runs."""
    return bool(_get_current_dispatch_mode_stack())


@contextmanager
def outside_the_trace() -> Iterator[None]:
    """Computes with real tensors inside, as if nothing traced this thread."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
        yield


def assert_async(condition: Tensor, message: str) -> None:
    """Raises ``RuntimeError`` with ``message`` where a condition does not hold; inside a compiled program, when it runs."""
    torch._assert_async(condition, message)


# ---- transforms of torch.func -----------------------------------------------------------------------------------


def is_wrapped(tensor: Tensor) -> bool:
    """Says whether a transform of ``torch.func`` shows something through this tensor."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Says whether ``torch.func.vmap`` shows one of several samples through this tensor."""
    return bool(_functorch.is_batchedtensor(tensor))


def unwrapped(tensor: Tensor) -> Tensor:
    """Returns the tensor behind one that a transform shows something through."""
    found: Tensor = _functorch.get_unwrapped(tensor)
    return found


# ---- tensors and modules ----------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int:
    """Returns how often a tensor has been written to; not what was written through ``.data``."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Says whether a tensor was made as a view of another."""
    return tensor._is_view()


def storage_of(tensor: Tensor) -> int:
    """Returns a number that two tensors have in common where they share memory."""
    return tensor.untyped_storage()._cdata


def forward_class(context: Any) -> type:
    """Returns the ``torch.autograd.Function`` to whose call a context belongs."""
    kind: type = context._forward_cls
    return kind


def submodules_of(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Returns a module's own parts by name, also those that have two names."""
    return module._modules


def buffers_of(module: nn.Module) -> Mapping[str, Tensor | None]:
    """Returns a module's own buffers by name, without those of its parts."""
    return module._buffers


def copied_by(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Changes a module's tensors as ``.to()`` does, and returns it."""
    return module._apply(change)


def flat_weights(layer: nn.RNNBase) -> list[Tensor]:
    """Returns the weights of a recurrent layer in the order in which its operator takes them."""
    found: Any = layer._flat_weights
    return list(found)


# ---- AOTInductor ------------------------------------------------------------------------------------------------


def aoti_compile(program: torch.export.ExportedProgram, path: str, settings: dict[str, Any]) -> None:
    """Compiles an exported program into a package at ``path``."""
    with trace_lock:
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


def aoti_load(path: str) -> Any:
    """Opens a package for running."""
    return torch._inductor.aoti_load_package(path)
