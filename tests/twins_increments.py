"""LID, DeepLIFT and changed gradients as the papers print them, on the networks of dense layers that `twins.py` has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twins import Average, Function, Layer, Residual, Weighted, Winner, proportional, run

# Increments -----------------------------------------------------------------------------------------------------------------


def jacobian(layer: Layer, a: Tensor) -> Tensor:
    """`D_ji = dY_j / dY_i` at one point."""
    if isinstance(layer, Weighted | Average):
        return layer.weight
    if isinstance(layer, Function):
        return torch.diag(layer.derivative(a))
    assert isinstance(layer, Winner)
    matrix = torch.zeros(len(layer.windows), len(a), dtype=a.dtype)
    for j, i in enumerate(layer.first(a)):
        matrix[j, i] = 1
    return matrix


def _even(layer: Winner, a: Tensor) -> Tensor:
    """The Jacobian of a max pool with even shares on ties: the mean over the choices that could be made."""
    matrix = torch.zeros(len(layer.windows), len(a), dtype=a.dtype)
    for j, tied in enumerate(layer.largest(a)):
        matrix[j, tied] = 1 / len(tied)
    return matrix


def lid_taylor(layers: Sequence[Layer], x: Tensor, reference: Tensor, r: Tensor) -> Tensor:
    """L 13: `R_i = sum_j R_j D_ji dY_i / dY_j` with the Jacobian at the input."""
    return _increments(layers, x, reference, r, lambda layer, a, there: jacobian(layer, a))


def lid_ig(layers: Sequence[Layer], x: Tensor, reference: Tensor, r: Tensor, steps: int) -> Tensor:
    """L 20, 21: the Jacobian of each layer is the mean over `Y_ref + k/n dY`, k = 1..n."""

    def averaged(layer: Layer, a: Tensor, there: Tensor) -> Tensor:
        total = torch.zeros_like(jacobian(layer, a))
        for k in range(1, steps + 1):
            point = there + k / steps * (a - there)
            total = total + (_even(layer, point) if isinstance(layer, Winner) else jacobian(layer, point))
        return total / steps

    return _increments(layers, x, reference, r, averaged)


def _increments(layers: Sequence[Layer], x: Tensor, reference: Tensor, r: Tensor,
                slope: Callable[[Layer, Tensor, Tensor], Tensor]) -> Tensor:  # fmt: skip
    values, others = run(layers, x), run(layers, reference)
    for position in reversed(range(len(layers))):
        layer, a, there = layers[position], values[position], others[position]
        change, gained = a - there, values[position + 1] - others[position + 1]
        if isinstance(layer, Residual):
            ratio = torch.where(r == 0, 0.0, r / torch.where(r == 0, 1.0, gained))
            r = change * ratio + _increments(layer.body, a, there, (gained - change) * ratio, slope)
        else:
            r = proportional(slope(layer, a, there) * change, gained, r)
    return r


def deeplift(layers: Sequence[Layer], x: Tensor, reference: Tensor, r: Tensor) -> Tensor:
    """DeepLIFT's rescale rule (Shrikumar et al. 2017; L 7): linear layers in proportion to `w dx`, activations pass R on.

    A max pool is, between the winner w at the input and the winner l at the reference, `max(x_w, x_l)`: each gets the part of
    the straight path on which it is ahead. They change places at `t = (r_l - r_w) / ((x_w - x_l) + (r_l - r_w))`. Winners
    that tie are taken together, `x_l` and the others being their means.
    """
    values, others = run(layers, x), run(layers, reference)
    for position in reversed(range(len(layers))):
        layer, a, there = layers[position], values[position], others[position]
        change, gained = a - there, values[position + 1] - others[position + 1]
        if isinstance(layer, Weighted | Average):
            r = proportional(layer.weight * change, gained, r)
        elif isinstance(layer, Residual):
            ratio = torch.where(r == 0, 0.0, r / torch.where(r == 0, 1.0, gained))
            r = change * ratio + deeplift(layer.body, a, there, (gained - change) * ratio)
        elif isinstance(layer, Winner):
            parts = torch.zeros(len(layer.windows), len(a), dtype=a.dtype)
            for j, (won, lost) in enumerate(zip(layer.largest(a), layer.largest(there), strict=True)):
                ahead = float(a[won].mean() - a[lost].mean()) if won != lost else 0.0
                behind = float(there[lost].mean() - there[won].mean()) if won != lost else 0.0
                time = behind / (ahead + behind) if ahead + behind > 0 else 0.0
                parts[j, won] += (1 - time) * change[won] / len(won)
                parts[j, lost] += time * change[lost] / len(lost)
            r = proportional(parts, gained, r)
    return r


# Gradients, and transposed passes that are changed ----------------------------------------------------------------------------


def gradient(layers: Sequence[Layer], x: Tensor, v: Tensor, at_relu: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """S 4: the chain rule, layer by layer. `at_relu(a, v)` replaces the transpose of a ReLU with input a."""
    values = run(layers, x)
    for position in reversed(range(len(layers))):
        layer, a = layers[position], values[position]
        if isinstance(layer, Residual):
            v = v + gradient(layer.body, a, v, at_relu)
        elif isinstance(layer, Function) and at_relu is not None and layer.name == "ReLU":
            v = at_relu(a, v)
        else:
            v = jacobian(layer, a).T @ v
    return v


def guided(a: Tensor, v: Tensor) -> Tensor:
    """Springenberg et al. 2015, eq. 1 (S 2.1.2.1): what is pulled passes where it and the ReLU's input are positive."""
    return torch.tensor([float(u) if u > 0 and z > 0 else 0.0 for z, u in zip(a, v, strict=True)], dtype=torch.float64)


def deconvolved(a: Tensor, v: Tensor) -> Tensor:
    """S 10: what is pulled is itself rectified; the ReLU's input does not matter."""
    return torch.tensor([float(u) if u > 0 else 0.0 for u in v], dtype=torch.float64)


def rectified(hundredths: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Kim et al. 2019: passes where activation times gradient is above the layer's q-th percentile, `q = hundredths / 100`.

    The percentile is the smallest element that q of all do not exceed.
    """

    def at_relu(a: Tensor, v: Tensor) -> Tensor:
        product = [max(float(z), 0.0) * float(u) for z, u in zip(a, v, strict=True)]
        ordered = sorted(product)
        threshold = next(t for k, t in enumerate(ordered, 1) if 100 * k >= hundredths * len(ordered))
        return torch.tensor([float(u) if p > threshold else 0.0 for p, u in zip(product, v, strict=True)], dtype=torch.float64)

    return at_relu
