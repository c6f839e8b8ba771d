"""Rewrites of programs for other runtimes: the same function, in operators that those have and run fast."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import frpc
from exported_net import relative_l1, small_net
from frpc.core.stages import copy_graph
from frpc.errors import InputError
from frpc.explainer.explainer import Explainer
from frpc.export import Question, Signature, blocked, decompositions, onnx, verification, verify
from frpc.export.blocked import gates_as_convolutions, means_as_convolutions, sums_as_averages, transposed_into_blocks
from frpc.export.decompositions import gates_as_products, strided_as_convolutions, transposed_as_convolutions
from frpc.export.separable import transposed_as_products

pytestmark = pytest.mark.export


@pytest.fixture(scope="module")
def precise() -> Explainer:
    return frpc.compile(small_net().double(), (torch.randn(1, 3, 16, 16, dtype=torch.float64),))


def optimized(explainer: Explainer) -> fx.GraphModule:
    """A copy of the program before lowering, which is what is exported."""
    return copy_graph(next(s for s in explainer.stages if s.name == "optimize").program)


def called(program: fx.GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(n.target.__name__.split(".")[0] for n in program.graph.nodes if n.op == "call_function")


def test_a_signature_survives_its_text() -> None:
    given = frpc.export.question.Input("x", (3, 8), "float32", -1.0, 2.0)
    signature = Signature(
        "1",
        "Net",
        "FRP",
        "uniform",
        "cpu",
        Question("several", at=("a",)),
        None,
        (given,),
        7,
        ("output",),
        ((1, 0, 3), (2, -1, 5)),
    )
    assert Signature.from_json(signature.to_json(), "file") == signature
    with pytest.raises(InputError, match="file has a damaged signature"):
        Signature.from_json('{"question": 3}', "file")


@pytest.mark.parametrize("rewrite", [transposed_as_convolutions, strided_as_convolutions, gates_as_products])
def test_rewrites_keep_the_function(precise: Explainer, rewrite: Any) -> None:
    aten = torch.ops.aten
    program = optimized(precise)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seed = precise.seed_for(x, target=3)
    plain = program(x, seed)
    rewrite(program)
    program.recompile()
    gates = [n for n in program.graph.nodes if n.target is aten.threshold_backward.default]
    strides = {n.args[3][0] for n in program.graph.nodes if n.target is aten.convolution.default and n.args[6]}
    assert (len(gates) > 0, strides) == {
        transposed_as_convolutions: (True, {2}),
        strided_as_convolutions: (True, {1}),
        gates_as_products: (False, {1, 2}),
    }[rewrite]
    for found, expected in zip(program(x, seed), plain, strict=True):
        assert relative_l1(found, expected) <= 1e-13


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), 2, (1, 1)), ((7, 7), 2, (3, 3)), ((2, 2), 2, (0, 0)), ((5, 3), 3, (1, 0)), ((4, 2), 2, (1, 0))],
)
def test_neighbours_read_their_own_taps(kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
    """A strided transposed convolution is a convolution whose channels are the neighbours, shuffled into place."""
    torch.manual_seed(0)
    v, weight = torch.randn(2, 4, 6, 5, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
    added = [stride - k + 2 * p for k, p in zip(kernel, padding, strict=True)]  # what makes the result stride times as large
    expected = F.conv_transpose2d(v, weight, stride=stride, padding=padding, output_padding=added)
    neighbours, frame = decompositions._neighbours(weight, stride, padding)
    found = F.pixel_shuffle(F.conv2d(F.pad(v, frame), neighbours), stride)
    assert found.shape == expected.shape == (2, 3, 6 * stride, 5 * stride)
    assert relative_l1(found, expected) <= 1e-13


def test_each_neighbour_has_a_convolution_of_its_own() -> None:
    """3x3 kernels, two pixels a step: neighbours read 1, 2, 2 and 4 taps, and a convolution for all four would read 16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 3)).double().eval()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    explainer = frpc.compile(model, (x,))
    program = optimized(explainer)
    expected = program(x, explainer.seed_for(x, target=1))
    strided_as_convolutions(program)
    program.recompile()
    kernels = [
        n.args[1].meta.get("val", getattr(program, n.args[1].target)).shape[2:].numel()
        for n in program.graph.nodes
        if n.target is torch.ops.aten.convolution.default
    ]
    assert sorted(kernels) == [1, 2, 2, 4, 9]  # the last is the layer's own
    for found, one in zip(program(x, explainer.seed_for(x, target=1)), expected, strict=True):
        assert relative_l1(found, one) <= 1e-13


class Blocks(nn.Module):
    """Whole blocks of channels: a residual, a stride, pools, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.strided, self.beside = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(16, 32, 1, stride=2)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.inner(x))
        x = F.relu(self.strided(x) + self.beside(x))
        return self.last(x.mean((2, 3)))


@functools.cache
def blocks() -> tuple[Explainer, Explainer, Tensor]:
    """Blocks explained in float32 and, with the same weights, in float64."""
    torch.manual_seed(0)
    model = Blocks().eval()
    x = torch.randn(2, 3, 12, 12)
    explainer, exact = frpc.compile(model, (x,)), frpc.compile(Blocks().double().eval(), (x.double(),))
    return explainer, exact.refresh(model.double()), x


@pytest.mark.parametrize(
    ("rewrite", "gone"),
    [
        (gates_as_convolutions, "threshold_backward"),
        (means_as_convolutions, "div"),
        (sums_as_averages, "sum"),
        (transposed_into_blocks, ""),
    ],
)
def test_rewrites_into_blocks_keep_the_function(rewrite: Any, gone: str) -> None:
    """In float32, which alone they are for: as far from float64 as the program that they are made of."""
    explainer, exact, x = blocks()
    program = optimized(explainer)
    before = called(program)
    seed = explainer.seed_for(x, target=3)
    plain = program(x, seed)
    rewrite(program)
    program.recompile()
    after = called(program)
    assert after.get("convolution", 0) > before["convolution"] or rewrite is sums_as_averages
    assert not gone or after.get(gone, 0) < before[gone]
    answer = exact(x.double(), target=3)
    for found, one, true in zip(program(x, seed), plain, (answer.output, answer.relevance, answer.bias), strict=True):
        assert relative_l1(found.double(), true) <= 2 * relative_l1(one.double(), true) + 1e-6


def test_a_gate_is_1_or_0_for_normal_numbers() -> None:
    limits = torch.finfo(torch.float32)
    smallest = torch.tensor(limits.tiny)
    values = torch.stack([torch.zeros(()), smallest, torch.tensor(1.0), torch.tensor(limits.max), torch.tensor(torch.inf)])
    assert (values * blocked._STEEP).clamp(0, 1).tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.AvgPool2d((3, 2), stride=2, ceil_mode=True, divisor_override=5),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveAvgPool2d((5, 7)),
        nn.AdaptiveAvgPool2d((12, 10)),
        nn.AdaptiveAvgPool2d((15, 13)),
    ],
    ids=str,
)
def test_transposed_pools_are_products(pool: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    features = pool(x).flatten(1).shape[1]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), pool, nn.Flatten(), nn.Linear(features, 4)).double().eval()
    explainer = frpc.compile(model, (x,))
    program = optimized(explainer)
    seed = explainer.seed_for(x, target=3)
    expected = program(x, seed)
    assert any("backward" in name for name in called(program))
    transposed_as_products(program)
    program.recompile()
    assert not any("backward" in name for name in called(program))
    for found, one in zip(program(x, seed), expected, strict=True):
        assert relative_l1(found, one) <= 1e-13


class Stacked(nn.Module):
    """Pixels shuffled in pictures that lie one below another, ``[B, 2, C, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Linear(2 * 2 * 12 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        pictures = F.relu(self.first(x)).unflatten(1, (2, 8))
        return self.last(F.pixel_shuffle(pictures, 2).flatten(1))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ChannelShuffle(2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)), torch.ones(1, 4, 8)),
        (
            nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.ChannelShuffle(4), nn.PixelShuffle(2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3)
            ),
            torch.ones(1, 3, 8, 8),
        ),
        (Stacked(), torch.ones(1, 3, 8, 8)),
        (
            nn.Sequential(nn.Linear(6, 5), nn.Hardtanh(-0.5, 0.75), nn.Linear(5, 3)).double(),
            torch.ones(1, 6, dtype=torch.float64),
        ),
    ],
    ids=["channels of signals", "channels, then pixels", "pixels in five dimensions", "bounds in float64"],
)
def test_models_own_shuffles_and_bounds(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """What rewrites use, models use in other ranks and types."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x = torch.cat([x, -x])
    explainer = frpc.compile(model.eval(), (x,))
    onnx(explainer, tmp_path / "a.onnx", (x,))
    assert verify(tmp_path / "a.onnx", explainer).error <= (1e-5 if x.dtype == torch.float32 else 1e-12)


def test_a_third_is_repeated_as_well_as_a_half() -> None:
    """A pool without overlap gives each number back s x s times, whatever s is: no product is needed."""
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(48, 4)).eval()
    program = optimized(frpc.compile(model, (x,)))
    transposed_as_products(program)
    assert called(program)["upsample_nearest2d"] == 1
    assert "matmul" not in called(program)


def test_the_constants_share_is_measured_by_the_map() -> None:
    """Much cancels in it: an error of 1e-7 in a share of 1e-6 beside a map of 1 is none."""
    asker = verification._Asker(None, SimpleNamespace(outputs=("relevance", "bias")), None, 1, None)  # type: ignore[arg-type]
    found = [torch.tensor([[0.5, -0.5]]), torch.tensor([1.1e-6])]
    expected = [torch.tensor([[0.5, -0.5]]), torch.tensor([1e-6])]
    errors = asker._relative(found, expected)
    assert errors[0] == 0
    assert math.isclose(float(errors[1]), 1e-7, rel_tol=1e-3)
