"""DeepLIFT's reveal-cancel rule: a layer with weights and the activation behind it, taken together.

The rescale rule gives an activation one multiplier, so that contributions which cancel each other in front of it vanish together.
Here the positive and the negative part of the activation's input get separate multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.maps import Compose, Identity, LinearMap, Scale, Total
from frpc.rules.increments.paths import secant
from frpc.rules.lrp.lrp import Layer, layer_of
from frpc.rules.sets.gradients import LID
from frpc.rules.sets.ruleset import Site
from frpc.rules.table import Affine, Call, Operand, Rule, traits_of

__all__ = ["DeepLiftRevealCancel"]

SOURCE = "Shrikumar et al. 2017, reveal-cancel rule"


@dataclass(frozen=True)
class DeepLiftRevealCancel(LID):
    """DeepLIFT with the reveal-cancel rule in layers that one activation reads, the rescale rule elsewhere.

    With ``dx+`` and ``dx-`` the positive and negative part of a neuron's increment, the activation's increment is shared as
    ``dy+ = (f(r + dx+) - f(r) + f(r + dx) - f(r + dx-)) / 2`` and ``dy-`` likewise; ``dy+ / dx+`` and ``dy- / dx-`` multiply the
    positive and the negative contributions. The layer's own neurons then have no single multiplier: use the activation's.

    Exact when: always; relevance sums to ``f(x) - f(x_ref)``.

    Source: Shrikumar et al. 2017, section 3.5.3.
    """

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the reveal-cancel rule for a layer with an activation behind it; the activation itself then passes."""
        if site.weighted and site.behind is not None:
            standard = super().rule_for(site)
            carries = ("input", "self", "mat1") if standard is None else standard.carries
            return Rule(site.op, _reveal_cancel, carries, "dy+/dx+ W+, dy-/dx- W-", SOURCE)
        if site.before:
            name = str(schema_of(site.op).arguments[0].name)
            return Rule(site.op, _passed, (name,), "with the layer in front of it", SOURCE)
        return super().rule_for(site)

    def note_for(self, site: Site) -> str | None:
        """Says where an activation gets the rescale rule."""
        if site.before or not traits_of(site.op).elementwise:
            return None
        return (
            "it gets the rescale rule; reveal-cancel needs an activation that is the only reader of a layer with weights "
            "whose neurons are not explained themselves"
        )


def _passed(call: Call, *arguments: Any) -> Affine:
    return Affine({str(schema_of(call.op).arguments[0].name): Identity(call.value.shape)})


def _reveal_cancel(call: Call, *arguments: Any) -> Affine:
    """A layer, and the activation ``f`` that reads it.

    ``dy+ / dx+`` is the mean of two secants of f, from r and from ``r + dx-`` up: the positive part comes first or last.
    """
    assert call.reference is not None
    assert call.behind is not None
    layer, there, r = layer_of(call), call.reference, call.reference.value
    d = layer.a - there.args[str(layer.name)]
    raising, lowering = _part(layer, d, 1.0), _part(layer, d, -1.0)
    up, down = raising.push(d), lowering.push(d)
    if layer.added is not None:
        name, added = layer.added
        gained = added.push(call.args[str(name)] - there.args[str(name)])
        up, down = up + gained.clamp(min=0), down + gained.clamp(max=0)
    rising = 0.5 * (_slope(call.behind, r, up) + _slope(call.behind, r + down, up))
    falling = 0.5 * (_slope(call.behind, r, down) + _slope(call.behind, r + up, down))
    parts = [Compose(raising, Scale(rising, raising.result)), Compose(lowering, Scale(falling, lowering.result))]
    terms: dict[Operand, LinearMap] = {layer.name: Total(parts)}
    if layer.added is not None:
        terms[name] = Compose(added, Scale(torch.where(gained > 0, rising, falling), call.value.shape))
    return Affine(terms, joined=True)


def _slope(function: Callable[[Tensor], Tensor], start: Tensor, change: Tensor) -> Tensor:
    """The secant of a function from ``start`` to ``start + change``."""
    end = start + change
    return secant(function, end, start, function(end) - function(start))


def _part(layer: Layer, d: Tensor, sign: float) -> LinearMap:
    """The contributions ``w d`` of one sign: weights of that sign on increments above 0, of the other on those below."""
    same = layer.with_weight((sign * layer.weight).clamp(min=0) * sign)
    other = layer.with_weight((sign * layer.weight).clamp(max=0) * sign)
    above, below = (d > 0).to(d.dtype), (d < 0).to(d.dtype)
    return Total([Compose(Scale(above, d.shape), same), Compose(Scale(below, d.shape), other)])
