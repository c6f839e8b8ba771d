"""Operators with a structure: layers with weights, norms, pooling, indexing, views."""
