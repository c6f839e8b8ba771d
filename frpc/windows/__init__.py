"""Forward carry in receptive-field windows; see :mod:`frpc.windows.producer`."""

from frpc.windows.build import LocalityEndsError, build_rows
from frpc.windows.producer import Grid
from frpc.windows.rows import Rows
from frpc.windows.run import stream
from frpc.windows.shut import skip_shut_windows

__all__ = ["Grid", "LocalityEndsError", "Rows", "build_rows", "skip_shut_windows", "stream"]
