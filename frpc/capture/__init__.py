"""A module and example inputs become one graph of functional ATen operators."""
