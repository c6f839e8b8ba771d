"""Every linear map: push is the operator, pull is its transpose, with any number of column dimensions in front."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import frpc.maps
from frpc.maps import (
    BatchedMatMul,
    Broadcast,
    Cast,
    Center,
    Compose,
    Conv,
    Identity,
    LinearMap,
    LinearOp,
    LinearPool,
    MatMul,
    Pad,
    Place,
    Pool,
    ReLUGate,
    Scale,
    Select,
    Shuffle,
    Slice,
    Taps,
    Total,
    Transpose,
    WindowSum,
    scaled,
)

Operator = Callable[[Tensor], Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Sample:
    """A map, and the operator it stands for on one batch."""

    name: str
    map: LinearMap
    operator: Operator


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(name: str, weight: Tensor, operand: tuple[int, ...], transposed: bool = False, **given: object) -> Sample:
    """A convolution by the options of torch's functions."""
    spatial = weight.dim() - 2
    options: dict[str, object] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | given
    if transposed:
        options |= {"output_padding": given.get("output_padding", 0)}
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    else:
        function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]

    def operator(u: Tensor) -> Tensor:
        return function(u, weight, None, **options)

    def each(value: object) -> list[int]:
        return [value] if isinstance(value, int) else list(value)

    result = operator(torch.zeros(operand, dtype=torch.float64)).shape
    numbers = (each(options["stride"]), each(options["padding"]), each(options["dilation"]), transposed)
    output_padding = each(options.get("output_padding", 0))
    return Sample(name, Conv(weight, *numbers, output_padding, options["groups"], operand, result), operator)


def batched(name: str, operand: tuple[int, ...], coefficient: tuple[int, ...], left: bool = False) -> Sample:
    """A matrix product with a coefficient, on either side."""
    b = randn(*coefficient)

    def operator(u: Tensor) -> Tensor:
        return b @ u if left else u @ b

    return Sample(name, BatchedMatMul(b, operand, operator(torch.zeros(operand).double()).shape, left), operator)


def max_pool2d(name: str, operand: tuple[int, ...], *arguments: object, native: bool) -> Sample:
    """The winners of a pool at one input, with the operator's own transpose or without."""
    a = randn(*operand)
    _, indices = aten.max_pool2d_with_indices(a, *arguments)

    def transpose(v: Tensor) -> Tensor:
        full = [*arguments, *([[], [0], [1], False][len(arguments) - 1 :])]
        return aten.max_pool2d_with_indices_backward(v, a, *full, indices)

    def operator(u: Tensor) -> Tensor:
        return u.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)

    return Sample(name, Select(indices, a.shape, transpose if native else None), operator)


def window_sum(name: str, window: list[tuple[int, int, int, int]]) -> Sample:
    """The same weights in every window are a convolution of each channel."""
    kernel, stride, padding, dilation = ([line[k] for line in window] for k in range(4))
    weight, operand = randn(*kernel), (2, 3, 7, 8)

    def operator(u: Tensor) -> Tensor:
        return F.conv2d(u, weight.expand(3, 1, *kernel), None, stride, padding, dilation, groups=3)

    positions = [int(n) for n in operator(torch.zeros(operand, dtype=torch.float64)).shape[2:]]
    taps = Taps.stepping([7, 8], positions, window, torch.device("cpu"))
    weights = torch.where(taps.places < 0, 0.0, weight.flatten()[:, None, None]).expand(2, 3, -1, -1, -1)
    return Sample(name, WindowSum(weights, taps, operand), operator)


def averaging(taps: Taps) -> Tensor:
    """Weights that average over each window."""
    inside = (taps.places >= 0).double()
    return (inside / inside.sum(0)).expand(2, 3, *inside.shape)


def average(name: str, operand: tuple[int, ...], kernel: int, stride: int, padding: int, **given: object) -> Sample:
    def operator(u: Tensor) -> Tensor:
        return F.avg_pool2d(u, kernel, stride, padding, **given)

    result = operator(torch.zeros(operand)).shape
    counted = bool(given.get("count_include_pad", True))
    window = [(kernel, stride, padding, 1)] * 2
    return Sample(name, LinearPool(operator, operand, result, window, counted, given.get("divisor_override")), operator)


def uneven(u: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(u, (3, 2))


def summed(u: Tensor) -> Tensor:
    return u.roll(2, -1).cumsum(-1)


def samples() -> list[Sample]:
    coefficient, ties = randn(3, 1, 5), randn(2, 3, 4).relu()
    winners3d = F.max_pool3d(randn(2, 2, 4, 5, 3), 2, 2, 1, ceil_mode=True, return_indices=True)[1]
    flip = LinearOp(lambda u: u.flip(-1), (2, 5), (2, 5))
    adaptive = Taps.adaptive([5, 4, 3], [2, 3, 2], torch.device("cpu"))
    return [
        Sample("identity", Identity((2, 3, 5)), lambda u: u),
        Sample("scale by a tensor", Scale(coefficient, (2, 3, 4, 5)), lambda u: u * coefficient),
        Sample("scale by a number", Scale(-0.3, (2, 5)), lambda u: -0.3 * u),
        Sample("gate", ReLUGate(ties), lambda u: u * (ties > 0)),
        Sample("cast", Cast(randn(2, 3), randn(2, 3)), lambda u: u),
        Sample("broadcast", Broadcast((2, 1, 5), (2, 7, 5)), lambda u: u.expand(2, 7, 5)),
        Sample("broadcast to a higher rank", Broadcast((3, 1), (2, 5, 3, 7)), lambda u: u.expand(2, 5, 3, 7)),
        Sample("broadcast of nothing", Broadcast((2, 3), (2, 3)), lambda u: u),
        Sample("scaled, same shape", scaled(2.0, (2, 3), (2, 3)), lambda u: 2 * u),
        Sample("scaled by one", scaled(1.0, (2, 3), (2, 3)), lambda u: u),
        Sample("scaled and stretched", scaled(coefficient, (2, 1, 4, 5), (2, 3, 4, 5)), lambda u: u * coefficient),
        Sample("stretched alone", scaled(1, (2, 1, 4), (2, 3, 4)), lambda u: u.expand(2, 3, 4)),
        Sample("matrix", MatMul(randn(7, 5), (3, 5)), lambda u: u @ randn(7, 5).T),
        Sample("matrix of tokens", MatMul(randn(3, 5), (2, 7, 5)), lambda u: u @ randn(3, 5).T),
        batched("matrices", (2, 3, 5), (2, 5, 4)),
        batched("matrices of each head", (2, 1, 3, 5), (4, 5, 7)),
        batched("matrices of a higher rank", (3, 5), (2, 5, 4)),
        batched("vector", (2, 3, 5), (5,)),
        batched("vector by matrices", (5,), (2, 5, 4)),
        batched("matrices on the left", (2, 5, 4), (2, 3, 5), left=True),
        batched("matrix on the left", (2, 5, 4), (3, 5), left=True),
        batched("vector on the left", (2, 5, 4), (5,), left=True),
        batched("matrices on the left of a vector", (5,), (2, 3, 5), left=True),
        conv("conv 1d", randn(6, 2, 3), (2, 4, 11), stride=2, padding=1, dilation=2, groups=2),
        conv("conv 2d", randn(5, 3, 3, 2), (2, 3, 9, 8), stride=(2, 3), padding=(0, 2), dilation=(2, 1)),
        conv("conv 2d that leaves rows unread", randn(2, 3, 2, 2), (2, 3, 8, 10), stride=(3, 4)),
        conv("conv 2d depthwise", randn(6, 1, 3, 3), (2, 3, 7, 5), groups=3, padding=1),
        conv("conv 2d padded beyond the kernel", randn(2, 3, 2, 2), (2, 3, 5, 7), padding=4),
        conv("conv 3d", randn(4, 1, 2, 3, 1), (2, 2, 5, 4, 3), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        conv("transposed conv 1d", randn(4, 3, 3), (2, 4, 5), True, stride=3, padding=1, output_padding=2, groups=2),
        conv("transposed conv 1d, output padding as large as the stride", randn(4, 3, 2), (2, 4, 5), True, stride=2,
             output_padding=2, dilation=3),
        conv("transposed conv 2d", randn(3, 5, 3, 2), (2, 3, 4, 5), True, stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
        conv("transposed conv 2d, output padding larger than the stride", randn(3, 2, 2, 2), (2, 3, 4, 5), True,
             output_padding=4, dilation=5),
        conv("transposed conv 3d", randn(2, 1, 2, 1, 3), (2, 2, 3, 4, 2), True, stride=(2, 1, 1), output_padding=(1, 0, 0),
             groups=2),
        Sample("slice", Slice(1, 1, 6, 2, (2, 7, 5), (2, 3, 5)), lambda u: u[:, 1:6:2]),
        Sample("slice from the end", Slice(-1, -4, 2**63 - 1, 1, (2, 7, 5), (2, 7, 4)), lambda u: u[..., -4:]),
        Sample("slice of samples", Slice(0, 1, 3, 1, (3, 5), (2, 5)), lambda u: u[1:3]),
        Sample("place", Place(1, 2, (2, 3, 5), (2, 7, 5)), lambda u: F.pad(u, (0, 0, 2, 2))),
        Sample("transpose", Transpose(Slice(1, 2, 5, 1, (2, 7, 5), (2, 3, 5))), lambda u: F.pad(u, (0, 0, 2, 2))),
        Sample("pad", Pad([1, 0, 2, 3], (2, 3, 5), (2, 8, 6)), lambda u: F.pad(u, (1, 0, 2, 3))),
        Sample("pad that crops", Pad([-1, 2, 3, -2], (2, 3, 5), (2, 4, 6)), lambda u: F.pad(u, (-1, 2, 3, -2))),
        Sample("shuffle", Shuffle(3, (2, 6, 5)), lambda u: F.channel_shuffle(u, 3)),
        Sample("shuffle in space", Shuffle(2, (2, 6, 3, 1)), lambda u: F.channel_shuffle(u, 2)),
        Sample("pool", Pool(uneven, (2, 3, 7, 5), (2, 3, 3, 2)), uneven),
        average("average", (2, 3, 7, 5), 3, 2, 1),
        average("average, ceil", (2, 3, 6, 8), 3, 2, 1, ceil_mode=True),
        average("average, padding not counted", (2, 3, 7, 5), 3, 2, 1, count_include_pad=False),
        average("average, fixed divisor", (2, 3, 7, 5), 2, 2, 0, divisor_override=3),
        Sample("distances from the mean", Center((2, 6, 5), (2, 3, 10)),
               lambda u: u - u.view(2, 3, 10).mean(-1).repeat_interleave(2, 1)[..., None]),
        max_pool2d("winners", (2, 3, 7, 5), [3, 2], [2, 1], [1, 0], [1, 2], native=False),
        max_pool2d("winners by the operator's own transpose", (2, 3, 7, 5), [3, 3], [2, 2], [1, 1], [1, 1], True, native=True),
        Sample("winners 3d", Select(winners3d, (2, 2, 4, 5, 3)),
               lambda u: u.flatten(2).gather(2, winners3d.flatten(2)).view(winners3d.shape)),
        window_sum("weighted windows", [(3, 2, 1, 1), (3, 1, 0, 2)]),
        window_sum("weighted windows side by side", [(2, 2, 0, 1), (3, 3, 0, 1)]),
        Sample("weighted windows of uneven width", WindowSum(averaging(adaptive), adaptive, (2, 3, 5, 4, 3)),
               lambda u: F.adaptive_avg_pool3d(u, (2, 3, 2))),
        Sample("any linear operator", LinearOp(summed, (2, 3, 5), (2, 3, 5)), summed),
        Sample("total", Total([MatMul(randn(7, 7), (2, 7)), Scale(randn(7, seed=1), (2, 7))]),
               lambda u: u @ randn(7, 7).T + u * randn(7, seed=1)),
        Sample("composition", Compose(MatMul(randn(5, 7), (2, 7)), flip), lambda u: (u @ randn(5, 7).T).flip(-1)),
    ]  # fmt: skip


SAMPLES = samples()


def test_every_map_has_a_sample() -> None:
    kinds = {getattr(frpc.maps, name) for name in frpc.maps.__all__}
    maps = {k for k in kinds if isinstance(k, type) and issubclass(k, LinearMap)} - {LinearMap}
    sampled = {type(s.map) for s in SAMPLES}
    assert maps <= sampled, f"no sample of {', '.join(k.__name__ for k in maps - sampled)}"


@pytest.mark.parametrize("lead", [(), (3,), (2, 1)], ids=["no columns", "columns", "two column dimensions"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_map(sample: Sample, lead: tuple[int, ...]) -> None:
    """`push(u)` is the operator column by column; `<push(u), v> == <u, pull(v)>`."""
    m = sample.map
    u, v = randn(*lead, *m.operand, seed=1), randn(*lead, *m.result, seed=2)
    pushed, pulled = m.push(u), m.pull(v)
    assert (pushed.shape, pulled.shape) == (v.shape, u.shape)
    columns = u.reshape(-1, *m.operand)
    expected = torch.stack([sample.operator(column) for column in columns]).reshape(v.shape)
    assert torch.allclose(pushed, expected, rtol=1e-13, atol=1e-13)
    size = float((pushed * v).abs().sum())
    assert abs(float((pushed * v).sum() - (u * pulled).sum())) <= 1e-12 * size
    assert float(m.pull(torch.zeros_like(v)).abs().sum()) == 0
    assert torch.allclose(m.push(2 * u) - pushed, pushed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
def test_cost(sample: Sample) -> None:
    """Costs are finite and positive, but for maps that do nothing; bytes grow with the element size, FLOPs do not."""
    cost, double = sample.map.cost(), sample.map.cost(itemsize=8)
    nothing = isinstance(sample.map, Identity)
    for number in (cost.flops, cost.bytes):
        assert math.isfinite(number)
        assert number == 0 if nothing else number > 0
    assert (double.flops, double.bytes) == (cost.flops, 2 * cost.bytes)


def test_costs_of_layers() -> None:
    """A multiply and an add for every weight at every position it is used."""
    assert MatMul(randn(7, 5), (3, 5)).cost().flops == 2 * 3 * 7 * 5
    plain = Conv(randn(6, 2, 3, 3), [1, 1], [0, 0], [1, 1], False, [0, 0], 2, (2, 4, 7, 5), (2, 6, 5, 3))
    assert plain.cost().flops == 2 * (2 * 6 * 5 * 3) * (2 * 3 * 3)
    transposed = Conv(randn(4, 3, 3, 3), [1, 1], [0, 0], [1, 1], True, [0, 0], 2, (2, 4, 7, 5), (2, 6, 9, 7))
    assert transposed.cost().flops == 2 * (2 * 4 * 7 * 5) * (3 * 3 * 3)
    both = Compose(MatMul(randn(5, 7), (2, 7)), MatMul(randn(3, 5), (2, 5))).cost()
    assert both.flops == 2 * 2 * (7 * 5 + 5 * 3)


def test_costs_leave_a_symbolic_size_free() -> None:
    """A symbolic size is read by its example: making a number of it would fix the batch."""
    like = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(2, 4), symbolic_context=like)
    size = x.shape[0]
    assert BatchedMatMul(x, (3, size), (3, 4)).cost().flops == 2 * 3 * 2 * 4
    halved = LinearPool(torch.Tensor.clone, (1, 1, 4, size), (1, 1, 4, size), [(1, 1, 0, 1)] * 2)
    assert bool((halved.inverse_divisor() == 1).all())
    assert not x.shape[0].node.expr.is_number


def test_a_map_without_a_direction_says_so() -> None:
    class Neither(LinearMap):
        pass

    with pytest.raises(TypeError, match="Neither cannot carry columns forward"):
        Neither().push(randn(1))
    with pytest.raises(TypeError, match="Neither has no transposed pass"):
        Neither().pull(randn(1))


def test_shapes_of_pads_and_shuffles() -> None:
    """What the window producers read off the maps: cells added around an axis, and where each channel comes from."""
    pad = Pad([1, 2, 3, 4], (2, 3, 5, 6), (2, 3, 12, 9))
    assert [pad.around(axis) for axis in range(4)] == [(0, 0), (0, 0), (3, 4), (1, 2)]
    u = randn(1, 6, 2)
    assert torch.equal(Shuffle(3, (1, 6, 2)).push(u), u[:, Shuffle(3, (1, 6, 2)).order(6)])


@pytest.mark.parametrize("sample", [s for s in SAMPLES if isinstance(s.map, LinearPool)], ids=lambda s: s.name)
def test_divisors_of_averages(sample: Sample) -> None:
    """One over the divisor at each position, which is what a map of ones is averaged to."""
    m = sample.map
    assert isinstance(m, LinearPool)
    kernel, stride, padding, _ = m.window[0]
    ones = torch.ones(1, 1, *m.operand[2:], dtype=torch.float64)
    framed = F.pad(ones, [padding, padding + kernel] * 2)
    inside = framed.unfold(2, kernel, stride).unfold(3, kernel, stride).sum((-1, -2))[0, 0, : m.result[2], : m.result[3]]
    assert torch.allclose(m.inverse_divisor() * inside, sample.operator(ones)[0, 0])
