"""Functions of one or two numbers: sums, activations, rounding."""

from frpc.rules.functions import arithmetic, elementwise, pairs, rounding, special

__all__ = ["arithmetic", "elementwise", "pairs", "rounding", "special"]
