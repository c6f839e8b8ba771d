"""The rules of every operator, by family, and the rule sets that assign them."""

from frpc.rules import arithmetic, elementwise, linear, norms, pooling, products, resizing, rounding, selection, views
from frpc.rules.ruleset import FRP, RuleSet

__all__ = [
    "FRP",
    "RuleSet",
    "arithmetic",
    "elementwise",
    "linear",
    "norms",
    "pooling",
    "products",
    "resizing",
    "rounding",
    "selection",
    "views",
]
