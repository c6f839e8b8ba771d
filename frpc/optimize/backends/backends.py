"""Backends: in which form a program runs on its device, and who runs it.

``aten`` is PyTorch's own operators, with oneDNN's packed convolutions on CPUs. ``triton`` puts the hot patterns of a program on a
CUDA device onto hand-written kernels. ``inductor`` gives the program to ``torch.compile``. ``auto`` takes kernels on CUDA devices
where they are available, else ``aten``, and reports the reason as a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from frpc.core.refusal import Refusal
from frpc.core.stages import copy_graph, run_passes
from frpc.core.torch_compat import OpOverload, trace_lock
from frpc.errors import OptionError
from frpc.optimize import lower
from frpc.optimize.backends.bound import Program, bound
from frpc.optimize.backends.cudagraphs import Replayed
from frpc.optimize.triton import lowering as kernel_lowering

__all__ = ["Backend", "BackendName", "Lowered", "Mode", "check_backend", "executable", "lower_program"]

BackendName = Literal["auto", "aten", "triton", "inductor"]
Mode = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Backend:
    """Who runs programs, and what for.

    Attributes:
        name: ``auto``, ``aten``, ``triton`` or ``inductor``.
        mode: ``latency`` makes a call short: on CUDA devices programs are replayed as CUDA graphs, one for each set of shapes;
            Inductor freezes weights into its code; on CPUs gates read the activation they belong to. ``throughput`` is for large
            batches, and calls of many shapes from many threads: they take no turns and hold no memory between them, and gates are
            kept as bytes.
    """

    name: BackendName = "auto"
    mode: Mode = "latency"


@dataclass(frozen=True)
class Lowered:
    """A program in the form that runs on its device.

    Attributes:
        program: the graph.
        passes: what was done to it, in order.
        refusals: what was not, and why.
        operators: operators that it may call in addition to ATen's.
    """

    program: fx.GraphModule
    passes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    operators: tuple[OpOverload, ...]


def check_backend(name: str, mode: str) -> Backend:
    """Returns the backend of that name and mode.

    Raises:
        OptionError: for any other name or mode.
    """
    for value, known, what in ((name, get_args(BackendName), "backend"), (mode, get_args(Mode), "mode")):
        if value not in known:
            raise OptionError(f"{what}={value!r} is unknown; choose one of {', '.join(known)}.")
    return Backend(name, mode)  # type: ignore[arg-type]


def lower_program(program: fx.GraphModule, backend: Backend) -> Lowered:
    """Converts a copy of a program into the form its backend runs; also returns the refusals.

    Raises:
        OptionError: for ``triton`` if kernels are not available; says why.
    """
    lowered = copy_graph(program)
    if backend.name == "inductor":
        return Lowered(lowered, (), (), ())
    reason = kernel_lowering.why_not(_device(program)) if backend.name in ("auto", "triton") else None
    if backend.name == "triton" and reason is not None:
        raise OptionError(f'backend="triton" is not available: {reason}. backend="auto" uses what is available.')
    if backend.name == "aten" or reason is not None:
        passes = lower.QUICK if backend.mode == "latency" else lower.PASSES
        found = [refusal for one in run_passes(passes, lowered) for refusal in one]
        said = [Refusal("hand-written kernels", "backend", reason)] if reason is not None and _has_cuda(program) else []
        return Lowered(lowered, tuple(p.__name__ for p in passes), (*said, *found), lower.OPERATORS)
    refused = kernel_lowering.use_kernels(lowered, _precision())
    lowered.graph.lint()
    return Lowered(lowered, ("use_kernels",), tuple(refused), kernel_lowering.operators())


def executable(lowered: fx.GraphModule, backend: Backend) -> Program:
    """Returns the function that runs a lowered program."""
    quick, on_cuda = backend.mode == "latency", _has_cuda(lowered)
    if backend.name == "inductor":
        return _Compiled(lowered, quick and not on_cuda, quick and on_cuda)
    plain = bound(lowered)
    return Replayed(plain) if quick and on_cuda else plain


class _Compiled:
    """A program that Inductor compiles at its first call, and again where sizes turn out to vary.

    Args:
        program: the graph.
        freezing: weights become constants of the compiled code, packed as its kernels want them.
        replay: CUDA graphs by Inductor's own means.
    """

    def __init__(self, program: fx.GraphModule, freezing: bool, replay: bool) -> None:
        options: dict[str, Any] = {"freezing": True} if freezing else {"triton.cudagraphs": True} if replay else {}
        self._run: Callable[..., Sequence[Tensor]] = torch.compile(program, backend="inductor", options=options)
        self._replay = replay

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        with torch.no_grad(), trace_lock:  # the first call, and calls with new sizes, compile
            found = self._run(*given)
            return [x.clone() for x in found] if self._replay else found  # a replay writes into the memory of the last


def _device(program: fx.GraphModule) -> torch.device:
    found = next(iter(program.buffers()), None)
    device: torch.device = program.graph.find_nodes(op="placeholder")[0].meta["val"].device if found is None else found.device
    return device


def _has_cuda(program: fx.GraphModule) -> bool:
    return _device(program).type == "cuda"


def _precision() -> str:
    """How kernels multiply float32: as PyTorch was told to, by ``torch.set_float32_matmul_precision``."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
