"""One torch thread for each test process.

The processes are as many as the cores; threads of several would wait on each other.
"""

import torch

torch.set_num_threads(1)
