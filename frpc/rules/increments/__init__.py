"""Rules for the difference from a reference input: Jacobians, averaged along a path."""

from frpc.rules.increments import changes, increments, paths, products, softmax, winners

__all__ = ["changes", "increments", "paths", "products", "softmax", "winners"]
