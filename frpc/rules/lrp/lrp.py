"""Layer-wise relevance propagation: how a layer with weights distributes the relevance of its neurons.

With multipliers ``G`` (``R = G a``) every LRP rule that is linear in R is a choice of M: the layer with other weights, scaled so
that what a neuron has is what it gives. ``z`` is the layer's output, ``s(z) = z + eps sgn(z)`` with sgn(0) = +1. A contribution
``a_i w_ij`` is positive where both have one sign, so for signed inputs the positive part of a layer is ``W+ a+ + W- a-``.

Rules of a first layer (z-box, w-square, flat) share relevance out without looking at the value of the input; their transposed map
gives relevance itself, not a multiplier, and they exist in that direction only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.errors import RuleDeclinedError
from frpc.maps import BatchedMatMul, Compose, Conv, LinearMap, MatMul, Scale, Total, scaled
from frpc.rules.forms.linear import per_channel
from frpc.rules.table import Affine, Call, Operand

__all__ = [
    "Bound",
    "Layer",
    "alpha_beta",
    "epsilon",
    "factor_beside",
    "flat",
    "gamma",
    "layer_of",
    "stabilized",
    "w_square",
    "z_box",
    "z_plus",
]

aten = torch.ops.aten

Bound = float | Tensor
LayerRule = Callable[..., Affine]


_FACTORS = {  # of products of matrices the two factors, and what is added
    aten.linear.default: ("input", "weight", "bias"),
    aten.mm.default: ("self", "mat2", ""),
    aten.bmm.default: ("self", "mat2", ""),
    aten.mv.default: ("self", "vec", ""),
    aten.matmul.default: ("self", "other", ""),
    aten.addmm.default: ("mat1", "mat2", "self"),
    aten.baddbmm.default: ("batch1", "batch2", "self"),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A call that multiplies by parameters, ``z = W a + b``.

    Attributes:
        name: the operand that carries.
        a: its value.
        value: ``z``, without the summand if that carries too.
        weight: the parameters, with all numeric factors of the call.
        bias: broadcastable to the result, or None.
        with_weight: the linear map of other parameters of the same shape.
        sized: that map takes operands of the call's own size only, not of one sample.
        added: an operand that carries and is added to the layer's output, with its map; None if there is none.
    """

    name: Operand
    a: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    with_weight: Callable[[Tensor], LinearMap]
    sized: bool = False
    added: tuple[Operand, LinearMap] | None = None

    def one(self) -> Tensor:
        """One sample of the operand, or all where one will not do: what stands for every input at once looks like it."""
        return self.a if self.sized else self.a[:1]

    def affine(self, linear_map: LinearMap, *, direct: bool = False, joined: bool = False) -> Affine:
        """The result of a rule: the map of the layer's operand, and the map of the summand."""
        if self.added is None:
            return Affine({self.name: linear_map}, direct=direct, joined=joined)
        if direct or joined:
            raise RuleDeclinedError(
                "what is added to the layer comes from the input too: write the product and the sum as two operators"
            )
        return Affine({self.name: linear_map, self.added[0]: self.added[1]})


def factor_beside(op: Any, carried: Collection[Operand]) -> str | None:
    """Returns the argument that a call multiplies what it carries by, if the call may be a layer with weights.

    That is a convolution, or a product of matrices of which one carries; something that carries may be added to it.
    """
    if op is aten.convolution.default:
        return "weight" if set(carried) == {"input"} else None
    first, second, _ = _FACTORS.get(op, ("", "", ""))
    if (first in carried) == (second in carried):
        return None
    return second if first in carried else first


def layer_of(call: Call) -> Layer:
    """Reads a convolution, a linear layer, or a product with constant matrices on either side."""
    given, result = call.args, call.value.shape
    if call.op is aten.convolution.default:
        a, weight, bias = given["input"], given["weight"], given["bias"]
        options: list[Any] = [given[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
        shift = None if bias is None else per_channel(bias, a.dim())
        return Layer("input", a, call.value, weight, shift, lambda w: Conv(w, *(*options, a.shape, result)))
    first, second, added = _FACTORS[call.op]
    left = not call.carries(first)  # the parameters stand on the left
    name, other = (second, first) if left else (first, second)
    a, weight = given[name], given[other]
    if call.op is aten.linear.default and left:
        raise RuleDeclinedError("its weights come from the input, but what they multiply does not: write it as a matrix product")
    plain = not left and weight.dim() == 2 and a.dim() > 1
    if plain and call.op is not aten.linear.default:
        weight = weight.t()

    def with_weight(w: Tensor) -> LinearMap:
        return MatMul(w, a.shape) if plain else BatchedMatMul(w, a.shape, result, left)

    alpha, beta, summand = given.get("alpha", 1), given.get("beta", 1), given.get(added)
    weight = weight if alpha == 1 else weight * alpha
    if summand is None or beta == 0:  # with beta = 0 PyTorch does not look at it
        return Layer(name, a, call.value, weight, None, with_weight, not plain)
    if call.carries(added):
        beside = (added, scaled(beta, summand.shape, result))
        return Layer(name, a, with_weight(weight).push(a), weight, None, with_weight, not plain, beside)
    return Layer(name, a, call.value, weight, summand if beta == 1 else summand * beta, with_weight, not plain)


def stabilized(z: Tensor, eps: float) -> Tensor:
    """``z + eps sgn(z)``, with sgn(0) = +1."""
    return z + torch.where(z >= 0, torch.full_like(z, eps), -eps)  # of two numbers, where would make float32


def _rule(name: str, function: Callable[[Call, Layer], Affine]) -> LayerRule:
    def rule(call: Call, *arguments: Any) -> Affine:
        return function(call, layer_of(call))

    rule.__name__ = name
    return rule


def epsilon(eps: float) -> LayerRule:
    """``M = diag(z / s(z)) W``: LRP-epsilon, and LRP-0 for eps = 0. The bias and eps absorb.

    Source: Bach et al. 2015, eqs. 56, 60; S 2.1.2.3; L 5.
    """

    def build(call: Call, layer: Layer) -> Affine:
        m = layer.with_weight(layer.weight)
        if eps == 0:
            return layer.affine(m)
        # z / (z + eps sgn z) = |z| / (|z| + eps); in front of a ReLU only z > 0 counts, and relu(z) is there already.
        size = torch.relu(layer.value) if _rectified(call, layer) else layer.value.abs()
        return layer.affine(Compose(m, Scale(size / (size + eps), m.result)))

    return _rule("epsilon" if eps else "lrp_0", build)


def _parts(call: Call, layer: Layer, on_positive: Tensor, on_negative: Tensor) -> LinearMap:
    """The layer with one set of weights on inputs above 0 and another on those below."""
    upper = layer.with_weight(on_positive)
    if layer.name in call.positive:
        return upper
    above = Compose(Scale((layer.a > 0).to(layer.a.dtype), layer.a.shape), upper)
    below = Compose(Scale((layer.a < 0).to(layer.a.dtype), layer.a.shape), layer.with_weight(on_negative))
    return Total([above, below])


def _rectified(call: Call, layer: Layer) -> bool:
    """Says whether nothing comes back to where the layer's own output is negative."""
    return call.rectified and layer.added is None


def _shared(call: Call, layer: Layer, part: LinearMap, total: Tensor, share: float) -> LinearMap:
    """``share diag(z / total) part``; ``total`` is stabilized."""
    # In front of a ReLU only z > 0 counts, and relu(z) is there already: its gate is then in the quotient too.
    scale = (torch.relu(layer.value) if _rectified(call, layer) else layer.value) / total
    return Compose(part, Scale(scale if share == 1 else share * scale, part.result))


def z_plus(eps: float) -> LayerRule:
    """``M = diag(z / z+) W+``: relevance goes to what raised a neuron. The positive part of the bias absorbs.

    Source: Montavon et al. 2017, z+ rule; L 9; signed inputs as alpha-beta with (1, 0), S 20.
    """
    return _rule("z_plus", lambda call, layer: _alpha_beta(call, layer, 1.0, 0.0, eps))


def alpha_beta(alpha: float, beta: float, eps: float) -> LayerRule:
    """``M = alpha diag(z / z+) W+ - beta diag(z / z-) W-``; each part of the bias absorbs in its part.

    Source: Bach et al. 2015, eq. 60; S 18.
    """
    return _rule("alpha_beta", lambda call, layer: _alpha_beta(call, layer, alpha, beta, eps))


def _alpha_beta(call: Call, layer: Layer, alpha: float, beta: float, eps: float) -> Affine:
    raising, lowering = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    maps: list[LinearMap] = []
    for share, on_positive, on_negative, low, high, sign in (
        (alpha, raising, lowering, 0.0, None, 1.0),
        (-beta, lowering, raising, None, 0.0, -1.0),
    ):
        if share:
            part = _parts(call, layer, on_positive, on_negative)
            # The sum has one sign, so the stabilizer goes with the bias: nothing more is added to the layer's output.
            shift = sign * eps if layer.bias is None else layer.bias.clamp(low, high) + sign * eps
            maps.append(_shared(call, layer, part, part.push(layer.a) + shift, share))
    return layer.affine(maps[0] if len(maps) == 1 else Total(maps))


def gamma(factor: float, eps: float) -> LayerRule:
    """``w + gamma w+`` in place of the weights, rescaled to z; for neurons below 0 ``w + gamma w-``, and inputs below 0 mirrored.

    Source: Montavon et al. 2019, LRP-gamma; for signed inputs Andeol et al. 2021, as zennit has it.
    """

    def build(call: Call, layer: Layer) -> Affine:
        raised = layer.weight + factor * layer.weight.clamp(min=0)
        lowered = layer.weight + factor * layer.weight.clamp(max=0)
        maps: list[LinearMap] = []
        for on_positive, on_negative, low, high, mine in (
            (raised, lowered, 0.0, None, layer.value > 0),
            (lowered, raised, None, 0.0, layer.value < 0),
        ):
            part = _parts(call, layer, on_positive, on_negative)
            total = part.push(layer.a)
            total = total if layer.bias is None else total + (layer.bias + factor * layer.bias.clamp(low, high))
            share = torch.where(mine, layer.value / stabilized(total, eps), 0.0)
            maps.append(Compose(part, Scale(share, part.result)))
            if _rectified(call, layer):  # nothing comes back to neurons below 0
                return layer.affine(maps[0])
        return layer.affine(Total(maps))

    return _rule("gamma", build)


class Direct(LinearMap):
    """A first layer's transposed map: relevance of the input from multipliers of the layer's output."""

    pushes = False

    def __init__(self, weighted: LinearMap, pulled: Callable[[Tensor], Tensor]) -> None:
        self.operand, self.result = weighted.operand, weighted.result
        self.weighted, self.pulled = weighted, pulled

    def pull(self, v: Tensor) -> Tensor:
        return self.pulled(v)

    def cost(self, itemsize: int = 4) -> Any:
        return self.weighted.cost(itemsize)


def _unsigned(call: Call, layer: Layer, weight: Tensor, eps: float) -> Affine:
    """Relevance in proportion to weights alone."""
    m = layer.with_weight(weight)
    share = layer.value / stabilized(m.push(torch.ones_like(layer.one())), eps)
    return layer.affine(Direct(m, lambda v: m.pull(v * share)), direct=True)


def w_square(eps: float) -> LayerRule:
    """``R_i = sum_j w_ij^2 / sum_i w_ij^2 R_j``: inputs of any range. Nothing absorbs but eps.

    Source: Montavon et al. 2017, w^2 rule.
    """
    return _rule("w_square", lambda call, layer: _unsigned(call, layer, layer.weight * layer.weight, eps))


def flat(eps: float) -> LayerRule:
    """``R_i = sum_j R_j / n``: all inputs of a neuron get the same share. Only eps absorbs relevance.

    Source: Lapuschkin et al. 2019, flat rule.
    """
    return _rule("flat", lambda call, layer: _unsigned(call, layer, torch.ones_like(layer.weight), eps))


def z_box(low: Bound, high: Bound, eps: float) -> LayerRule:
    """``R_i = sum_j (x_i w_ij - l w+ - h w-) / sum_i (...) R_j`` for inputs between l and h. Nothing absorbs but eps.

    Source: Montavon et al. 2017, z-beta rule.
    """

    def build(call: Call, layer: Layer) -> Affine:
        bounds = [torch.as_tensor(b, dtype=layer.a.dtype, device=layer.a.device).expand_as(layer.one()) for b in (low, high)]
        m = layer.with_weight(layer.weight)
        raised, lowered = layer.with_weight(layer.weight.clamp(min=0)), layer.with_weight(layer.weight.clamp(max=0))
        contribution = layer.value if layer.bias is None else layer.value - layer.bias
        total = contribution - raised.push(bounds[0]) - lowered.push(bounds[1])
        share = layer.value / stabilized(total, eps)

        def pulled(v: Tensor) -> Tensor:
            v = v * share
            return layer.a * m.pull(v) - bounds[0] * raised.pull(v) - bounds[1] * lowered.pull(v)

        return layer.affine(Direct(m, pulled), direct=True)

    return _rule("z_box", build)
