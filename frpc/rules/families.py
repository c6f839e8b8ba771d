"""Rule sets beyond forward relevance propagation: gradients, LID and DeepLIFT, the LRP family, and sets composed of others.

Each is a small declaration: which rule a kind of layer gets, and what the result means (:class:`~frpc.rules.ruleset.Account`).
The authors of LRP hold patents on LRP.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from frpc.affine import TABLE, Affine, Call, Rule
from frpc.carriers import Product
from frpc.errors import InputError, OptionError
from frpc.maps import Scale
from frpc.references import Reference, ReferenceLike, as_reference
from frpc.rules import lrp
from frpc.rules.arithmetic import back
from frpc.rules.elementwise import over
from frpc.rules.increments import Path, Pooling, SoftmaxMap, increment_rule
from frpc.rules.lrp import Bound, LayerRule
from frpc.rules.rectified import RECTIFIERS, deconvnet_relu, guided_relu, rectified_relu
from frpc.rules.ruleset import FRP, Account, RuleSet, Site

aten = torch.ops.aten

__all__ = [
    "LID",
    "LRP",
    "AlphaBeta",
    "AttnLRP",
    "Composite",
    "Deconvnet",
    "DeepLift",
    "DeepTaylor",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "Flat",
    "Gamma",
    "Gate",
    "Gradient",
    "GuidedBackprop",
    "Half",
    "LIDTaylor",
    "LRPTaylor",
    "RectifiedGradient",
    "WSquare",
    "WinnerTakesAll",
    "ZBox",
    "ZPlus",
    "compose",
]

Direction = Literal["both", "transposed"]


# Gradients ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient(RuleSet):
    """The Jacobian: ``x * dy/dx``, or ``dy/dx`` alone. Nothing is conserved; what is missing to y is reported beside the map.

    Args:
        times_input: multiply the gradient by the input.

    Exact when: always; the gradient is PyTorch's own, by the chain rule over the operators of the graph.

    Source: Simonyan et al. 2014; Shrikumar et al. 2016 (input times gradient); S 2.1.2.1.
    """

    times_input: bool = True

    @property
    def account(self) -> Account:
        gives: Literal["relevance", "multiplier"] = "relevance" if self.times_input else "multiplier"
        return Account(gives=gives, spelled_out=True, conserves="nothing")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's Jacobian."""
        return increment_rule(site.op, Path())


@dataclass(frozen=True)
class GuidedBackprop(Gradient):
    """Gradients, and at every ReLU (ReLU6, ``clamp``) only what is positive; a net without any gets its gradient. Transposed
    direction only.

    Source: Springenberg et al. 2015; S 2.1.2.2.
    """

    times_input: bool = False

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, at ReLUs the guided one."""
        if site.op in RECTIFIERS:
            return Rule(site.op, guided_relu, ("self",), "v [z > 0] [v > 0]", "Springenberg et al. 2015")
        return super().rule_for(site)


@dataclass(frozen=True)
class Deconvnet(Gradient):
    """Gradients, but at every ReLU what is pulled is itself rectified. Transposed direction only.

    Source: Zeiler & Fergus 2014; S 9-11.
    """

    times_input: bool = False

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, at ReLUs the rectification of what is pulled."""
        if site.op in RECTIFIERS:
            return Rule(site.op, deconvnet_relu, ("self",), "v [v > 0]", "Zeiler & Fergus 2014; S 9-11")
        return super().rule_for(site)


@dataclass(frozen=True)
class RectifiedGradient(Gradient):
    """Gradients that pass a ReLU only where activation times gradient is among the largest of the layer.

    Args:
        q: the part of each layer that is held back, 0.98 in the paper.

    Raises:
        OptionError: for a q outside [0, 1).

    Source: Kim et al. 2019.
    """

    q: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.q < 1:
            raise OptionError(f"q={self.q}: the part that is held back lies in [0, 1).")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, at ReLUs the one with a threshold."""
        if site.op in RECTIFIERS:
            return Rule(site.op, rectified_relu(self.q), ("self",), "v [z v > quantile]", "Kim et al. 2019")
        return super().rule_for(site)


# Increments ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LID(RuleSet):
    """Layer-wise increment decomposition: ``R(Y) = (Y - Y_ref) * G``, G the Jacobians averaged from the reference to the input.

    Args:
        reference: what the input is compared with: ``"zero"``, ``"blur"``, a tensor like one sample, or several, to be averaged.
        steps: None for the exact average (a secant for functions of one number, halves for products), or the paper's n points.
        pooling: how max pools average, see :class:`~frpc.rules.increments.Path`.

    Shapes: reference ``[1, ...]`` or ``[R, ...]`` like the input.

    Exact when: ``steps=None``: relevance sums to ``f(x) - f(x_ref)`` at every layer.

    Raises:
        OptionError: for a reference that is none, or less than one step.

    Source: LID paper, eqs. 15, 19-23 (LID-IG); beyond it for products, norms, softmax and attention.
    """

    reference: ReferenceLike | Reference = "zero"
    steps: int | None = None
    pooling: Pooling = "ends"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"steps={self.steps}: give at least one point, or None for the exact average.")
        object.__setattr__(self, "reference", as_reference(self.reference))

    @property
    def account(self) -> Account:
        assert isinstance(self.reference, Reference)
        return Account(
            reference=self.reference, from_reference=True, spelled_out=True, conserves="f(x) - f(x_ref), at every layer"
        )

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's averaged Jacobian."""
        return increment_rule(site.op, Path(self.steps, self.pooling))


@dataclass(frozen=True)
class DeepLift(LID):
    """DeepLIFT with the rescale rule: the multiplier of a function of one number is ``dz / dy``.

    The same as :class:`LID` with the exact average; max pools give to the winners at both ends.

    Source: Shrikumar et al. 2017, rescale rule; L 6, 7.
    """


@dataclass(frozen=True)
class LIDTaylor(LID):
    """``R(Y) = (Y - Y_ref) * G`` with the Jacobians at the input alone: gradient times increment.

    Exact when: the net is linear from the reference to the input.

    Source: LID paper, eqs. 15-17.
    """

    @property
    def account(self) -> Account:
        assert isinstance(self.reference, Reference)
        return Account(reference=self.reference, spelled_out=True, conserves="f(x) - f(x_ref) to first order")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's Jacobian at the input."""
        return increment_rule(site.op, Path())


@dataclass(frozen=True)
class LRPTaylor(Gradient):
    """``R(Y) = Y * G`` with the Jacobians at the input: LID-Taylor without increments, the same as input times gradient.

    Source: LID paper, eq. 18.
    """


# Layer-wise relevance propagation -----------------------------------------------------------------------------------------


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
        if standard.elementwise and affine.constant is not None:
            (name,) = affine.terms
            a = call.args[str(name)]
            return Affine({name: Scale(over(call.value, a), a.shape)})
        return Affine(affine.terms)

    passed.__name__ = standard.name
    return Rule(op, passed, standard.carries, standard.formula, standard.source, standard.elementwise, standard.linear)


@dataclass(frozen=True)
class _Layers(RuleSet):
    """Base of the LRP family: one rule for layers with weights; everything else passes its relevance on."""

    @property
    def account(self) -> Account:
        return Account(conserves="the explained output, less what biases absorb")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the layer rule for layers with weights; activations pass, max pools give to the winner."""
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
            raise OptionError(f"alpha={self.alpha}, beta={self.beta}: both are at least 0, and alpha - beta is 1.")

    def layer_rule(self, site: Site) -> Rule:
        rule = lrp.alpha_beta(self.alpha, self.beta, self.stabilizer)
        return _layer_rule(site, rule, "alpha diag(z / z+) W+ - beta diag(z / z-) W-", "Bach et al. 2015; S 18")


@dataclass(frozen=True)
class Gamma(_Layers):
    """``w + gamma w+`` in place of the weights: positive contributions are favoured.

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

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuses inputs outside the box.

        Raises:
            InputError: says how far outside they are.
        """
        _check_box(inputs, self.low, self.high)


def _check_box(inputs: Sequence[Tensor], low: Bound, high: Bound) -> None:
    for x in (x for x in inputs if x.is_floating_point()):
        under, above = float((low - x).max()), float((x - high).max())
        if under > 1e-6 or above > 1e-6:
            where = f"{under:.3g} below low" if under >= above else f"{above:.3g} above high"
            raise InputError(
                f"The z-box rule is for inputs between low and high; this one goes {where}. Give the bounds of your "
                "preprocessing, for a normalized photo low = -mean/std and high = (1 - mean)/std."
            )


@dataclass(frozen=True)
class Composite(_Layers):
    """A rule for convolutions, one for dense layers, and perhaps another for the layer that reads the input.

    Args:
        convolution, dense, first: rule sets whose layer rules are taken.
    """

    convolution: _Layers = field(default_factory=LRP)
    dense: _Layers = field(default_factory=LRP)
    first: _Layers | None = None

    def layer_rule(self, site: Site) -> Rule:
        if self.first is not None and site.first:
            return self.first.layer_rule(site)
        return (self.convolution if site.op is aten.convolution.default else self.dense).layer_rule(site)

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuses inputs that the first layer's rule cannot take."""
        if self.first is not None:
            self.first.check(inputs)


@dataclass(frozen=True)
class EpsilonPlus(_Layers):
    """z+ in convolutions, epsilon in dense layers; zennit's composite of that name.

    Source: Montavon et al. 2019; Kohlbrenner et al. 2020.
    """

    epsilon: float = 1e-6
    stabilizer: float = 1e-6

    def parts(self) -> Composite:
        """What it is made of."""
        return Composite(ZPlus(self.stabilizer), LRP(self.epsilon))

    def layer_rule(self, site: Site) -> Rule:
        return self.parts().layer_rule(site)

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuses inputs that the first layer's rule cannot take."""
        self.parts().check(inputs)


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
    return Affine({str(call.op._schema.arguments[0].name): SoftmaxMap(call.value, back(dim, a.dim()))})


@dataclass(frozen=True)
class AttnLRP(LRP):
    """LRP for transformers: epsilon in dense layers, half to each factor of a product, softmax by its Taylor expansion, norms and
    activations as identities with coefficients.

    Source: Achtibat et al. 2024 (AttnLRP), eqs. 13-19.
    """

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the layer rule, and for softmax its first-order account."""
        if site.op in (aten._softmax.default, aten._safe_softmax.default):
            name = str(site.op._schema.arguments[0].name)
            return Rule(site.op, _taylor_softmax, (name,), "s (v - <s, v>)", "Achtibat et al. 2024")
        return super().rule_for(site)

    def product_for(self, module: str) -> Product:
        """Every product is halved: attention weights carry relevance too."""
        return "half"


# Single choices, and sets made of others ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate(FRP):
    """Products give all of their relevance to one factor; the other, a gate where one is, is a coefficient."""

    product: Product | Mapping[str, Product] = "gate"


@dataclass(frozen=True)
class Half(FRP):
    """Products give half of their relevance to each factor."""

    product: Product | Mapping[str, Product] = "half"


@dataclass(frozen=True)
class WinnerTakesAll(FRP):
    """Max pools give all of their relevance to the winner: the standard rule, to be named in :func:`compose`."""


Key = str | OpOverload | OpOverloadPacket


@dataclass(frozen=True)
class _Composed(RuleSet):
    """See :func:`compose`."""

    choices: tuple[tuple[Key, RuleSet], ...]
    default: RuleSet

    @property
    def name(self) -> str:
        return f"{self.default.name} + {len(self.choices)} choices"

    @property
    def account(self) -> Account:
        sets = [self.default, *(chosen for _, chosen in self.choices)]
        if all(s.account.constants for s in sets):
            return self.default.account
        base = self.default.account
        return Account(False, base.reference, base.from_reference, base.gives, base.spelled_out, "see its parts")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the rule of the first choice that matches, else the default's."""
        for key, chosen in self.choices:
            if _matches(key, site):
                return chosen.rule_for(site)
        return self.default.rule_for(site)

    def product_for(self, module: str) -> Product:
        """Returns how products are shared in a module."""
        for key, chosen in self.choices:
            if isinstance(key, str) and _inside(module, key):
                return chosen.product_for(module)
        return self.default.product_for(module)

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Refuses inputs that one of the rules cannot take."""
        for _, chosen in self.choices:
            chosen.check(inputs)
        self.default.check(inputs)


def _inside(module: str, pattern: str) -> bool:
    """Says whether a module is one that the pattern names, or lies inside one."""
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"{pattern}.*")


def _matches(key: Key, site: Site) -> bool:
    if isinstance(key, str):
        return _inside(site.module, key)
    if isinstance(key, OpOverload):
        return site.op is key
    packet = getattr(site.op, "overloadpacket", None)
    return packet is key or str(packet) == f"{key}_with_indices"  # a max pool is canonical with its winners


def compose(choices: Mapping[Any, RuleSet], default: RuleSet | None = None) -> RuleSet:
    """Makes a rule set of others: by module path pattern and by operator, the first match counts.

    Args:
        choices: a pattern (``"features.0"``, ``"*.attn"``: the module and all inside it) or an operator
            (``torch.ops.aten.max_pool2d``, or one overload of it) -> the rule set asked there.
        default: asked everywhere else; :class:`FRP` by default.

    Raises:
        OptionError: if sets disagree on what multipliers mean (values or increments, relevance or gradients), or something is no
            rule set.
    """
    base = FRP() if default is None else default
    for key, chosen in choices.items():
        if not isinstance(key, str | OpOverload | OpOverloadPacket) or not isinstance(chosen, RuleSet):
            raise OptionError(
                f"compose takes patterns or operators -> rule sets, not {key!r} -> {type(chosen).__name__}; e.g. "
                '{"features.0": frpc.rules.ZBox(low, high)}.'
            )
        one, other = base.account, chosen.account
        if (one.reference, one.from_reference, one.gives, one.spelled_out) != (
            other.reference,
            other.from_reference,
            other.gives,
            other.spelled_out,
        ):
            raise OptionError(
                f"{chosen.name} at {key!r} and {base.name} do not go together: one explains values, the other increments or "
                "gradients. Give both the same reference, or compile them apart."
            )
    return _Composed(tuple(choices.items()), base)
