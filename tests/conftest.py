"""One torch thread for each test process, and a list of what was skipped.

The processes are as many as the cores; threads of several would wait on each other.
"""

import torch

from skips import pytest_addoption, pytest_configure, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

torch.set_num_threads(1)
