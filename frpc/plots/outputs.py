"""A folder for results: found writable before work starts, made when the first file is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from frpc.errors import OutputFolderError
from frpc.plots import heatmap

__all__ = ["OutputFolder"]


class OutputFolder:
    """Where a command leaves its files.

    Args:
        path: the folder; it and its parents need not exist yet, and nothing is left there until something is written.

    Attributes:
        files: what has been written, in order.

    Raises:
        OutputFolderError: the path is a file, or nothing can be written there; also when a later write fails.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[Path] = []
        try:
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not existing.is_dir():
                raise OutputFolderError(f"cannot write to {self.path}: {existing} is a file")
            # Permission bits do not tell for root, quotas or read-only mounts; an unnamed file does.
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise OutputFolderError(f"cannot write to {self.path}: {error.strerror or error}") from error

    def text(self, name: str, content: str) -> Path:
        """Writes a text file."""
        return self.file(name, lambda path: path.write_text(content, encoding="utf-8"))

    def json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Writes a JSON file; NaN and Inf, which JSON does not have, raise an error."""
        return self.text(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def arrays(self, name: str, **arrays: NDArray[Any]) -> Path:
        """Writes a ``.npz`` file."""
        return self.file(name, lambda path: np.savez_compressed(path, allow_pickle=False, **arrays))

    def figure(self, name: str, figure: Figure) -> Path:
        """Writes a picture."""
        return self.file(name, lambda path: heatmap.save(figure, path))

    def file(self, name: str, write: Callable[[Path], object]) -> Path:
        """Writes a file by calling ``write`` with its path."""
        path = self.path / name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            raise OutputFolderError(f"cannot write {path}: {error.strerror or error}") from error
        self.files.append(path)
        return path
