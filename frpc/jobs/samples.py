"""Where the samples of a job come from: a folder of pictures, or Parquet files that hold them.

Samples are numbered once and for all, files by their path and rows by their place, so that a job can be cut into parts by number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from frpc.errors import DataError, nearest, require

__all__ = ["Folder", "Parquet", "RowGroup", "Sample", "Samples", "open_samples"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".jpe", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded.

    Attributes:
        name: its path, relative to the data.
        content: its bytes, or None if they cannot be read.
        problem: why not.
        label: its class according to the data, if a label column was chosen.
    """

    name: str
    content: bytes | None
    problem: str = ""
    label: int | str | None = None


class Samples(Protocol):
    """A fixed list of samples that every process of a job can read any part of."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Sample]:
        """Reads some; what cannot be read comes with its problem."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of them: two data sets with the same description are the same job's."""
        ...


def open_samples(path: str | Path, column: str = "image", label: str | None = None) -> Samples:
    """A folder of pictures, a Parquet file, or a folder of Parquet files, whichever ``path`` is.

    Args:
        path: the data.
        column: of Parquet files: where the encoded pictures are, as bytes or as ``{"bytes": ..., "path": ...}``.
        label: of Parquet files: where each picture's class is, a number or a name.

    Raises:
        DataError: there is nothing to explain, or not such a column.
        PackageError: Parquet files, and pyarrow is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no such data: {path}")
    tables = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if tables:
        return Parquet.of(path, tables, column, label)
    if not path.is_dir():
        raise DataError(f"{path} is neither a folder nor a .parquet file")
    if label is not None:
        raise DataError(
            f"{path} is a folder of pictures, which has no column {label!r}; give the class with --target, or use Parquet files"
        )
    return Folder.of(path)


@dataclass(frozen=True)
class Folder:
    """The pictures below a folder, by their relative paths; hidden files are left out, as is what has no picture's suffix.

    Attributes:
        path: the folder.
        names: relative paths, sorted.
        digest: SHA-256 of names and sizes.
    """

    path: Path
    names: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Lists the pictures.

        Raises:
            DataError: if there are none.
        """
        found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES}
        names = sorted(name for name, file in found.items() if file.is_file() and not _hidden(name))
        if not names:
            raise DataError(f"{path} contains no pictures ({', '.join(sorted(SUFFIXES))}) and no .parquet files")
        digest = hashlib.sha256()
        for name in names:
            digest.update(f"{name}\0{found[name].stat().st_size}\0".encode())
        return cls(path, tuple(names), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> list[Sample]:
        """Reads files; one that is gone or locked comes with its problem."""
        return [self._one(name) for name in self.names[start:stop]]

    def _one(self, name: str) -> Sample:
        try:
            return Sample(name, (self.path / name).read_bytes())
        except OSError as error:
            return Sample(name, None, f"cannot be read: {error.strerror or error}")

    def describe(self) -> dict[str, Any]:
        """Number, and a digest of names and sizes."""
        return {"kind": "folder", "count": len(self), "sha256": self.digest}


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@dataclass(frozen=True)
class RowGroup:
    """Rows of a Parquet file that are read together.

    Attributes:
        file: where they are.
        name: of the file, as samples are named.
        number: which of the file's row groups it is.
        first_row: number of its first row in the file.
        first: number of its first sample.
        rows: how many there are.
    """

    file: Path
    name: str
    number: int
    first_row: int
    first: int
    rows: int


@dataclass(frozen=True)
class Parquet:
    """The rows of Parquet files, in the order of their names.

    Attributes:
        groups: the row groups of all files, in order.
        column: where the pictures are.
        label: where the classes are, if anywhere.
        digest: SHA-256 of names, sizes and numbers of rows.
    """

    groups: tuple[RowGroup, ...]
    column: str
    label: str | None
    digest: str

    @classmethod
    def of(cls, root: Path, files: list[Path], column: str, label: str | None) -> Parquet:
        """Reads the files' tables of contents.

        Raises:
            DataError: a file is damaged, has no such column or other contents in it, or there are no rows.
            PackageError: pyarrow is not installed.
        """
        pyarrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
        digest, groups, count = hashlib.sha256(f"{column}\0{label}\0".encode()), [], 0
        for file in files:
            name = file.name if root == file else file.relative_to(root).as_posix()
            try:
                opened = parquet.ParquetFile(file)
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{file} is not a Parquet file, or is damaged: {error}") from error
            with opened:
                _check_columns(file, opened.schema_arrow, column, label)
                first = 0
                for number in range(opened.num_row_groups):
                    rows = opened.metadata.row_group(number).num_rows
                    groups.append(RowGroup(file, name, number, first, count, rows))
                    first, count = first + rows, count + rows
            digest.update(f"{name}\0{file.stat().st_size}\0{first}\0".encode())
        if count == 0:
            raise DataError(f"{root} has no rows")
        return cls(tuple(groups), column, label, digest.hexdigest())

    def __len__(self) -> int:
        return self.groups[-1].first + self.groups[-1].rows

    def read(self, start: int, stop: int) -> list[Sample]:
        """Reads the row groups that hold these samples."""
        return list(self._rows(start, stop))

    def _rows(self, start: int, stop: int) -> Iterator[Sample]:
        parquet = _pyarrow("pyarrow.parquet")
        columns = [self.column, *([self.label] if self.label else [])]
        for group in self.groups:
            low, high = max(start, group.first), min(stop, group.first + group.rows)
            if low >= high:
                continue
            with parquet.ParquetFile(group.file) as opened:
                table = opened.read_row_group(group.number, columns=columns).slice(low - group.first, high - low)
            labels = table[self.label].to_pylist() if self.label else [None] * len(table)
            for at, (value, label) in enumerate(
                zip(table[self.column].to_pylist(), labels, strict=True), low - group.first + group.first_row
            ):
                content = value.get("bytes") if isinstance(value, dict) else value
                yield Sample(f"{group.name}:{at}", content, "" if content else f"column {self.column!r} is empty", label)

    def describe(self) -> dict[str, Any]:
        """Number, columns, and a digest of names, sizes and numbers of rows."""
        return {
            "kind": "parquet", "count": len(self), "column": self.column, "label": self.label, "sha256": self.digest,
        }  # fmt: skip


def _check_columns(file: Path, schema: Any, column: str, label: str | None) -> None:
    types = _pyarrow("pyarrow.types")
    for name in (column, *([label] if label else [])):
        if name not in schema.names:
            raise DataError(f"{file} has no column {name!r}; {nearest(name, schema.names)}")
    kind = schema.field(column).type
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(
            f"column {column!r} of {file} is {kind}; pictures must be encoded files, as binary or as a struct with bytes"
        )
    if label is not None:
        kind = schema.field(label).type
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise DataError(f"column {label!r} of {file} is {kind}; a class must be an integer or a name")


def _pyarrow(module: str) -> Any:
    return require(module, "parquet", "Reading Parquet files")
