"""Benchmarks, run by hand from a checkout: ``python -m bench NAME``. Nothing here is part of the test suite."""
