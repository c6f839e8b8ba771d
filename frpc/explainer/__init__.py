"""`frpc.compile` and the explainer that it returns."""
