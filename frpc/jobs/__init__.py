"""Jobs: a whole data set explained in batches, going on after a kill without losing or repeating a sample."""

from frpc.jobs.job import Summary, run
from frpc.jobs.samples import Folder, Parquet, Sample, Samples, open_samples
from frpc.jobs.store import Failure, Store, read_results
from frpc.jobs.work import Classifier, Task

__all__ = [
    "Classifier",
    "Failure",
    "Folder",
    "Parquet",
    "Sample",
    "Samples",
    "Store",
    "Summary",
    "Task",
    "open_samples",
    "read_results",
    "run",
]
