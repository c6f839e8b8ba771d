"""Named methods: a rule set and where relevance starts, under the names that the papers use.

``frpc.compile(model, x, method="sig-lid-ig")`` is ``frpc.compile(model, x, rule=frpc.rules.LID(), seed="softmax_integrated")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from frpc.errors import OptionError, nearest
from frpc.rules.sets.gradients import LID, Deconvnet, DeepLift, Gradient, GuidedBackprop, LIDTaylor, LRPTaylor, RectifiedGradient
from frpc.rules.sets.relevance import (
    LRP,
    AlphaBeta,
    AttnLRP,
    DeepTaylor,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonPlus,
    EpsilonPlusFlat,
    Gamma,
    ZPlus,
)
from frpc.rules.sets.reveal import DeepLiftRevealCancel
from frpc.rules.sets.ruleset import FRP, RuleSet
from frpc.rules.top import Contrastive, Logit, SoftmaxGradient, SoftmaxIntegrated, SoftmaxTaylor, Top

__all__ = ["METHODS", "Method", "method_named", "methods"]


@dataclass(frozen=True)
class Method:
    """One method of the propagation family.

    Attributes:
        name: what ``method=`` takes.
        rules: makes its rule set with the standard settings.
        top: where relevance starts.
        formula: in one line.
        source: paper and equation; L is the LID paper, S the survey of Si et al. 2022.
        cost: passes in addition to the model's own forward pass: ``T`` a transposed pass, ``V`` another forward pass.
        direction: ``both``, or ``transposed`` if the method only works backwards from the output.
        use: when to use it.
    """

    name: str
    rules: Callable[[], RuleSet]
    top: Top
    formula: str
    source: str
    cost: str
    direction: str
    use: str

    @property
    def conserves(self) -> str:
        """What the map sums to."""
        account = self.rules().account
        if isinstance(self.top, Logit):
            return account.conserves
        start = "P_c(z = 0)" if account.reference is None else "P_c(x_ref)"
        said = {
            SoftmaxTaylor: f"P_c(x) - {start} to first order",
            SoftmaxIntegrated: f"P_c(x) - {start} as steps grow",
            SoftmaxGradient: "the sum of dP/dz, which is 0",
            Contrastive: "0",
        }[type(self.top)]
        return said if account.reference is not None else f"{said}, minus what biases absorb"


_METHODS = (
    Method("frp", FRP, Logit(), "V_z = sum M V_a + c/N", "thesis 3.5-3.12", "T", "both",
           "the default: shares that add up to the whole output, constants included"),
    Method("gradient", lambda: Gradient(times_input=False), Logit(), "dy/dx", "Simonyan 2014; S 2.1.2.1", "T", "both",
           "sensitivity: what a small change of a pixel would do"),
    Method("gradient-input", Gradient, Logit(), "x dy/dx", "Shrikumar 2016; S 2.1.2.1", "T", "both",
           "a gradient in the unit of the output; equals LRP-0 on ReLU nets"),
    Method("lrp-0", lambda: LRP(0.0), Logit(), "a_i w_ij / z_j R_j", "Bach 2015; L 5", "T", "both",
           "the basic rule; noisy in deep nets"),
    Method("lrp-epsilon", LRP, Logit(), "a_i w_ij / (z_j + eps sgn z_j) R_j", "Bach 2015; S 2.1.2.3", "T", "both",
           "LRP-0 without division by values near 0"),
    Method("z-plus", ZPlus, Logit(), "(a w)+ / z+ R", "Montavon 2017; L 9", "T + V", "both",
           "what raised the score; smooth, but similar for all classes"),
    Method("alpha2-beta1", AlphaBeta, Logit(), "2 (a w)+ / z+ R - (a w)- / z- R", "Bach 2015; S 18", "2 T + 2 V", "both",
           "positive and negative evidence separately"),
    Method("gamma", Gamma, Logit(), "a (w + g w+) / sum R", "Montavon 2019", "2 T + 2 V", "both",
           "between epsilon and z+"),
    Method("epsilon-plus", EpsilonPlus, Logit(), "z+ in convolutions, epsilon in dense layers", "Kohlbrenner 2020", "T + V",
           "both", "a smooth map of a convolutional net"),
    Method("epsilon-plus-flat", EpsilonPlusFlat, Logit(), "epsilon-plus, flat in the first layer", "Kohlbrenner 2020", "T + V",
           "transposed", "the same without the noise of the first layer"),
    Method("epsilon-alpha2-beta1", EpsilonAlpha2Beta1, Logit(), "alpha-beta in convolutions, epsilon in dense layers",
           "Kohlbrenner 2020", "2 T + 2 V", "both", "evidence for and against, smoother than epsilon"),
    Method("epsilon-alpha2-beta1-flat", EpsilonAlpha2Beta1Flat, Logit(), "the same, flat in the first layer",
           "Kohlbrenner 2020", "2 T + 2 V", "transposed", "the same without the noise of the first layer"),
    Method("deep-taylor", DeepTaylor, Logit(), "z+ in every layer, w^2 in the first", "Montavon 2017; S 2.1.2.4", "T + V",
           "transposed", "ReLU nets whose score is positive"),
    Method("attn-lrp", AttnLRP, Logit(), "epsilon; halves for products; softmax by Taylor", "Achtibat 2024", "T", "both",
           "transformers, with relevance through the attention weights"),
    Method("c-lrp", LRP, Contrastive(), "LRP-epsilon from z_c and -z_c/(n-1)", "S 25", "T", "both",
           "a class against all others"),
    Method("lrp-taylor", LRPTaylor, Logit(), "Y G", "L 18", "T", "both", "LID-Taylor without increments"),
    Method("lid-taylor", LIDTaylor, Logit(), "dY G, Jacobians at x", "L 15-17", "T", "both",
           "what changed since the reference, to first order"),
    Method("st-lid-taylor", LIDTaylor, SoftmaxTaylor(), "LID-Taylor from dP/dz dz", "L 3.1", "T", "both",
           "the probability instead of the score, to first order"),
    Method("sig-lid-taylor", LIDTaylor, SoftmaxIntegrated(), "LID-Taylor from mean dP/dz dz", "L 3.3", "T", "both",
           "the probability, if the model is confident"),
    Method("lid-ig", LID, Logit(), "dY G, Jacobians averaged from x_ref to x", "L 19-23", "T", "both",
           "what changed since the reference, exactly"),
    Method("sig-lid-ig", LID, SoftmaxIntegrated(), "LID-IG from mean dP/dz dz", "L 24, algorithm 1", "T", "both",
           "which of two classes: evidence for one and against the other"),
    Method("deeplift", DeepLift, Logit(), "dz/dy per neuron", "Shrikumar 2017", "T", "both",
           "what changed since the reference; equals LID-IG"),
    Method("deeplift-reveal-cancel", DeepLiftRevealCancel, Logit(), "dy+/dx+ and dy-/dx- per neuron", "Shrikumar 2017", "T + 2 V",
           "both", "contributions that cancel before an activation"),
    Method("sg-lrp-0", LRP, SoftmaxGradient(), "LRP-0 from dP/dz", "L 10; S 26", "T", "both", "weak if the model is confident"),
    Method("sg-lrp-zp", ZPlus, SoftmaxGradient(), "z+ from dP/dz", "S 26", "T + V", "both", "weak if the model is confident"),
    Method("st-lrp-0", LRP, SoftmaxTaylor(), "LRP-0 from dP/dz z", "L 3.1", "T", "both", "weak if the model is confident"),
    Method("sig-lrp-0", LRP, SoftmaxIntegrated(), "LRP-0 from mean dP/dz z", "L 3.3", "T", "both",
           "the probability, by LRP"),
    Method("guided-backprop", GuidedBackprop, Logit(), "v [z > 0] [v > 0] at ReLUs", "Springenberg 2015", "T", "transposed",
           "a picture of edges; says little about the class"),
    Method("deconvnet", Deconvnet, Logit(), "v [v > 0] at ReLUs", "Zeiler 2014; S 9-11", "T", "transposed",
           "a picture of edges; says little about the class"),
    Method("rectified-gradient", RectifiedGradient, Logit(), "v [z v > quantile] at ReLUs", "Kim 2019", "T", "transposed",
           "the few strongest paths"),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _METHODS}


def methods() -> tuple[Method, ...]:
    """Lists every method that ``frpc.compile(..., method=)`` knows, with source and cost."""
    return tuple(METHODS.values())


def method_named(name: str) -> Method:
    """Returns the method of that name.

    Raises:
        OptionError: for another name; gives the nearest.
    """
    found = METHODS.get(name.lower().replace("_", "-"))
    if found is None:
        raise OptionError(f"method={name!r} is unknown; {nearest(name, list(METHODS))}. frpc.methods() lists all.")
    return found
