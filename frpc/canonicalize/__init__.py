"""Fewer kinds of operators, the same function."""
