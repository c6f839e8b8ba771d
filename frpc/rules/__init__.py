"""The rules of every operator, by family, and the rule sets that assign them."""

from frpc.rules import arithmetic, elementwise, linear, pooling, views
from frpc.rules.ruleset import FRP, RuleSet

__all__ = ["FRP", "RuleSet", "arithmetic", "elementwise", "linear", "pooling", "views"]
