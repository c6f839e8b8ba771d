"""The shards of a job on the workers of a Ray cluster.

Data and folder have to be at the same place for all of them. A worker that dies is started again and computes its shard again:
a shard is put in its place whole, so that nothing is lost or there twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from frpc.errors import FrpcError, require
from frpc.jobs.work import Task, Worker

__all__ = ["run_on_ray"]


class _Actor:
    """One worker of the cluster, with its own model."""

    def __init__(self, task: Task, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray gives a worker one; results have the bits of as many as the job was started with
        self.worker = Worker(task)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        done, failed = self.worker(int(row["item"]))
        return {"shard": row["item"], "done": done, "failed": failed}


def run_on_ray(task: Task, missing: Sequence[int], advance: Callable[[int, int], None], workers: int) -> None:
    """Explains shards on a cluster: the one Ray is connected to, or that its own settings name, else one on this machine.

    Args:
        task: the job.
        missing: the shards to do.
        advance: called with the samples done and failed of each shard.
        workers: how many processes work.

    Raises:
        PackageError: Ray is not installed.
        FrpcError: what a worker raised, where the job is at fault.
    """
    ray, data = (require(name, "ray", "--engine ray") for name in ("ray", "ray.data"))
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller has one
    context.print_on_execution_start = False
    try:
        shards = data.from_items(list(missing), override_num_blocks=len(missing))
        results = shards.map(
            _Actor,
            fn_constructor_kwargs={"task": task, "threads": torch.get_num_threads()},
            compute=data.ActorPoolStrategy(size=min(workers, len(missing))),
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in results.iter_rows():
            advance(int(row["done"]), int(row["failed"]))
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        if started:
            ray.shutdown()


def _cause(error: Exception) -> Exception:
    """The error a worker raised, if it is one of frpc's."""
    seen: BaseException | None = error
    while seen is not None:
        for found in (seen, getattr(seen, "cause", None)):
            if isinstance(found, FrpcError) and type(found).__module__.startswith("frpc."):
                return found
        seen = seen.__cause__
    return error
