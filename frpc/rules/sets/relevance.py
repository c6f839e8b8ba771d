"""Rule sets of layer-wise relevance propagation. The authors of LRP hold patents on LRP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.errors import OptionError, RuleDeclinedError
from frpc.maps import Scale
from frpc.rules.carriers import Product
from frpc.rules.functions.arithmetic import back
from frpc.rules.functions.quotients import over
from frpc.rules.increments.softmax import SoftmaxMap
from frpc.rules.lrp import lrp
from frpc.rules.lrp.lrp import Bound, LayerRule
from frpc.rules.sets.ruleset import Account, Box, RuleSet, Site
from frpc.rules.table import TABLE, Affine, Call, Rule

aten = torch.ops.aten

__all__ = [
    "LRP",
    "AlphaBeta",
    "AttnLRP",
    "Composite",
    "DeepTaylor",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "Flat",
    "Gamma",
    "WSquare",
    "ZBox",
    "ZPlus",
]


def _layer_rule(site: Site, function: LayerRule, formula: str, source: str) -> Rule:
    standard = TABLE.get(site.op)
    return Rule(site.op, function, ("input",) if standard is None else standard.carries, formula, source)


def _passing(op: Any) -> Rule | None:
    """The standard rule without its constant: a function of one number passes all of its relevance on, ``f(a) / a``."""
    standard = TABLE.get(op)
    if standard is None:
        return None

    def passed(call: Call, *arguments: Any) -> Affine:
        affine = standard(call)
        if standard.traits.elementwise and affine.constant is not None:
            (name,) = affine.terms
            a = call.args[str(name)]
            return Affine({name: Scale(over(call.value, a), a.shape)})
        return Affine(affine.terms)

    passed.__name__ = standard.name
    return Rule(op, passed, standard.carries, standard.formula, standard.source, standard.traits)


@dataclass(frozen=True)
class _Layers(RuleSet):
    """Base of the LRP family: one rule for layers with weights; everything else passes its relevance on."""

    @property
    def account(self) -> Account:
        return Account(conserves="the explained output, minus what biases absorb")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the layer rule for layers with weights; activations pass, max pools give to the winner."""
        if site.weighted and site.by_value:
            raise RuleDeclinedError(
                f"{self.name} distributes relevance by a layer's weights, but here both factors are computed from the input: "
                "AttnLRP has a rule for products of two values"
            )
        return self.layer_rule(site) if site.weighted else _passing(site.op)

    def layer_rule(self, site: Site) -> Rule:
        """The rule of a layer with weights."""
        raise TypeError(f"{self.name} has no layer rule")


@dataclass(frozen=True)
class LRP(_Layers):
    """LRP-epsilon, ``R_i = sum_j a_i w_ij / (z_j + eps sgn z_j) R_j``; LRP-0 for ``epsilon=0``. Biases and eps absorb.

    Source: Bach et al. 2015; S 2.1.2.3; L 5.
    """

    epsilon: float = 1e-6

    def layer_rule(self, site: Site) -> Rule:
        return _layer_rule(site, lrp.epsilon(self.epsilon), "diag(z / (z + eps sgn z)) W", "Bach et al. 2015; L 5")


@dataclass(frozen=True)
class ZPlus(_Layers):
    """The z+ rule in every layer: relevance goes to what raised a neuron, so it never changes its sign.

    Source: Montavon et al. 2017; L 9.
    """

    stabilizer: float = 1e-6

    def layer_rule(self, site: Site) -> Rule:
        return _layer_rule(site, lrp.z_plus(self.stabilizer), "diag(z / z+) W+", "Montavon et al. 2017; L 9")


@dataclass(frozen=True)
class AlphaBeta(_Layers):
    """``alpha`` times the positive contributions less ``beta`` times the negative ones.

    Raises:
        OptionError: unless ``alpha - beta`` is 1 and both are at least 0.

    Source: Bach et al. 2015; S 18.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise OptionError(f"alpha={self.alpha}, beta={self.beta}: both must be at least 0, with alpha - beta = 1.")

    def layer_rule(self, site: Site) -> Rule:
        rule = lrp.alpha_beta(self.alpha, self.beta, self.stabilizer)
        return _layer_rule(site, rule, "alpha diag(z / z+) W+ - beta diag(z / z-) W-", "Bach et al. 2015; S 18")


@dataclass(frozen=True)
class Gamma(_Layers):
    """``w + gamma w+`` instead of the weights: positive contributions are favoured.

    Source: Montavon et al. 2019; for signed inputs Andeol et al. 2021.
    """

    gamma: float = 0.25
    stabilizer: float = 1e-6

    def layer_rule(self, site: Site) -> Rule:
        return _layer_rule(site, lrp.gamma(self.gamma, self.stabilizer), "w + gamma w+, rescaled to z", "Montavon et al. 2019")


@dataclass(frozen=True)
class _FirstLayer(LRP):
    """Base of rules of a first layer; further layers get LRP-epsilon. Transposed direction only."""

    stabilizer: float = 1e-6

    @property
    def for_first_layer(self) -> bool:
        return True

    def layer_rule(self, site: Site) -> Rule:
        return self.first_rule(site) if site.first else super().layer_rule(site)

    def first_rule(self, site: Site) -> Rule:
        """The rule of the layer that reads the input."""
        raise TypeError(f"{self.name} has no rule for the first layer")


@dataclass(frozen=True)
class WSquare(_FirstLayer):
    """The w^2 rule in the first layer, LRP-epsilon in the others.

    Source: Montavon et al. 2017.
    """

    def first_rule(self, site: Site) -> Rule:
        return _layer_rule(site, lrp.w_square(self.stabilizer), "w^2 / sum w^2", "Montavon et al. 2017")


@dataclass(frozen=True)
class Flat(_FirstLayer):
    """The flat rule in the first layer, LRP-epsilon in the others.

    Source: Lapuschkin et al. 2019.
    """

    def first_rule(self, site: Site) -> Rule:
        return _layer_rule(site, lrp.flat(self.stabilizer), "1 / n", "Lapuschkin et al. 2019")


@dataclass(frozen=True)
class ZBox(_FirstLayer):
    """The z-box rule in the first layer, for inputs between ``low`` and ``high``; LRP-epsilon in the others.

    Args:
        low, high: numbers, or tensors that broadcast to a sample, e.g. ``[3, 1, 1]`` for a normalized photo.

    Source: Montavon et al. 2017, z-beta rule.
    """

    low: Bound = 0.0
    high: Bound = 1.0

    def first_rule(self, site: Site) -> Rule:
        rule = lrp.z_box(self.low, self.high, self.stabilizer)
        return _layer_rule(site, rule, "(x w - l w+ - h w-) / sum", "Montavon et al. 2017")

    def boxes(self) -> tuple[Box, ...]:
        return ((self.low, self.high),)


@dataclass(frozen=True)
class Composite(_Layers):
    """A rule for convolutions, one for dense layers, and perhaps another for the layer that reads the input.

    Args:
        convolution, dense, first: rule sets whose layer rules are taken.
    """

    convolution: _Layers = field(default_factory=LRP)
    dense: _Layers = field(default_factory=LRP)
    first: _Layers | None = None

    @property
    def for_first_layer(self) -> bool:
        return self.first is not None

    def layer_rule(self, site: Site) -> Rule:
        if self.first is not None and site.first:
            return self.first.layer_rule(site)
        return (self.convolution if site.op is aten.convolution.default else self.dense).layer_rule(site)

    def boxes(self) -> tuple[Box, ...]:
        return () if self.first is None else self.first.boxes()


@dataclass(frozen=True)
class EpsilonPlus(_Layers):
    """z+ in convolutions, epsilon in dense layers; zennit's composite of that name.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020.
    """

    epsilon: float = 1e-6
    stabilizer: float = 1e-6

    def parts(self) -> Composite:
        """The rule sets that it is composed of."""
        return Composite(ZPlus(self.stabilizer), LRP(self.epsilon))

    @property
    def for_first_layer(self) -> bool:
        return self.parts().for_first_layer

    def layer_rule(self, site: Site) -> Rule:
        return self.parts().layer_rule(site)

    def boxes(self) -> tuple[Box, ...]:
        return self.parts().boxes()


@dataclass(frozen=True)
class EpsilonPlusFlat(EpsilonPlus):
    """:class:`EpsilonPlus` with the flat rule in the first layer; zennit's composite of that name."""

    def parts(self) -> Composite:
        return Composite(ZPlus(self.stabilizer), LRP(self.epsilon), Flat(stabilizer=self.stabilizer))


@dataclass(frozen=True)
class EpsilonAlpha2Beta1(EpsilonPlus):
    """alpha 2, beta 1 in convolutions, epsilon in dense layers; zennit's composite of that name."""

    def parts(self) -> Composite:
        return Composite(AlphaBeta(2.0, 1.0, self.stabilizer), LRP(self.epsilon))


@dataclass(frozen=True)
class EpsilonAlpha2Beta1Flat(EpsilonPlus):
    """:class:`EpsilonAlpha2Beta1` with the flat rule in the first layer; zennit's composite of that name."""

    def parts(self) -> Composite:
        return Composite(AlphaBeta(2.0, 1.0, self.stabilizer), LRP(self.epsilon), Flat(stabilizer=self.stabilizer))


@dataclass(frozen=True)
class EpsilonGammaBox(EpsilonPlus):
    """gamma in convolutions, epsilon in dense layers, z-box in the first; zennit's composite of that name.

    Args:
        low, high: as for :class:`ZBox`.
        gamma: as for :class:`Gamma`.
    """

    low: Bound = 0.0
    high: Bound = 1.0
    gamma: float = 0.25

    def parts(self) -> Composite:
        first = ZBox(stabilizer=self.stabilizer, low=self.low, high=self.high)
        return Composite(Gamma(self.gamma, self.stabilizer), LRP(self.epsilon), first)


@dataclass(frozen=True)
class DeepTaylor(EpsilonPlus):
    """Deep Taylor decomposition: z+ in every layer, in the first one z-box where bounds are given and w^2 where not.

    Args:
        low, high: bounds of the input, as for :class:`ZBox`; None if it has none.

    Source: Montavon et al. 2017; S 2.1.2.4.
    """

    low: Bound | None = None
    high: Bound | None = None

    def parts(self) -> Composite:
        plus = ZPlus(self.stabilizer)
        if self.low is None or self.high is None:
            return Composite(plus, plus, WSquare(stabilizer=self.stabilizer))
        return Composite(plus, plus, ZBox(stabilizer=self.stabilizer, low=self.low, high=self.high))


def _taylor_softmax(call: Call, a: Tensor, dim: int, *rest: object) -> Affine:
    return Affine({str(schema_of(call.op).arguments[0].name): SoftmaxMap(call.value, back(dim, a.dim()))})


@dataclass(frozen=True)
class AttnLRP(LRP):
    """LRP for transformers: epsilon in dense layers, half to each factor of a product, softmax by its Taylor expansion, norms and
    activations as identities with coefficients.

    Source: Achtibat et al. 2024 (AttnLRP), eqs. 13-19.
    """

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the layer rule, and for softmax its first-order approximation."""
        if site.op in (aten._softmax.default, aten._safe_softmax.default):
            name = str(schema_of(site.op).arguments[0].name)
            return Rule(site.op, _taylor_softmax, (name,), "s (v - <s, v>)", "Achtibat et al. 2024")
        return super().rule_for(site)

    def product_for(self, module: str) -> Product:
        """Every product is halved: attention weights carry relevance too."""
        return "half"
