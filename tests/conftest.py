"""One torch thread for each test process, quicker captures, and a list of what was skipped.

The processes are as many as the cores; threads of several would wait on each other. Python's garbage collector would look
through all of PyTorch and of the tests again and again: what is there when the tests begin stays, and it looks less often.
"""

import gc
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("conftest", "skips")))

import quick_export  # noqa: E402
from skips import pytest_addoption, pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: E402, F401

torch.set_num_threads(1)
quick_export.install()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
