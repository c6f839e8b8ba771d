"""The benchmark of kernels: what it times on a GPU beside each kernel computes the same as the kernel's slow reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from places import ROOT

sys.path.append(str(ROOT))  # bench is run from a checkout and not installed

pytest.importorskip("triton")

from bench import kernels

CONVOLUTIONS = (("a", 33, 5, 7, 3, 1, 1), ("b", 5, 9, 8, 3, 2, 1), ("c", 4, 6, 5, 1, 1, 0))
POOLS = (("a", 33, 8, 3, 2, 1), ("b", 5, 6, 2, 2, 0))
NORMS = (("a", 3, 7),)
WINDOWS = (("a", 3, 4, 2, 3, 4, 2), ("b", 3, 2, 2, 2, 6, 4))


def small() -> list[kernels.Task]:
    torch.manual_seed(0)
    return list(kernels.tasks(2, "cpu", CONVOLUTIONS, POOLS, NORMS, WINDOWS))


def test_aten_computes_what_the_reference_computes() -> None:
    for task in small():
        off = kernels.distance(task.aten(), task.reference())
        assert off < 1e-5, f"{task.kernel} at {task.where}: {off}"


def test_every_kernel_is_timed() -> None:
    from frpc.optimize.triton.lowering import operators

    known = {str(operator).split(".")[1] for operator in operators()} | {"window_conv", "pool_windows"}
    assert {task.kernel for task in small()} == known


def test_work_is_counted() -> None:
    """A convolution of [2, 4, 5, 5] by [6, 4, 1, 1]: 300 results of 4 products; a gate reads and writes 2 x 4 x 25 floats."""
    found = {task.kernel: task for task in small() if task.where == "c"}
    assert found["conv_relevance"].flops == 2 * 2 * 6 * 25 * 4
    assert found["gated"].bytes == 4 * (2 * 200 + 2 * 25)


def test_distance_sees_a_wrong_result() -> None:
    x = torch.ones(3)
    assert kernels.distance((x, None), x) == 0
    assert kernels.distance(Tensor([1.0, 1.0, 2.0]), x) == pytest.approx(1 / 3)


def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "kernels.json"
    assert kernels.run(1, 5, [], file) == 0
    assert not file.exists()
    assert "no CUDA device" in capsys.readouterr().out
