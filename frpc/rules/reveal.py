"""DeepLIFT's reveal-cancel rule: a layer with weights and the activation behind it, taken together.

The rescale rule gives an activation one multiplier, so that contributions which cancel each other in front of it vanish together.
Here the positive and the negative part of what reaches the activation get multipliers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.affine import Affine, Call, Rule
from frpc.maps import Compose, Identity, LinearMap, Scale, Total
from frpc.rules.gradients import LID
from frpc.rules.lrp import Layer, layer_of
from frpc.rules.ruleset import Site
from frpc.torch_compat import schema_of

__all__ = ["DeepLiftRevealCancel"]

SOURCE = "Shrikumar et al. 2017, reveal-cancel rule"


@dataclass(frozen=True)
class DeepLiftRevealCancel(LID):
    """DeepLIFT with the reveal-cancel rule in layers that one activation reads, the rescale rule elsewhere.

    With ``dx+`` and ``dx-`` the positive and negative part of a neuron's increment, the activation's increment is shared as
    ``dy+ = (f(r + dx+) - f(r) + f(r + dx) - f(r + dx-)) / 2`` and ``dy-`` likewise; ``dy+ / dx+`` and ``dy- / dx-`` multiply the
    positive and the negative contributions. The layer's own neurons then have no single multiplier: ask for the activation's.

    Exact when: always; relevance sums to ``f(x) - f(x_ref)``.

    Source: Shrikumar et al. 2017, section 3.5.3.
    """

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the reveal-cancel rule for a layer with an activation behind it; the activation itself then passes."""
        if site.weighted and site.behind is not None:
            return Rule(site.op, _reveal(site.behind), ("input", "self", "mat1"), "dy+/dx+ W+, dy-/dx- W-", SOURCE)
        if site.before:
            name = str(schema_of(site.op).arguments[0].name)
            return Rule(site.op, _passed, (name,), "with the layer in front of it", SOURCE)
        return super().rule_for(site)


def _passed(call: Call, *arguments: Any) -> Affine:
    return Affine({str(schema_of(call.op).arguments[0].name): Identity(call.value.shape)})


def _reveal(activation: Any) -> Any:
    """Returns the rule of a layer that ``activation`` reads."""

    def reveal_cancel(call: Call, *arguments: Any) -> Affine:
        assert call.reference is not None
        layer = layer_of(call)
        d = layer.a - call.reference.args[str(layer.name)]
        raising, lowering = _part(layer, d, 1.0), _part(layer, d, -1.0)
        up, down, r = raising.push(d), lowering.push(d), call.reference.value
        base, top = activation(r), activation(r + up + down)
        plus, minus = activation(r + up), activation(r + down)
        risen, fallen = 0.5 * (plus - base + top - minus), 0.5 * (minus - base + top - plus)
        terms: list[LinearMap] = [
            Compose(raising, Scale(_ratio(risen, up), raising.result)),
            Compose(lowering, Scale(_ratio(fallen, down), lowering.result)),
        ]
        return Affine({layer.name: Total(terms)}, joined=True)

    return reveal_cancel


def _part(layer: Layer, d: Tensor, sign: float) -> LinearMap:
    """The contributions ``w d`` of one sign: weights of that sign on increments above 0, of the other on those below."""
    same = layer.with_weight((sign * layer.weight).clamp(min=0) * sign)
    other = layer.with_weight((sign * layer.weight).clamp(max=0) * sign)
    above, below = (d > 0).to(d.dtype), (d < 0).to(d.dtype)
    return Total([Compose(Scale(above, d.shape), same), Compose(Scale(below, d.shape), other)])


def _ratio(change: Tensor, part: Tensor) -> Tensor:
    """``change / part``, and 0 where there is no part to multiply."""
    return torch.where(part == 0, 0.0, change / torch.where(part == 0, 1.0, part))
