"""Stages of a compilation: graphs that are copied, changed by passes in order, timed and kept for printing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from frpc.core.lineage import Ledger
from frpc.core.reasons import pass_failure
from frpc.core.torch_compat import buffers_of, submodules_of
from frpc.errors import CompileError, FrpcError

__all__ = ["Clock", "Stage", "copy_graph", "named", "run_passes"]


@dataclass(frozen=True)
class Stage:
    """One stage of a compilation.

    Attributes:
        name: ``capture``, ``canonicalize``, ...
        seconds: wall time.
        passes: the passes that changed something.
        program: what came out: a runnable graph, or a printable record.
    """

    name: str
    seconds: float
    passes: tuple[str, ...]
    program: Any


class Clock:
    """Records stages with the time since the last one."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.last = time.perf_counter()

    def note(self, name: str, program: Any, passes: tuple[str, ...] = ()) -> None:
        now = time.perf_counter()
        self.stages.append(Stage(name, now - self.last, passes, program))
        self.last = now


def copy_graph(graph_module: fx.GraphModule, root: nn.Module | None = None) -> fx.GraphModule:
    """Copies a graph; its tensors are shared (the earlier stage stays printable and runnable), or those of ``root``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    graph.output(result)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    fresh = nn.Module()
    source = root or graph_module
    for name, part in submodules_of(source).items():
        fresh.add_module(name, part)
    for name, value in buffers_of(source).items():
        fresh.register_buffer(name, value)
    return fx.GraphModule(fresh, graph, class_name=type(graph_module).__name__)


def run_passes(
    passes: Sequence[Callable[[fx.GraphModule], Any]], graph_module: fx.GraphModule, ledger: Ledger | None = None
) -> list[Any]:
    """Runs passes and lints what each leaves; a broken graph is reported with the pass's name. Returns their results."""
    results = []
    for one_pass in passes:
        with nullcontext() if ledger is None else ledger.recording():
            try:
                results.append(one_pass(graph_module))
            except FrpcError:
                raise
            except Exception as error:
                raise pass_failure(one_pass.__name__, error) from error
        try:
            graph_module.graph.lint()
        except RuntimeError as error:
            raise CompileError(f"pass {one_pass.__name__} left a broken graph: {error}") from error
    graph_module.recompile()
    return results


def named(passes: Sequence[Callable[[fx.GraphModule], bool]], changed: Sequence[bool]) -> tuple[str, ...]:
    """Names the passes that changed something."""
    return tuple(p.__name__ for p, did in zip(passes, changed, strict=True) if did)
