"""The rules of every operator, by family, and the rule sets that assign them."""

from frpc.rules import forms, functions, increments, lrp
from frpc.rules.sets.compose import Gate, Half, WinnerTakesAll, compose
from frpc.rules.sets.gradients import LID, Deconvnet, DeepLift, Gradient, GuidedBackprop, LIDTaylor, LRPTaylor, RectifiedGradient
from frpc.rules.sets.relevance import (
    LRP,
    AlphaBeta,
    AttnLRP,
    Composite,
    DeepTaylor,
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    Flat,
    Gamma,
    WSquare,
    ZBox,
    ZPlus,
)
from frpc.rules.sets.reveal import DeepLiftRevealCancel
from frpc.rules.sets.ruleset import FRP, Account, RuleSet, Site

__all__ = [
    "FRP",
    "LID",
    "LRP",
    "Account",
    "AlphaBeta",
    "AttnLRP",
    "Composite",
    "Deconvnet",
    "DeepLift",
    "DeepLiftRevealCancel",
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
    "RuleSet",
    "Site",
    "WSquare",
    "WinnerTakesAll",
    "ZBox",
    "ZPlus",
    "compose",
    "forms",
    "functions",
    "increments",
    "lrp",
]
