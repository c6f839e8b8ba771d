"""Rules that change the transposed pass: the value pulled through a ReLU depends on its own sign.

They are not linear in what is pulled, so they have no forward direction, and what they give is a picture of sensitivity, not an
account: nothing is conserved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frpc.maps import LinearMap
from frpc.rules.increments.increments import increment_rule
from frpc.rules.increments.paths import Path, derivative
from frpc.rules.table import Affine, Call, Rule, traits_of

__all__ = ["deconvnet_relu", "guided_relu", "rectified_relu", "rectifying_rule"]

aten = torch.ops.aten


def rectifying_rule(op: Any, function: Callable[..., Affine], formula: str, source: str) -> Rule | None:
    """Returns a rule for an operator that sets negative values to 0, as ReLU does; None for one that never does.

    Some do so only with certain arguments: ReLU6 reaches a graph as ``hardtanh`` from 0 to 6, and ``hardtanh`` from -1 to 1 is no
    ReLU. Calls of those get the Jacobian.
    """
    rectifies, standard = traits_of(op).rectifies, increment_rule(op, Path())
    if rectifies is None or standard is None:
        return None

    def rule(call: Call, *arguments: Any) -> Affine:
        return function(call) if rectifies(call.args) else standard(call)

    rule.__name__ = function.__name__
    return Rule(op, rule, standard.carries, formula, source)


class Rectified(LinearMap):
    """A transposed pass ``v -> function(v)`` that is not linear."""

    pushes = False

    def __init__(self, value: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self.operand = self.result = value.shape
        self.function = function

    def pull(self, v: Tensor) -> Tensor:
        return self.function(v)


def guided_relu(call: Call, *arguments: Any) -> Affine:
    """``v [z > 0] [v > 0]``. Source: Springenberg et al. 2015."""
    z = call.value
    if call.op is aten.relu.default:
        return Affine({"self": Rectified(z, lambda v: v.clamp(min=0) * (z > 0))})
    slope = _slope(call)
    return Affine({"self": Rectified(z, lambda v: v.clamp(min=0) * slope)})


def _slope(call: Call) -> Tensor:
    """The derivative of a ReLU that is bounded above too."""
    rest = {name: value for name, value in call.args.items() if name != "self"}
    return derivative(lambda u: call.op(self=u, **rest), call.args["self"])


def deconvnet_relu(call: Call, *arguments: Any) -> Affine:
    """``v [v > 0]``. Source: Zeiler & Fergus 2014; S 9-11."""
    return Affine({"self": Rectified(call.value, lambda v: v.clamp(min=0))})


def rectified_relu(q: float) -> Callable[..., Affine]:
    """``v [z v > t]``, t the q-quantile of ``z v`` over each sample's layer. Source: Kim et al. 2019, RectGrad."""

    def rectified_gradient(call: Call, *arguments: Any) -> Affine:
        z = call.value
        cells = math.prod(int(n) for n in z.shape[1:])
        rank = max(1, math.ceil(round(q * cells, 9)))  # 0.07 * 100 is 7.000000000000001

        def pulled(v: Tensor) -> Tensor:
            product = z * v
            lead = v.dim() - z.dim() + 1
            threshold = product.flatten(lead).kthvalue(rank, -1).values
            return v * (product > threshold.reshape([*threshold.shape, *[1] * (z.dim() - 1)]))

        return Affine({"self": Rectified(z, pulled)})

    return rectified_gradient
