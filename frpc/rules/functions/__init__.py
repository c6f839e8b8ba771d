"""Functions of one or two numbers: sums, activations, rounding."""
