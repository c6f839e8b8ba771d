"""Rules for the difference from a reference input: Jacobians, averaged along a path."""
