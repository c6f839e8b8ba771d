"""Triton kernels against their slow references in Triton's interpreter, which needs no GPU and a process of its own.

bfloat16 is left out: the interpreter computes it wrongly without saying so.
"""

from __future__ import annotations

import json

import pytest

from interpreter import in_interpreter

pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")

KERNELS = ("gate", "conv_relevance", "conv_transposed_gate", "window_conv", "pool_select", "pool_windows", "norm_gate")

pytestmark = pytest.mark.interpret


def check(kernels: tuple[str, ...], *options: str) -> None:
    findings = [json.loads(line) for line in in_interpreter("kernel_cases.py", *kernels, *options).splitlines()]
    tried = {(f["kernel"], f["dtype"]) for f in findings}
    assert tried == {(kernel, dtype) for kernel in kernels for dtype in ("torch.float32", "torch.float16")}
    wrong = [f"{f['kernel']} {f['dtype']} {f['what']}: {f['error']:.1e}" for f in findings if not f["error"] <= f["bound"]]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_has_cases() -> None:
    import frpc_kernels

    assert sorted(frpc_kernels.KERNELS) == sorted(KERNELS)


def test_kernels_equal_their_references() -> None:
    """And let no infinity pass a shut gate."""
    check((*KERNELS, "not_finite"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_its_reference_in_every_case_and_tiling(kernel: str) -> None:
    check((kernel,), "--all")
