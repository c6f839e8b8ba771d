"""Triton kernels on a CUDA device: against float64, programs against ATen, and nothing read or written out of bounds."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")

import frpc
import kernel_cases
import kernel_programs
from places import TESTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", kernel_cases.CASES)
def test_kernel_equals_its_reference(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = kernel_cases.Setting(dtype, device="cuda", thorough=True, opcheck=dtype == torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for the plain result that errors are judged by
    findings = list(kernel_cases.CASES[kernel](setting))
    wrong = [f"{f.what}: {f.error:.1e} > {f.bound:.1e}" for f in findings if not f.error <= f.bound]
    assert findings and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", kernel_programs.MODELS)
def test_program_equals_its_aten_form(name: str, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lowered, _ = kernel_programs.programs(name, columns, frpc.rules.FRP(), "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = torch.randn(3, *kernel_programs.MODELS[name][1], device="cuda")
    seed = torch.randn(*([2] if columns else []), 3, kernel_programs.OUTPUTS[name], device="cuda")
    with torch.no_grad():
        for got, expected in zip(lowered(x, seed), plain(x, seed), strict=True):
            assert kernel_programs.relative(got, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernel_cases.CASES)
def test_nothing_is_touched_out_of_bounds(kernel: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [sanitizer, "--error-exitcode", "9", sys.executable, "kernel_cases.py", kernel, "--device=cuda"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
