"""Programs replayed as CUDA graphs: a call is one launch, whatever the number of kernels in it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.optimize.backends.bound import Program

__all__ = ["Replayed"]

WARM_UP = 3  # calls before recording: kernels are tuned, libraries take their workspaces
KEPT = 8  # recordings; each holds the memory of one run


@dataclass(frozen=True, eq=False)
class _Recording:
    """A recorded program with the memory that it reads and writes.

    Attributes:
        graph: the CUDA graph.
        given, results: its memory.
        free: the event after which that memory may be written again. A call returns once its work is queued, on the stream of
            its caller: a call on another stream has to wait for this event there, whatever lock it holds here.
    """

    graph: Any
    given: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    free: Any

    def replay(self, given: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream()
        stream.wait_event(self.free)
        for place, value in zip(self.given, given, strict=True):
            place.copy_(value)
        self.graph.replay()
        copies = [result.clone() for result in self.results]
        self.free.record(stream)
        return copies


class Replayed:
    """A program recorded once for each set of shapes; each recording has separate memory.

    Threads take turns to queue a run, and streams wait on the device for the run before: what one reads no other overwrites.

    Shapes beyond the last :data:`KEPT` push the oldest recording out.

    Args:
        program: does the same operations for the same shapes, and asks nothing of the device.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._turns = threading.Lock()

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            return self._program(*given)  # part of the caller's own recording
        key = tuple((x.shape, x.dtype, x.device) for x in given)
        with self._turns, torch.no_grad(), torch.cuda.device(given[0].device):
            found = self._recordings.get(key) or self._recordings.setdefault(key, self._record(given))
            self._recordings.move_to_end(key)
            while len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)[1].free.synchronize()  # its memory goes back when nothing uses it
            return found.replay(given)

    def _record(self, given: Sequence[Tensor]) -> _Recording:
        """Warms up on a separate stream, as recording requires, and records."""
        places = tuple(x.detach().clone() for x in given)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._program(*places)
        torch.cuda.current_stream().wait_stream(stream)
        free = torch.cuda.Event()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = tuple(self._program(*places))
        free.record(torch.cuda.current_stream())
        return _Recording(graph, places, results, free)
