"""Programs on Triton kernels against the same programs on ATen, in Triton's interpreter; which places have none, and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import fx

pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")

from frpc import kernel_lowering
from frpc.errors import OptionError
from test_kernels_interpret import in_interpreter


def lowered(*names: str) -> list[dict[str, Any]]:
    """What programs give on kernels: float32 sums in another order, so about 1e-7 from their ATen form."""
    found = [json.loads(line) for line in in_interpreter("kernel_programs.py", *names).splitlines()]
    assert {one["model"] for one in found} == {*names}
    for one in found:
        assert max(one["errors"]) <= 1e-5, one
        assert one["unlisted"] == [], "operators that frpc.kernel_lowering.operators() does not name"
    return found


@pytest.mark.interpret
def test_convolutions() -> None:
    """Every ReLU, the pooling, the residual sum and the last product are in kernels; one target and several, two rules."""
    found = lowered("convolutions")
    assert [(f["rule"], f["columns"]) for f in found] == [(r, c) for r in ("frp", "epsilon") for c in (False, True)]
    for one in found:
        assert "aten.max_pool2d_with_indices_backward.default" not in one["left"]
        assert "aten.scatter_add.default" not in one["left"]
        assert one["launches"]["conv_transposed_gate"] == 3, "the sum of the residual block, the strided one, the first layer"
        assert (one["launches"]["pool_select"], one["launches"]["pool_scatter"]) == (1, 1)
        assert len(one["refused"]) == 1 and "convolution_6" in one["refused"][0]
    frp = found[0]
    assert "aten.threshold_backward.default" not in frp["left"] and "aten.relu.default" not in frp["left"]
    assert frp["launches"] == {"relu_gate": 4, "gated": 1, "conv_transposed_gate": 3, "pool_select": 1, "pool_scatter": 1}
    assert frp["refused"] == [
        "the kernel conv_transposed_gate not used at convolution_6: no gate or product reads it alone, but "
        "frpc_kernels.pool_scatter.default; cuDNN has its own"
    ]


@pytest.mark.interpret
def test_norms_and_smooth_activations() -> None:
    for one in lowered("tokens"):
        assert one["launches"] == {"norm_gate": 1, "norm_pull": 1, "smooth_gate": 2}
        assert one["refused"] == []
        assert not {"aten.native_layer_norm.default", "aten.erf.default", "aten.sigmoid.default"} & {*one["left"]}


@pytest.mark.interpret
def test_rms_norms() -> None:
    """With weights, without, spelled out, and as one call, which CUDA has: every square and mean is gone."""
    *squares, fused = lowered("squares", "fused")
    assert [one["columns"] for one in squares] == [False, True]
    for one in squares:
        assert one["launches"] == {"norm_gate": 3, "norm_pull": 2, "relu_gate": 1, "gated": 1}
        assert one["refused"] == []
        assert not {"aten.pow.Tensor_Scalar", "aten.rsqrt.default"} & {*one["left"]}
    assert fused["launches"] == {"norm_gate": 1, "norm_pull": 1}
    assert "aten._fused_rms_norm.default" not in fused["left"]


@pytest.mark.interpret
def test_norms_without_kernel_say_why() -> None:
    for one in lowered("spelled"):
        assert one["launches"] == {"relu_gate": 1, "gated": 1}
        assert one["refused"] == [
            "the kernel norm_gate not used at native_layer_norm: it normalizes 2 dimensions",
            "the kernel norm_gate not used at sqrt: an RMS norm written out in another form than x * rsqrt(mean(x^2) + eps) over "
            "the last dimension",
            "the kernel norm_gate not used at sqrt_1: a layer norm written out in single operators; nn.LayerNorm has a kernel",
            "the kernel norm_gate not used at rsqrt: a group norm, or one of channels: the kernel normalizes the last dimension",
        ]


@pytest.mark.interpret
def test_refusals() -> None:
    for one in lowered("grouped"):
        assert one["refused"] == [
            "the kernel conv_transposed_gate not used at convolution_4: 4 groups of 1 channels: most of a matrix product "
            "would be padding"
        ]


def test_devices_without_kernels() -> None:
    reason = kernel_lowering.why_not(torch.device("cpu"))
    assert reason == "the model is on cpu; kernels are for CUDA devices"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Triton is not installed; it comes with PyTorch's CUDA builds for Linux, or with pip install triton"
    monkeypatch.setattr("frpc_kernels.find_spec", lambda name: None)
    program = fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(OptionError) as error:
        kernel_lowering.use_kernels(program)
    assert str(error.value) == f'backend="triton" cannot be had here: {reason}'
    assert kernel_lowering.why_not(torch.device("cuda")) == reason
