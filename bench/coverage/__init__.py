"""Which models frpc covers, found by trying: ``python -m bench coverage --suite torchvision``.

Every model of a suite is built with random weights, compiled and checked in a process of its own; one JSON line a model goes to
``bench/results/``, and ``--write`` makes docs/coverage.md of the lines. Needs ``pip install frpc[coverage]``.
"""
