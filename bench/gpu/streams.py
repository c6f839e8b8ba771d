"""CUDA graphs: one replayed program asked from several streams and threads, and inside another recording."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import frpc
from bench.gpu.trying import Result, attempt, relevance, small_net

__all__ = ["by_threads", "by_turns", "graphs", "recorded_inside", "streams"]


def graphs(device: str) -> Iterator[Result]:
    """One replayed program asked from everywhere at once; every answer has to be the one it gives alone, to the bit."""
    explainer = frpc.compile(small_net().to(device), mode="latency")
    inputs, target = [torch.randn(3, 3, 24, 24, device=device) for _ in range(2)], torch.tensor([1, 5, 7], device=device)
    alone = [relevance(explainer, x, target).clone() for x in inputs]
    yield attempt("one stream, by turns", lambda: by_turns(explainer, inputs, target, alone, [torch.cuda.current_stream()] * 2))
    yield attempt("two streams, by turns", lambda: by_turns(explainer, inputs, target, alone, streams()))
    yield attempt("two streams, two threads", lambda: by_threads(explainer, inputs, target, alone))
    yield attempt("inside another recording", lambda: recorded_inside(explainer, inputs, target, alone))


def streams() -> list[torch.cuda.Stream]:
    found = [torch.cuda.Stream() for _ in range(2)]
    for stream in found:
        stream.wait_stream(torch.cuda.current_stream())
    return found


def by_turns(
    explainer: frpc.Explainer,
    inputs: Sequence[Tensor],
    target: Tensor,
    alone: Sequence[Tensor],
    where: Sequence[torch.cuda.Stream],
) -> Result:
    """One thread queues calls on both streams without waiting; the first stream is kept busy, so that calls pile up."""
    found: list[tuple[int, Tensor]] = []
    for turn in range(100):
        at = turn % 2
        with torch.cuda.stream(where[at]):
            if at == 0:
                busy(inputs[0].device)
            found.append((at, relevance(explainer, inputs[at], target)))
    torch.cuda.synchronize()
    return same(found, alone)


def by_threads(explainer: frpc.Explainer, inputs: Sequence[Tensor], target: Tensor, alone: Sequence[Tensor]) -> Result:
    """Two threads, each on a stream of its own."""
    found: list[tuple[int, Tensor]] = []

    def ask(at: int, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for _ in range(100):
                busy(inputs[0].device)
                found.append((at, relevance(explainer, inputs[at], target)))

    threads = [threading.Thread(target=ask, args=(at, stream)) for at, stream in enumerate(streams())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    if len(found) != 200:
        raise AssertionError(f"{len(found)} of 200 calls were answered")
    return same(found, alone)


def recorded_inside(explainer: frpc.Explainer, inputs: Sequence[Tensor], target: Tensor, alone: Sequence[Tensor]) -> Result:
    """The user records a graph with the explainer in it, and replays it on another input."""
    place = inputs[0].clone()
    with torch.inference_mode():
        with torch.cuda.stream(streams()[0]):
            for _ in range(3):
                relevance(explainer, place, target)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = relevance(explainer, place, target)
        place.copy_(inputs[1])
        graph.replay()
    torch.cuda.synchronize()
    return same([(1, result)], alone)


def busy(device: torch.device) -> None:
    """Queues about a millisecond of work on the current stream."""
    a = torch.ones(2048, 2048, device=device)
    for _ in range(4):
        a = (a @ a).clamp(max=1)


def same(found: Sequence[tuple[int, Tensor]], alone: Sequence[Tensor]) -> Result:
    wrong = [at for at, result in found if not torch.equal(result, alone[at])]
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(found)} answers are not what the program gives alone")
    return {"calls": len(found), "line": f"{len(found)} calls, each bit-equal to the call alone"}
