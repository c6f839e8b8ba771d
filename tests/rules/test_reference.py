"""The reference itself: the thesis's examples by hand, dense degeneration, PyTorch's values, conservation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import nets
import reference_operators as operators
from reference import relevance, relevance_maps
from reference_operators import ACTIVATIONS, Carried, secant, slope_at_zero, sources, torch_function
from strategies import Case, cases

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operators: more threads wait for each other far longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(x: Tensor) -> Carried:
    return sources([x])[0]


def close(a: Tensor, b: Tensor, bound: float = 1e-14) -> bool:
    return a.shape == b.shape and bool((a - b).abs().sum() <= bound * b.abs().sum())


# The thesis's examples ------------------------------------------------------------------------------------------------


def test_worked_example_of_figure_3_1() -> None:
    """y = w1 x1 + w2 x2 + b has the map [w1 x1 + b/2, w2 x2 + b/2]."""
    y = operators.linear(source(torch.tensor([[3.0, -5.0]])), torch.tensor([[2.0, 7.0]]).double(), torch.tensor([4.0]))
    assert y.value.tolist() == [[2 * 3 - 7 * 5 + 4]]
    assert y.maps.tolist() == [[[2 * 3 + 2, -7 * 5 + 2]]]


def test_two_layers_by_hand() -> None:
    """T 3.5 for the first layer, T 3.8 for the second, in plain numbers; one hidden neuron is inactive (T 3.6)."""
    x, n = [1.0, -2.0, 0.5], 3
    w1, b1 = [[2.0, 1.0, -1.0], [-1.0, 1.0, 2.0]], [0.75, 0.3]
    w2, b2 = [[3.0, -4.0], [-1.5, 2.0]], [-0.6, 1.2]

    def sgn(value: float) -> int:
        return (value > 0) - (value < 0)

    hidden = [max(sum(w * xi for w, xi in zip(row, x, strict=True)) + b, 0.0) for row, b in zip(w1, b1, strict=True)]
    first = [
        [(w * xi + b / n) * abs(sgn(out)) for w, xi in zip(row, x, strict=True)]
        for row, b, out in zip(w1, b1, hidden, strict=True)
    ]
    second = [
        [sum(row[j] * first[j][cell] for j in range(2)) + b / n for cell in range(n)] for row, b in zip(w2, b2, strict=True)
    ]
    assert hidden == [0.25, 0.0]

    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for parameter, numbers in zip(model.parameters(), (w1, b1, w2, b2), strict=True):
            parameter.copy_(torch.tensor(numbers, dtype=torch.float64))
    record: dict[str, Carried] = {}
    output = relevance_maps(model, torch.tensor([x]).double(), record=record)
    assert close(record["_1"].maps, torch.tensor([first], dtype=torch.float64))
    assert close(output.maps, torch.tensor([second], dtype=torch.float64))


def test_convolution_of_equation_4_9() -> None:
    """A 3x3 image, a 2x2 kernel and the fully connected weights W_f [9, 4] as the thesis prints them."""
    kernel, bias = randn(1, 1, 2, 2), randn(1, seed=2)
    a, b, c, d = kernel.flatten().tolist()
    w_f = torch.tensor(
        [[a, 0, 0, 0], [b, a, 0, 0], [0, b, 0, 0], [c, 0, a, 0], [d, c, b, a], [0, d, 0, b], [0, 0, c, 0], [0, 0, d, c],
         [0, 0, 0, d]], dtype=torch.float64,
    )  # fmt: skip
    x = randn(1, 1, 3, 3, seed=1)
    convolved = operators.conv(source(x), kernel, bias)
    degenerate = operators.linear(source(x.flatten(1)), w_f.T, bias.expand(4))
    assert close(convolved.value.flatten(), degenerate.value.flatten())
    assert close(convolved.maps.view(4, 9), degenerate.maps.view(4, 9))


def degenerate(weight: Tensor, size: list[int], stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """The fully connected weights [outputs, inputs] of a 2d convolution, entry by entry (T 4.5 to 4.9)."""
    outer, inner, kh, kw = weight.shape
    height, width = ((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, (kh, kw), strict=True))
    matrix = torch.zeros(outer, height, width, inner * groups, *size, dtype=torch.float64)
    for o, c, i, j in itertools.product(range(outer), range(inner), range(height), range(width)):
        for m, n in itertools.product(range(kh), range(kw)):
            row, column = i * stride - padding + m * dilation, j * stride - padding + n * dilation
            if 0 <= row < size[0] and 0 <= column < size[1]:
                matrix[o, i, j, o // (outer // groups) * inner + c, row, column] = weight[o, c, m, n]
    return matrix.flatten(3).flatten(0, 2)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1), (3, 1, 2, 4)])
def test_convolution_degenerates(stride: int, padding: int, dilation: int, groups: int) -> None:
    """Convolving the columns is the fully connected layer of T 4.9, carried columns included."""
    weight, bias = randn(8, 4 // groups, 3, 2), randn(8, seed=1)
    before = operators.linear(source(randn(1, 5, seed=2)), randn(4 * 6 * 5, 5, seed=3), randn(4 * 6 * 5, seed=4))
    image = operators.view(before, lambda v: v.view(1, 4, 6, 5))
    convolved = operators.conv(image, weight, bias, stride, padding, dilation, groups)
    matrix = degenerate(weight, [6, 5], stride, padding, dilation, groups)
    dense = operators.linear(before, matrix, bias.repeat_interleave(matrix.shape[0] // 8))
    assert close(convolved.value.flatten(1), dense.value)
    assert close(convolved.maps.flatten(1, -2), dense.maps)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1), (2, 1, 2, 4)])
def test_transposed_convolution_degenerates(stride: int, padding: int, dilation: int, groups: int) -> None:
    """Its fully connected weights are those of the convolution, transposed."""
    weight = randn(8, 4 // groups, 3, 2)
    full = [(6 - 1) * stride - 2 * padding + 2 * dilation + 1, (5 - 1) * stride - 2 * padding + dilation + 1]
    before = operators.linear(source(randn(1, 5, seed=2)), randn(8 * 6 * 5, 5, seed=3), randn(8 * 6 * 5, seed=4))
    image = operators.view(before, lambda v: v.view(1, 8, 6, 5))
    spread = operators.conv_transpose(image, weight, None, stride, padding, 0, groups, dilation)
    dense = operators.linear(before, degenerate(weight, full, stride, padding, dilation, groups).T)
    assert close(spread.value.flatten(1), dense.value)
    assert close(spread.maps.flatten(1, -2), dense.maps)


# Cells and constants --------------------------------------------------------------------------------------------------


def test_pixel_maps_are_the_channel_sums_of_element_maps() -> None:
    """The thesis merges colour channels, N = H*W; so does summing an element map over C."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)).double()
    x = randn(1, 3, 4, 6)
    elements, pixels = relevance_maps(model, x), relevance_maps(model, x, cells="pixels")
    assert pixels.maps.shape == (1, 5, 24)
    assert close(pixels.maps, elements.maps.view(1, 5, 3, 24).sum(2))


def test_ledger_keeps_constants_apart() -> None:
    """V = local part + beta/N, beta the share of every constant on the way."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3)).double()
    x = randn(1, 4)
    uniform, ledger = relevance_maps(model, x), relevance_maps(model, x, ledger=True)
    local, beta = ledger.maps[..., :-1], ledger.maps[..., -1:]
    assert ledger.conservation() <= 1e-15
    assert beta.abs().min() > 1e-3
    assert close(uniform.maps, local + beta / 4)


def test_piecewise_linear_nets_are_input_times_gradient() -> None:
    """For ReLU and max pooling the local part is x * dy/dx, which PyTorch's autograd finds the other way round."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.ReLU(), nn.Flatten(1)
    ).double()
    x = randn(1, 2, 6, 8)
    jacobian = torch.autograd.functional.jacobian(model, x)  # [1, O, 1, C, H, W]
    local = relevance_maps(model, x, ledger=True).maps[..., :-1]
    assert close(local.view(jacobian.shape), jacobian * x)


def test_several_inputs_share_one_set_of_cells() -> None:
    """N counts the elements of all inputs (T 3.7)."""

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.sum(1, keepdim=True) + 2 * b.flatten(1).sum(1, keepdim=True) + 6.0

    a, b = randn(1, 2), randn(1, 2, 2, seed=1)
    va, vb = relevance(Sum(), (a, b), torch.ones(1, 1))
    assert close(va, a + 1)
    assert close(vb, 2 * b + 1)


# Operators beyond the thesis ------------------------------------------------------------------------------------------


def test_product_and_quotient_by_hand() -> None:
    """`half` gives b/2 V_a + a/2 V_b; in a quotient the denominator is a coefficient."""
    a, b = source(torch.tensor([[3.0, 5.0]])), source(torch.tensor([[4.0, -2.0]]))
    b = Carried(b.value, b.maps.flip(-1), b.share)
    assert operators.mul(a, b).maps.tolist() == [[[6.0, 6.0], [-5.0, -5.0]]]
    assert operators.div(a, b).maps.tolist() == [[[0.75, 0.0], [0.0, -2.5]]]
    with pytest.raises(NotImplementedError, match="a constant over a carried value"):
        operators.div(1.0, b)


OPTIONS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.1, 0.4),
    "hardtanh": (-0.5, 0.7),
    "clamp": (-0.5, 0.7),
    "pow": (3,),
}
SHARP = {"relu", "relu6", "leaky_relu", "elu", "selu", "abs", "softshrink", "hardtanh", "threshold", "hardshrink"}
POINTS = (1e-3, -1e-3, 0.2, -0.2, 0.7, -0.7, 1.0, 2.9, 3.1, 8.0, 30.0, -2.5, -6.5, -40.0)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_pytorchs(name: str) -> None:
    """The definitions in many digits are PyTorch's functions, and their secants the divided differences of those."""
    options = OPTIONS.get(name, ())

    def f(z: float) -> float:
        return float(torch_function(name)(torch.tensor(z, dtype=torch.float64), *options))

    points = [z for z in POINTS if z > -1] if name == "log1p" else POINTS
    carried = operators.elementwise(source(torch.tensor([points], dtype=torch.float64)), name, *options)
    for z, value in zip(points, carried.value.flatten().tolist(), strict=True):
        assert value == pytest.approx(f(z), rel=1e-12, abs=1e-15)
        assert secant(name, z, *options) == pytest.approx((f(z) - f(0.0)) / z, rel=1e-11, abs=1e-12)
    assert carried.conservation() <= 1e-14


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - SHARP))
@pytest.mark.parametrize("z", [1e-9, -1e-9, 1e-160, -1e-160, 5e-324, -5e-324])
def test_secant_tends_to_the_slope_at_zero(name: str, z: float) -> None:
    """Smooth at 0: the secant at a tiny z is f'(0), to every digit that z leaves."""
    slope = slope_at_zero(name, *OPTIONS.get(name, ()))
    assert secant(name, z, *OPTIONS.get(name, ())) == pytest.approx(slope, rel=1e-8, abs=2e-9)


def test_secants_at_a_kink() -> None:
    """At z = 0 the slope is PyTorch's, whichever sign the zero has; beside it each side has its own."""
    for zero in (0.0, -0.0):
        assert secant("relu", zero) == 0
        assert secant("leaky_relu", zero, 0.25) == 0.25
        assert secant("elu", zero, 0.5) == 0.5
        assert secant("sigmoid", zero) == 0.25
    assert (secant("relu", 5e-324), secant("relu", -5e-324)) == (1, 0)
    assert (secant("leaky_relu", 5e-324, 0.25), secant("leaky_relu", -5e-324, 0.25)) == (1, 0.25)


POOLS = [
    (size, kernel, stride, padding, ceil_mode)
    for size, kernel, stride, padding, ceil_mode in itertools.product((4, 7), (1, 2, 3), (1, 2, 3), (0, 1), (False, True))
    if padding <= kernel // 2
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "ceil_mode"), POOLS)
def test_pools_are_pytorchs(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> None:
    """The explicit lists of positions give PyTorch's pools, and maps that conserve."""
    x = randn(1, 2, size, size + 1)
    for dilation in (1, 2):
        if dilation * (kernel - 1) < size + 2 * padding:
            best = operators.max_pool(2, source(x), kernel, stride, padding, dilation, ceil_mode)
            assert torch.equal(best.value, F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode))
            assert best.conservation() == 0
    for counted, divisor in ((True, None), (False, None), (True, 5)):
        mean = operators.avg_pool(2, source(x), kernel, stride, padding, ceil_mode, counted, divisor)
        assert close(mean.value, F.avg_pool2d(x, kernel, stride, padding, ceil_mode, counted, divisor))
        assert mean.conservation() <= 1e-15


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (None, 2)])
def test_adaptive_pools_are_pytorchs(size: tuple[int | None, int]) -> None:
    """Windows of unequal size."""
    x = randn(1, 2, 5, 7)
    best, mean = (pool(2, source(x), size) for pool in (operators.adaptive_max_pool, operators.adaptive_avg_pool))
    assert torch.equal(best.value, F.adaptive_max_pool2d(x, size))
    assert close(mean.value, F.adaptive_avg_pool2d(x, size))
    assert max(best.conservation(), mean.conservation()) <= 1e-15


def test_first_of_equals_wins() -> None:
    """On ties max pooling takes the first position in the order of rows, as PyTorch's indices do."""
    x = torch.tensor([[[[1.0, 2.0, 2.0], [2.0, 2.0, 1.0]]]])
    winner = operators.max_pool(2, source(x), (2, 3)).maps.flatten().nonzero().item()
    assert winner == F.max_pool2d(x, (2, 3), return_indices=True)[1].item() == 1


def test_in_place_operators_reach_every_alias() -> None:
    """`x += y` and `view.relu_()` write to x itself, so a later reader of x sees them."""

    class Aliased(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = 2 * x
            corner = x.view(x.size(0), 2, 2).transpose(1, 2)[:, 0]
            corner.relu_()
            y = x
            y += 10.0
            return x * 1

    x = torch.tensor([[-1.0, -2.0, -3.0, -4.0]]).double()
    carried = relevance_maps(Aliased(), x)
    assert carried.value.tolist() == Aliased()(x).tolist() == [[10.0, 6.0, 10.0, 2.0]]
    diagonal = torch.diag(torch.tensor([0.0, -4.0, 0.0, -8.0]).double())
    assert torch.equal(carried.maps[0], diagonal + 2.5)


def test_unknown_operator_is_refused() -> None:
    """No rule, no map."""

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumprod(x, 1)

    with pytest.raises(NotImplementedError, match="no rule for cumprod"):
        relevance_maps(Product(), randn(1, 3))


# Conservation, everywhere ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_node_conserves(case: Case) -> None:
    """T 3.12 for every neuron of every node; and the values carried along are the model's own."""
    record: dict[str, Carried] = {}
    carried = relevance_maps(case.module, case.x, record=record)
    with torch.no_grad():
        assert torch.allclose(carried.value, case.module(case.x.clone()), rtol=1e-11, atol=1e-11)
    assert max(node.conservation() for node in record.values()) <= 1e-12


# The nets and the data ------------------------------------------------------------------------------------------------


def test_thesis_nets() -> None:
    """Shapes and sizes of T 3.3.1."""
    mlp = nets.thesis_mlp()
    assert [tuple(p.shape) for p in mlp.parameters() if p.ndim == 2] == [(192, 784), (120, 192), (60, 120), (10, 60)]
    with torch.device("meta"):
        alexnet = nets.ThesisAlexNet()
    assert sum(p.numel() for p in alexnet.parameters()) == 36_925_322
    assert alexnet(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_thesis_mlp_conserves() -> None:
    """All 784 columns of all neurons of the thesis's perceptron."""
    torch.manual_seed(0)
    record: dict[str, Carried] = {}
    output = relevance_maps(nets.thesis_mlp(), torch.rand(1, 1, 28, 28), record=record)
    assert output.maps.shape == (1, 10, 784)
    assert max(node.conservation() for node in record.values()) <= 1e-12


@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.915), (56, 0.926)])
def test_trained_residual_nets(depth: int, accuracy: float) -> None:
    """The trained weights fit key by key, and the net is as good as its authors say."""
    model = nets.cifar_resnet(depth)
    images, labels = nets.cifar10_test()
    with torch.inference_mode():
        correct = (model(images).argmax(1) == labels).float().mean().item()
    assert math.isclose(correct, accuracy, abs_tol=0.002)


def test_trained_residual_net_conserves() -> None:
    """ResNet-20 on the middle of a test image, every neuron of every node, cell by cell."""
    images, _ = nets.cifar10_test(1)
    record: dict[str, Carried] = {}
    relevance_maps(nets.cifar_resnet(20), images[:, :, 10:22, 10:22], record=record)
    assert len(record) > 70
    assert max(node.conservation() for node in record.values()) <= 1e-12
