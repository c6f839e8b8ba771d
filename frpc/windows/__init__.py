"""Forward carry in receptive-field windows; see :mod:`frpc.windows.rows`."""

from frpc.windows.build import LocalityEndsError, build_rows, stream
from frpc.windows.rows import Grid, Rows

__all__ = ["Grid", "LocalityEndsError", "Rows", "build_rows", "stream"]
