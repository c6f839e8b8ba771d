"""Operators with a structure: layers with weights, norms, pooling, indexing, views."""

from frpc.rules.forms import factors, linear, norms, places, pooling, products, resizing, selection, spectral, unruled, views

__all__ = ["factors", "linear", "norms", "places", "pooling", "products", "resizing", "selection", "spectral", "unruled", "views"]
