"""The rules of the propagation family, written from their papers: dense matrices, one sample, relevance R handed down by layers.

Nothing here is fast, and nothing is shared with frpc. A network is a list of layers; a convolution is a matrix `[O, I]` found
column by column. Relevance is redistributed in the form the papers print, `R_i = sum_j (share of i in j) R_j`, where frpc
pulls multipliers. L is the LID paper, S the survey, with their equation numbers.

Shapes: values and relevances are vectors, `[I]` or `[O]`; contributions are `[O, I]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Networks as lists of dense layers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    """`z = W a + b`, a convolution or a dense layer."""

    weight: Tensor
    bias: Tensor
    convolution: bool

    def __call__(self, a: Tensor) -> Tensor:
        return self.weight @ a + self.bias


@dataclass(frozen=True)
class Average:
    """`z = W a` without parameters of its own: average pooling."""

    weight: Tensor

    def __call__(self, a: Tensor) -> Tensor:
        return self.weight @ a


@dataclass(frozen=True)
class Winner:
    """`z_j` is the largest of a window's elements, the first of them on ties."""

    windows: list[list[int]]

    def largest(self, a: Tensor) -> list[list[int]]:
        """All the largest elements of each window: more than one on ties."""
        return [[i for i in window if a[i] == max(a[k] for k in window)] for window in self.windows]

    def first(self, a: Tensor) -> list[int]:
        return [max(window, key=lambda i: (float(a[i]), -i)) for window in self.windows]

    def __call__(self, a: Tensor) -> Tensor:
        return a[self.first(a)]


@dataclass(frozen=True)
class Function:
    """`z_j = f(a_j)`, with its derivative."""

    name: str

    def __call__(self, a: Tensor) -> Tensor:
        return _FUNCTIONS[self.name][0](a)

    def derivative(self, a: Tensor) -> Tensor:
        return _FUNCTIONS[self.name][1](a)


@dataclass(frozen=True)
class Residual:
    """`z = a + body(a)`."""

    body: list[Layer]

    def __call__(self, a: Tensor) -> Tensor:
        return a + run(self.body, a)[-1]


Layer = Weighted | Average | Winner | Function | Residual


def _gelu_slope(a: Tensor) -> Tensor:
    density = torch.exp(-a * a / 2) / (2 * torch.pi) ** 0.5
    return 0.5 * (1 + torch.erf(a / 2**0.5)) + a * density


def _sigmoid(a: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-a))


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "ReLU": (lambda a: torch.where(a > 0, a, torch.zeros_like(a)), lambda a: (a > 0).to(a.dtype)),
    "Tanh": (torch.tanh, lambda a: 1 - torch.tanh(a) ** 2),
    "Sigmoid": (_sigmoid, lambda a: _sigmoid(a) * (1 - _sigmoid(a))),
    "SiLU": (lambda a: a * _sigmoid(a), lambda a: _sigmoid(a) * (1 + a * (1 - _sigmoid(a)))),
    "GELU": (lambda a: a * 0.5 * (1 + torch.erf(a / 2**0.5)), _gelu_slope),
}


class Skip(nn.Module):
    """A residual block, for the networks under test."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def matrix(module: Callable[[Tensor], Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`W` and `b` of an affine module, column by column."""
    size = int(torch.Size(shape).numel())
    shift = module(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
    columns = []
    for i in range(size):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[i] = 1
        columns.append(module(unit.reshape(1, *shape)).flatten() - shift)
    return torch.stack(columns, 1), shift


def windows(pool: nn.MaxPool2d, shape: Sequence[int]) -> list[list[int]]:
    """The elements that each output of a max pool looks at, padding left out."""
    channels, height, width = shape
    kernel, stride, padding = int(pool.kernel_size), int(pool.stride), int(pool.padding)
    rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    found = []
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                places = [(i * stride - padding + m, j * stride - padding + n) for m in range(kernel) for n in range(kernel)]
                inside = [(h, w) for h, w in places if 0 <= h < height and 0 <= w < width]
                found.append([(c * height + h) * width + w for h, w in inside])
    return found


def dense(model: nn.Sequential, shape: Sequence[int]) -> list[Layer]:
    """A float64 network in evaluation mode as a list of layers; batch norm is merged into the layer before it."""
    layers: list[Layer] = []
    with torch.no_grad():
        for module in model:
            assert isinstance(module, nn.Module)
            layers += _layers(module, shape, layers)
            shape = list(module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])
    return layers


def _layers(module: nn.Module, shape: Sequence[int], before: list[Layer]) -> list[Layer]:
    if isinstance(module, nn.BatchNorm2d):
        last = before.pop()
        assert isinstance(last, Weighted)
        weight, bias = matrix(module, shape)
        return [Weighted(weight @ last.weight, weight @ last.bias + bias, last.convolution)]
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return [Weighted(*matrix(module, shape), not isinstance(module, nn.Linear))]
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return [Average(matrix(module, shape)[0])]
    if isinstance(module, nn.MaxPool2d):
        return [Winner(windows(module, shape))]
    if isinstance(module, Skip):
        return [Residual(dense(module.body, shape))]
    return [] if isinstance(module, nn.Flatten) else [Function(type(module).__name__)]


def run(layers: Sequence[Layer], a: Tensor) -> list[Tensor]:
    """The values before every layer, and the output."""
    values = [a]
    for layer in layers:
        values.append(layer(values[-1]))
    return values


# Layer-wise relevance propagation: how a layer with weights shares out R ----------------------------------------------------

Share = Callable[[Weighted, Tensor, Tensor], Tensor]


def stabilized(z: Tensor, eps: float) -> Tensor:
    """`z + eps sgn(z)`, sgn(0) = +1."""
    return torch.tensor([float(v) + (eps if v >= 0 else -eps) for v in z], dtype=torch.float64)


def proportional(contributions: Tensor, total: Tensor, r: Tensor) -> Tensor:
    """`R_i = sum_j contribution_ij / total_j R_j`; a neuron without relevance gives none."""
    ratio = torch.where(r == 0, 0.0, r / torch.where(r == 0, 1.0, total))
    return (contributions * ratio[:, None]).sum(0)


def epsilon(eps: float) -> Share:
    """`a_i w_ij / (z_j + eps sgn z_j)`. Bach et al. 2015, eqs. 56 to 58; L 5 for eps = 0."""
    return lambda layer, a, r: proportional(layer.weight * a, stabilized(layer(a), eps), r)


def alpha_beta(alpha: float, beta: float, eps: float) -> Share:
    """S 18: `alpha z_jk+ / z_k+ - beta z_jk- / z_k-`, each part of the bias in its own sum."""

    def share(layer: Weighted, a: Tensor, r: Tensor) -> Tensor:
        z = layer.weight * a
        raising, lowering = torch.where(z > 0, z, 0.0), torch.where(z < 0, z, 0.0)
        above = raising.sum(1) + torch.where(layer.bias > 0, layer.bias, 0.0)
        below = lowering.sum(1) + torch.where(layer.bias < 0, layer.bias, 0.0)
        positive = proportional(raising, stabilized(above, eps), r)
        return alpha * positive - (beta * proportional(lowering, stabilized(below, eps), r) if beta else 0.0)

    return share


def z_plus(eps: float) -> Share:
    """L 9 for inputs that are not negative; S 20 (alpha 1, beta 0) for all."""
    return alpha_beta(1.0, 0.0, eps)


def gamma(factor: float, eps: float) -> Share:
    """`a w + gamma (a w)+` over its sum (Montavon et al. 2019); where z < 0, `(a w)-` instead (Andeol et al. 2021)."""

    def share(layer: Weighted, a: Tensor, r: Tensor) -> Tensor:
        z, value = layer.weight * a, layer(a)
        parts, total = torch.zeros_like(z), torch.ones_like(value)
        for j in range(len(value)):
            sign = 1.0 if value[j] > 0 else -1.0
            if value[j] != 0:
                favoured, bias = torch.where(z[j] * sign > 0, z[j], 0.0), layer.bias[j]
                parts[j] = z[j] + factor * favoured
                total[j] = parts[j].sum() + bias + (factor * bias if bias * sign > 0 else 0.0)
        return proportional(parts, stabilized(total, eps), r)

    return share


def w_square(eps: float) -> Share:
    """`w_ij^2 / sum_i w_ij^2`. Montavon et al. 2017, w^2 rule."""
    return lambda layer, a, r: proportional(layer.weight**2, stabilized((layer.weight**2).sum(1), eps), r)


def flat(eps: float) -> Share:
    """`1 / n` for each of the n inputs a neuron is connected with. Lapuschkin et al. 2019."""

    def share(layer: Weighted, a: Tensor, r: Tensor) -> Tensor:
        connected = (layer.weight != 0).to(a.dtype)
        return proportional(connected, stabilized(connected.sum(1), eps), r)

    return share


def z_box(low: Tensor, high: Tensor, eps: float) -> Share:
    """`x w - l w+ - h w-` over its sum. Montavon et al. 2017, z-beta rule."""

    def share(layer: Weighted, a: Tensor, r: Tensor) -> Tensor:
        w = layer.weight
        parts = w * a - torch.where(w > 0, w, 0.0) * low - torch.where(w < 0, w, 0.0) * high
        return proportional(parts, stabilized(parts.sum(1), eps), r)

    return share


def lrp(layers: Sequence[Layer], x: Tensor, r: Tensor, dense_layer: Share, convolution: Share | None = None,
        first: Share | None = None) -> Tensor:  # fmt: skip
    """Relevance of the input: one rule for dense layers, perhaps another for convolutions and for the layer that reads the input.

    Activations pass R on unchanged, a max pool gives it to the winner, sums and averages share it out in proportion (L 2.2).
    """
    values = run(layers, x)
    for position in reversed(range(len(layers))):
        layer, a = layers[position], values[position]
        if isinstance(layer, Weighted):
            chosen = convolution if convolution is not None and layer.convolution else dense_layer
            r = (first if first is not None and position == 0 else chosen)(layer, a, r)
        elif isinstance(layer, Average):
            r = proportional(layer.weight * a, layer(a), r)
        elif isinstance(layer, Winner):
            r = _placed(r, layer.first(a), a)
        elif isinstance(layer, Residual):
            ratio = torch.where(r == 0, 0.0, r / torch.where(r == 0, 1.0, layer(a)))
            r = a * ratio + lrp(layer.body, a, run(layer.body, a)[-1] * ratio, dense_layer, convolution)
    return r


def _placed(v: Tensor, places: Sequence[int], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for j, i in enumerate(places):
        total[i] += v[j]
    return total


# Where relevance starts: R of the logits of one sample, for class c -----------------------------------------------------------


def probabilities(z: Tensor) -> list[float]:
    weights = [float(torch.exp(v - z.max())) for v in z]
    return [w / sum(weights) for w in weights]


def softmax_gradient(z: Tensor, c: int) -> Tensor:
    """L 10, S 26: `P_c (1 - P_c)` on c, `-P_c P_i` on the others."""
    p = probabilities(z)
    return torch.tensor([p[c] * (1 - p[c]) if i == c else -p[c] * p[i] for i in range(len(p))], dtype=torch.float64)


def top(name: str, z: Tensor, c: int, reference: Tensor | None = None, steps: int = 10) -> Tensor:
    """`R(Y^L)`: L table 2, S 24 to 26. Without a reference `dZ = Z`."""
    there = torch.zeros_like(z) if reference is None else reference
    change, one = z - there, torch.zeros_like(z)
    one[c] = 1
    if name == "logit":
        return one * change
    if name == "probability":
        return one * probabilities(z)[c]
    if name == "contrastive":
        others = [-float(change[c]) / (len(z) - 1)] * len(z)
        return torch.tensor([float(change[c]) if i == c else others[i] for i in range(len(z))], dtype=torch.float64)
    if name == "softmax_gradient":
        return softmax_gradient(z, c)
    if name == "softmax_taylor":
        return softmax_gradient(z, c) * change
    assert name == "softmax_integrated"
    slopes = [softmax_gradient(there + k / steps * change, c) for k in range(1, steps + 1)]
    return sum(slopes[1:], slopes[0]) / steps * change


# Attention ------------------------------------------------------------------------------------------------------------------


def attn_lrp(x: Tensor, r: Tensor, query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """AttnLRP through `softmax(Q K^T / sqrt(d)) V` with Q, K, V linear in the tokens x `[T, D]` (Achtibat et al. 2024).

    Products: half to each factor (eq. 15). Softmax: `R_i = z_i (R'_i - s_i sum_j R'_j)` (eq. 13). Linear: epsilon (eq. 8).
    """
    d = query.shape[0] ** 0.5
    q, k, v = x @ query.T, x @ key.T, x @ value.T
    scores = q @ k.T / d
    attention = torch.stack([torch.tensor(probabilities(row), dtype=torch.float64) for row in scores])
    out, count = attention @ v, len(x)
    on_attention, on_value = torch.zeros_like(attention), torch.zeros_like(v)
    for j in range(count):
        for i in range(count):
            for p in range(v.shape[1]):
                part = attention[j, i] * v[i, p] * r[j, p] / (2 * out[j, p])
                on_attention[j, i] += part
                on_value[i, p] += part
    on_scores = torch.stack([scores[j] * (on_attention[j] - attention[j] * on_attention[j].sum()) for j in range(count)])
    on_query, on_key = torch.zeros_like(q), torch.zeros_like(k)
    for j in range(count):
        for i in range(count):
            for p in range(q.shape[1]):
                part = q[j, p] * k[i, p] / d * on_scores[j, i] / (2 * scores[j, i])
                on_query[j, p] += part
                on_key[i, p] += part
    total = torch.zeros_like(x)
    for weight, given in ((query, on_query), (key, on_key), (value, on_value)):
        layer = Weighted(weight, torch.zeros(len(weight), dtype=torch.float64), False)
        total += torch.stack([epsilon(eps)(layer, x[t], given[t]) for t in range(count)])
    return total
