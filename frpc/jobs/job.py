"""A job from beginning to end: keeps finished shards, computes missing ones, and writes the index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from frpc.errors import OptionError
from frpc.jobs.cluster import run_on_ray
from frpc.jobs.store import Failure
from frpc.jobs.work import Task, Worker, settings

__all__ = ["Engine", "Summary", "run"]

Engine: TypeAlias = Literal["local", "ray"]


@dataclass(frozen=True)
class Summary:
    """How a job ended.

    Attributes:
        count: samples.
        resumed: of them, those that were there before.
        failures: of them, those that could not be explained.
        damaged: shards that were there and not whole, done again.
    """

    count: int
    resumed: int
    failures: tuple[Failure, ...]
    damaged: tuple[str, ...]


def _nothing(done: int, failed: int) -> None:
    pass


def run(
    task: Task,
    model: Mapping[str, Any],
    engine: Engine = "local",
    workers: int = 2,
    begin: Callable[[int], None] = lambda resumed: None,
    advance: Callable[[int, int], None] = _nothing,
) -> Summary:
    """Explains every sample exactly once, however often it is killed and called again.

    Args:
        task: what to do, and where.
        model: what the manifest says about the model; a job can only be resumed with the same.
        engine: ``"local"``, this process; ``"ray"``, the workers of a Ray cluster.
        workers: how many of these.
        begin: called with the number of samples that were done before.
        advance: called with the samples done and failed of each shard.

    Exact when: always; what is written has the same bits, whichever engine ran and wherever it was killed, on machines whose
    arithmetic is the same.

    Raises:
        OptionError: the folder holds another job, or another process works there.
        InputError: for a task that cannot be done.
    """
    if task.batch_size < 1 or task.store.size < 1:
        raise OptionError(f"batch size {task.batch_size} and shard size {task.store.size} must be at least 1.")
    with task.store.held({"model": dict(model), **settings(task)}) as store:
        done, damaged = store.examine()
        missing = [number for number in store.numbers() if number not in done]
        resumed = sum(stop - start for start, stop in map(store.bounds, done))
        begin(resumed)
        if missing:
            _do(task, missing, engine, workers, advance)
        return Summary(store.count, resumed, tuple(store.write_index()), tuple(damaged))


def _do(task: Task, missing: Sequence[int], engine: Engine, workers: int, advance: Callable[[int, int], None]) -> None:
    if engine == "ray":
        run_on_ray(task, missing, advance, workers)
        return
    worker = Worker(task)
    for number in missing:
        advance(*worker(number))
