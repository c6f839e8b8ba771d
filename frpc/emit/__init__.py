"""The answer to a query, as one graph of ATen operators."""
