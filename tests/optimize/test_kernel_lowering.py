"""Programs on Triton kernels against the same programs on ATen, in Triton's interpreter; which places have none, and why."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")

import rewrites_kernels
from frpc.errors import OptionError
from frpc.optimize.triton import lowering as kernel_lowering
from frpc.optimize.triton import rewriting as kernel_rewriting
from graphs import program, randn, with_examples
from interpreter import in_interpreter
from rewrites import Line, agree, check_random_graphs, rewritten, written

aten = torch.ops.aten


PROGRAMS = ("convolutions", "tokens", "squares", "spelled", "fused", "plain", "convnext", "decoder", "shuffled", "signal")


@functools.cache
def everything() -> list[dict[str, Any]]:
    """What all programs give, of one process: each would load PyTorch and Triton again."""
    printed = in_interpreter("kernel_programs.py", *PROGRAMS, "grouped", "infinite")
    return [json.loads(line) for line in printed.splitlines()]


def lowered(*names: str) -> list[dict[str, Any]]:
    """What programs give on kernels: float32 sums in another order, so about 1e-7 from their ATen form."""
    found = [one for name in names for one in everything() if one["model"] == name]
    assert {one["model"] for one in found} == {*names}
    for one in found:
        assert max(one["errors"]) <= 1e-5, one
        assert one["unlisted"] == [], "operators that frpc.optimize.triton.lowering.operators() does not name"
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
def test_norms() -> None:
    """RMS norms with weights, without, spelled out, and as one call, which CUDA has; what no kernel takes says why."""
    *found, fused = lowered("squares", "spelled", "fused")
    for one in found[:2]:
        assert one["launches"] == {"norm_gate": 3, "norm_pull": 2, "relu_gate": 1, "gated": 1}
        assert one["refused"] == []
        assert not {"aten.pow.Tensor_Scalar", "aten.rsqrt.default"} & {*one["left"]}
    for one in found[2:]:
        assert one["launches"] == {"relu_gate": 1, "gated": 1}
        assert reasons(one) == {
            "norm_gate at native_layer_norm": "it normalizes 2 dimensions",
            "norm_gate at sqrt": "an RMS norm in another form than x * rsqrt(mean(x^2) + eps) over the last dimension",
            "norm_gate at sqrt_1": "a layer norm written as single operators; nn.LayerNorm has a kernel",
            "norm_gate at rsqrt": "a group norm, or one of channels: the kernel normalizes the last dimension",
        }
    assert fused["launches"] == {"norm_gate": 1, "norm_pull": 1}
    assert "aten._fused_rms_norm.default" not in fused["left"]


@pytest.mark.interpret
def test_typical_nets() -> None:
    """A plain net, a block of ConvNeXt and a decoder, for one target and for several: what runs on which kernel, and what not.

    What transposes a transposed convolution is a convolution: two are behind a product, one behind a ReLU's bits.
    """
    found = lowered("plain", "convnext", "decoder")
    for one in found[:2]:
        assert one["launches"] == {"relu_gate": 3, "conv_transposed_gate": 2, "pool_select": 2, "pool_scatter": 2}
        stays = "no gate or product reads it alone, but frpc_kernels.pool_scatter.default; cuDNN has its own"
        assert reasons(one) == {"conv_transposed_gate at convolution_4": stays}
    for one in found[2:4]:
        assert one["launches"] == {"norm_gate": 3, "norm_pull": 3, "smooth_gate": 1, "conv_transposed_gate": 1}
        assert [*reasons(one)] == [f"conv_transposed_gate at convolution_{n}" for n in (3, 4)], "the narrowing, the depthwise one"
    for one in found[4:]:
        assert one["launches"] == {"smooth_gate": 1, "relu_gate": 1, "gated": 1, "conv_relevance": 2}
        refused = reasons(one)
        bits = "it multiplies by a coefficient; a ReLU's bits are read in a separate launch"
        assert refused.pop("conv_relevance at convolution_3") == bits
        assert [*refused] == [f"conv_transposed_gate at convolution{n}" for n in ("", "_1", "_2")], "values, not relevance"
    assert [one["columns"] for one in found] == [False, True] * 3


@pytest.mark.interpret
def test_views_between_an_operator_and_its_gate() -> None:
    """Bits of other channels are not read by what comes before the view; columns of signals are no images."""
    found = lowered("shuffled", "signal")
    for one in found[:2]:
        assert one["launches"] == {
            "relu_gate": 3, "gated": 3, "conv_transposed_gate": 1, "pool_select": 1, "pool_scatter": 1,
        }  # fmt: skip
    for one in found[2:]:
        assert one["launches"] == {"relu_gate": 2, "gated": 2, "pool_select": 2, "pool_scatter": 2}


@pytest.mark.interpret
def test_infinite_relevance() -> None:
    """A column that begins at infinity gives 0 where all gates are shut, with others beside it as alone, and spoils no other."""
    (found,) = (one for one in everything() if one["model"] == "infinite")
    assert 0.0 in found["kinds"] and len(found["kinds"]) >= 3, "zeros, and infinities of either sign"
    assert found["alike"] == [True, True], "one target, and columns"
    assert max(found["finite"]) <= 1e-5


def reasons(line: dict[str, Any]) -> dict[str, str]:
    """``kernel at node -> why not``."""
    parts = [text.removeprefix("the kernel ").split(": ", 1) for text in line["refused"]]
    return {where.replace("not used at", "at"): why for where, why in parts}


def test_products_that_stretch_a_value_stay() -> None:
    """One convolution times a batch, and times itself: a kernel gives what the convolution gives, and reads each operand once."""

    def build(graph: fx.Graph, constant: Callable[[str, Tensor], fx.Node]) -> list[fx.Node]:
        g, x, weight = graph.placeholder("g"), graph.placeholder("x"), constant("weight", randn(4, 8, 3, 3).float())
        found = []
        for transposed, inner in ((True, 8), (False, 4)):
            arguments = (weight, None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
            operand = graph.call_function(aten.slice.Tensor, (g, 1, 0, 12 - inner))
            one, other = (graph.call_function(aten.convolution.default, (operand, *arguments)) for _ in range(2))
            factor = graph.call_function(aten.slice.Tensor, (x, 1, 0, inner))
            found += [graph.call_function(aten.mul.Tensor, pair) for pair in ((one, factor), (other, other))]
        return found

    stretched = with_examples(program(build), randn(1, 8, 5, 4).float(), randn(3, 8, 5, 4).float())
    kernel_lowering.use_kernels(stretched)
    assert kernel_lowering.count_launches(stretched) == {}


@pytest.mark.interpret
def test_refusals() -> None:
    for one in lowered("grouped"):
        assert one["refused"] == [
            "the kernel conv_transposed_gate not used at convolution_4: 4 groups of 1 channels: most of a matrix product "
            "would be padding"
        ]


def test_devices_without_kernels() -> None:
    for name in ("cpu", "mps"):
        assert kernel_lowering.why_not(torch.device(name)) == f"the model is on {name}; kernels are for CUDA devices"
    assert kernel_lowering.why_not(torch.device("cuda", 1)) is None


def test_operators_are_those_that_programs_get() -> None:
    """A program in a file may hold what is listed; that no program of these tests holds another is checked where they run."""
    written = set(re.findall(r"self\.ops\.(\w+)\.default", inspect.getsource(kernel_rewriting)))
    listed = [str(op) for op in kernel_lowering.operators()]
    assert sorted(listed) == sorted(f"frpc_kernels.{name}.default" for name in written)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Triton is not installed; it comes with PyTorch's CUDA builds for Linux, or with pip install triton"
    monkeypatch.setattr("frpc_kernels.find_spec", lambda name: None)
    program = fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(OptionError) as error:
        kernel_lowering.use_kernels(program)
    assert str(error.value) == f'backend="triton" is not available: {reason}'
    assert kernel_lowering.why_not(torch.device("cuda")) == reason


FIRES = [pytest.param(line, id=line.what) for line in rewrites_kernels.REWRITES[0].fires]
NEAR = [pytest.param(line, id=line.what) for line in rewrites_kernels.REWRITES[0].near]


@pytest.mark.parametrize("line", FIRES)
def test_what_kernels_replace(line: Line) -> None:
    """With the kernels' slow references in their place, the program gives the same."""
    rewrite = rewrites_kernels.REWRITES[0]
    before, shapes = written(line, rewrite.dtype)
    after, _ = rewritten(rewrite.run, before)
    assert kernel_lowering.count_launches(after) != {}
    assert agree(rewrite, before, after, shapes, not line.fixed) > 0


@pytest.mark.parametrize("line", NEAR)
def test_what_only_looks_like_a_kernel(line: Line) -> None:
    after, _ = rewritten(rewrites_kernels.use_kernels, written(line, torch.float32)[0])
    assert kernel_lowering.count_launches(after) == {}


def test_every_kernel_is_launched() -> None:
    launched: set[str] = set()
    for line in rewrites_kernels.REWRITES[0].fires:
        launched |= {*kernel_lowering.count_launches(rewritten(rewrites_kernels.use_kernels, written(line, torch.float32)[0])[0])}
    assert {f"frpc_kernels.{name}.default" for name in launched} == {str(op) for op in kernel_lowering.operators()}


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_random_programs_keep_their_function(count: int) -> None:
    check_random_graphs(rewrites_kernels.REWRITES[0], count)
