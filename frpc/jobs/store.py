"""The files of a job, so that an interrupted job can be resumed without losing or repeating a sample.

    DIR/manifest.json                the options of the job; written first
    DIR/shards/00000.safetensors     maps of samples 0 .. S-1, in its metadata which samples, and which failed and why
    DIR/index.jsonl                  one line per sample, made from the shards when all are complete
    DIR/png/00000-name.png           pictures, if wanted

A shard contains a fixed range of samples and is either complete or missing: it is written to a temporary file, flushed, and
renamed. Only the shards say what is done.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from frpc.errors import OptionError, OutputFolderError

__all__ = ["Failure", "Shard", "Store", "read_results", "write_atomically"]

FORMAT = 1


@dataclass(frozen=True)
class Failure:
    """A sample that could not be explained.

    Attributes:
        index: its number.
        name: its name.
        reason: why.
    """

    index: int
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Shard:
    """The samples ``start .. stop - 1``, each either done or failed.

    Attributes:
        number: which shard.
        start, stop: the range.
        names: of those done, in order.
        tensors: by name, one row for each sample done; ``index`` is its number.
        failures: the others.
    """

    number: int
    start: int
    stop: int
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    failures: tuple[Failure, ...] = ()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, whenever the process or the machine stops.

    Raises:
        OutputFolderError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too, is on the disk
            finally:
                os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputFolderError(f"cannot write {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Store:
    """The folder of one job.

    Attributes:
        folder: where.
        count: number of samples.
        size: samples a shard.
    """

    folder: Path
    count: int
    size: int

    @contextmanager
    def held(self, settings: Mapping[str, Any]) -> Iterator[Store]:
        """Locks the folder, and checks that its contents belong to the same job.

        Raises:
            OptionError: another process works there, or it holds a job with other settings; names them.
            OutputFolderError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock").acquire(blocking=False)  # the system lets go of it when the process ends
        except Timeout as error:
            raise OptionError(f"another process is writing to {self.folder}; wait for it, or choose another --out") from error
        except OSError as error:
            raise OutputFolderError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        with lock:
            self._settle(settings)
            for left in [*self.folder.rglob(".*.part")]:
                left.unlink(missing_ok=True)
            yield self

    def _settle(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / "manifest.json"
        wanted = {"format": FORMAT, "shard_size": self.size, **settings}
        content = (json.dumps(wanted, indent=2, allow_nan=False) + "\n").encode()
        if not path.exists():
            if any(self._path(0).parent.glob("*.safetensors")):
                raise OptionError(
                    f"{self.folder} contains shards but no manifest.json, so their job is unknown. Choose another --out"
                )
            write_atomically(path, content)
            return
        found = _read_json(path)
        differing = _differences(found, json.loads(content))
        if differing:
            lines = "\n".join(f"  {line}" for line in differing)
            raise OptionError(
                f"{self.folder} contains a different job:\n{lines}\n  Use the same options to resume it, or choose another --out"
            )

    def numbers(self) -> range:
        """All shards."""
        return range(-(-self.count // self.size))

    def bounds(self, number: int) -> tuple[int, int]:
        """The samples of a shard."""
        return number * self.size, min((number + 1) * self.size, self.count)

    def _path(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:05d}.safetensors"

    def write(self, shard: Shard) -> None:
        """Puts a shard in its place."""
        said = {
            "number": shard.number, "start": shard.start, "stop": shard.stop, "names": list(shard.names),
            "failed": [[f.index, f.name, f.reason] for f in shard.failures],
        }  # fmt: skip
        tensors = {name: tensor.contiguous().cpu() for name, tensor in shard.tensors.items()}
        write_atomically(self._path(shard.number), safetensors.torch.save(tensors, {"frpc": json.dumps(said)}))

    def examine(self) -> tuple[set[int], list[str]]:
        """Which shards are complete, and what is wrong with the others."""
        done, damaged = set(), []
        for number in self.numbers():
            path = self._path(number)
            if not path.exists():
                continue
            problem = self._problem(number)
            if problem:
                damaged.append(f"{path.name}: {problem}")
            else:
                done.add(number)
        return done, damaged

    def _problem(self, number: int) -> str:
        try:
            said, index = _head(self._path(number))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            return f"cannot be read ({error})"
        start, stop = self.bounds(number)
        numbers = sorted([*index, *(at for at, _, _ in said["failed"])])
        if (said["number"], said["start"], said["stop"]) != (number, start, stop) or numbers != list(range(start, stop)):
            return f"does not contain the samples {start} to {stop - 1} exactly once"
        return ""

    def write_index(self) -> list[Failure]:
        """Writes one line per sample from the shards, and returns the failures."""
        lines, failures = [], []
        for number in self.numbers():
            for entry in sorted(_entries(self._path(number)), key=lambda entry: int(entry["index"])):
                lines.append(json.dumps(entry, allow_nan=False))
                if entry["status"] == "failed":
                    failures.append(Failure(entry["index"], entry["name"], entry["reason"]))
        write_atomically(self.folder / "index.jsonl", ("\n".join(lines) + "\n").encode())
        return failures


def read_results(folder: str | Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Goes through a finished or unfinished job: each sample's line of the index, and its tensors (none where it failed)."""
    for path in sorted((Path(folder) / "shards").glob("*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        for entry in sorted(_entries(path), key=lambda entry: int(entry["index"])):
            row = entry.get("row")
            yield entry, {} if row is None else {name: tensor[row] for name, tensor in tensors.items()}


def _entries(path: Path) -> list[dict[str, Any]]:
    """The lines of the index that come from one shard."""
    said, _ = _head(path)
    with safe_open(path, "pt") as file:
        there = set(file.keys())  # a shard where all failed has no maps
        columns = {name: file.get_tensor(name).tolist() for name in ("index", "target", "explained", "sum") if name in there}
    done = [
        {"index": columns["index"][row], "name": name, "status": "done", "shard": path.name, "row": row}
        | {key: _number(columns[key][row]) for key in ("target", "explained", "sum")}
        for row, name in enumerate(said["names"])
    ]
    return done + [{"index": at, "name": name, "status": "failed", "reason": reason} for at, name, reason in said["failed"]]


def _number(value: float) -> float | str:
    """A number as JSON has it; NaN and Inf become words."""
    return value if value == value and abs(value) != float("inf") else str(value)


def _head(path: Path) -> tuple[dict[str, Any], list[int]]:
    with safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {})["frpc"])
        return said, file.get_tensor("index").tolist()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read ({error}); choose another --out") from error


def _differences(found: Any, wanted: Any, path: Sequence[str] = ()) -> list[str]:
    """What two manifests disagree about, one line each."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*found, *(key for key in wanted if key not in found)]
        return [line for key in keys for line in _differences(found.get(key), wanted.get(key), (*path, key))]
    return [] if found == wanted else [f"{'.'.join(path)}: {json.dumps(found)} in the folder, {json.dumps(wanted)} requested"]
