"""Every exception frpc raises.

All derive from :class:`FrpcError`. :class:`InputError` and its children mean *the caller's input* is at fault and say what to
change; the others say what the compiler could not do with the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pickle import PicklingError
from types import ModuleType

__all__ = [
    "BatchError",
    "CaptureError",
    "CompileError",
    "ConservationError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "EmptyBatchError",
    "ExportError",
    "FrpcError",
    "Gap",
    "ImageError",
    "InputError",
    "LayerNameError",
    "MemoryLimitError",
    "ModelNameError",
    "NonFiniteError",
    "OptionError",
    "OutputFolderError",
    "PackageError",
    "PickleRefusedError",
    "ProgramFileError",
    "RuleDeclinedError",
    "SamplesUnknownError",
    "ShapeError",
    "SourceError",
    "TargetError",
    "TrainingModeError",
    "UnsupportedOpError",
    "VerificationError",
    "WeightsError",
    "nearest",
    "require",
]


class FrpcError(Exception):
    """Base of all errors raised on purpose by frpc."""


class InputError(FrpcError):
    """What the caller handed in does not fit; the message says what would."""


class ShapeError(InputError):
    """A tensor has another shape, or another number of inputs came, than the program was compiled for."""


class DtypeError(InputError):
    """A tensor has another dtype than the program was compiled for."""


class DeviceError(InputError):
    """A tensor lives on another device than the program."""


class NonFiniteError(InputError):
    """An input holds NaN or Inf: no account of it could sum to anything."""


class EmptyBatchError(InputError):
    """An input has no samples."""


class TargetError(InputError):
    """A target is out of range, of the wrong kind, or missing."""


class LayerNameError(InputError):
    """No layer has that module path; the nearest names are listed."""


class OptionError(InputError):
    """An option has a value that frpc does not know."""


class SourceError(OptionError):
    """What relevance is asked about cannot be explained: it is no real number, or no path leads from it to the output."""


class MemoryLimitError(InputError):
    """What is asked for would not fit into the memory limit; the message gives its size and how to stream it."""


class DataError(InputError):
    """A data set is missing, empty, or not laid out as a job reads it."""


class ImageError(InputError):
    """A file is missing, truncated, or is not an image."""


class WeightsError(InputError):
    """A weights file is not safetensors, or does not fit the model."""


class ProgramFileError(InputError):
    """A program file is damaged, of another version or unknown to frpc in its contents, or something cannot be saved in one."""


class PickleRefusedError(FrpcError, PicklingError):
    """An explainer is not pickled: a pickle runs code when it is opened. ``explainer.save`` writes a file that does not."""


class OutputFolderError(InputError):
    """A folder cannot be written to."""


class PackageError(InputError):
    """An optional package is not installed; the message says how to get it."""


class ModelNameError(InputError):
    """No model has that name; the nearest names are listed."""


class CaptureError(FrpcError):
    """torch.export could not turn the model into a graph."""


class BatchError(FrpcError):
    """The model does not treat samples apart, or does not return one result for each sample."""


class TrainingModeError(FrpcError):
    """The model, or one of its operators, keeps behaving as in training."""


class CompileError(FrpcError):
    """The compiled program disagrees with the model."""


class ConservationError(CompileError):
    """Maps do not sum to what they explain, by more than rounding can explain; names the rule that is wrong."""


class ExportError(FrpcError):
    """A program has no form in the format it was to be written in; the message says what has none."""


class VerificationError(CompileError):
    """An exported file disagrees with its explainer; the message holds the comparison."""


class RuleDeclinedError(FrpcError):
    """Raised inside a rule that cannot express this call as an affine map; becomes a :class:`Gap`."""


class SamplesUnknownError(RuleDeclinedError):
    """A rule would do, and the samples in its operator's result cannot be told apart."""


@dataclass(frozen=True)
class Gap:
    """One node that carries relevance and has no way to do it.

    Attributes:
        node: name of the graph node.
        op: the operator, e.g. ``aten.cumsum.default``.
        reason: why it cannot carry, in a few words.
        module: module path of the call.
        where: ``file:line`` of the user's code.
        source: that line's text.
        shape: dtype and shape of the result.
        fix: what to do, where a rule for the operator is not the answer.
        samples: it is not for want of a rule: its samples cannot be told apart.
    """

    node: str
    op: str
    reason: str
    module: str
    where: str
    source: str
    shape: str
    fix: str = ""
    samples: bool = False


class UnsupportedOpError(FrpcError):
    """Some nodes cannot carry relevance; lists all of them.

    Attributes:
        gaps: every :class:`Gap`, in graph order.
        total: how many nodes ought to carry.
        cure: how the gaps may count as constants instead, or that they cannot.
    """

    def __init__(self, gaps: Sequence[Gap], total: int, cure: str = "") -> None:
        self.gaps, self.total, self.cure = tuple(gaps), total, cure
        super().__init__(_describe_gaps(self.gaps, total, cure))

    def __reduce__(self) -> tuple[type[UnsupportedOpError], tuple[tuple[Gap, ...], int, str]]:
        return type(self), (self.gaps, self.total, self.cure)  # an exception is pickled by its message otherwise


def _describe_gaps(gaps: Sequence[Gap], total: int, cure: str) -> str:
    causes: dict[tuple[str, str], list[Gap]] = {}
    for gap in gaps:
        causes.setdefault((gap.op, gap.reason), []).append(gap)
    plural = "cause" if len(causes) == 1 else "causes"
    lines = [f"{len(gaps)} of {total} nodes cannot carry relevance ({len(causes)} {plural})."]
    for (op, reason), members in causes.items():
        count = f"{len(members)} node{'s' if len(members) > 1 else ''}"
        lines.append(f"  {f'{op} — {reason}':<76} {count}")
        for gap in members:
            lines.append(f"    {gap.module or '(top level)'}   {gap.where}   {gap.source}   {gap.shape}")
    first = gaps[0]
    if first.fix:
        return "\n".join([*lines, f"  Fix: {first.fix}"])
    lines.append(f"  Fix: register a rule with @frpc.rule(torch.ops.{first.op}) — docs/adding_a_rule.md;")
    lines += [f"       {cure}"] if cure else []
    return "\n".join(lines)


def nearest(name: str, known: Iterable[str]) -> str:
    """Says which of ``known`` look like ``name``, as the tail of an error message."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    if close:
        return "nearest names: " + ", ".join(close)
    return "known names: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def require(module: str, extra: str, what_for: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of frpc that installs the package, as in ``pip install 'frpc[extra]'``.
        what_for: what needs it, as the beginning of a sentence: "Reading Parquet files".

    Raises:
        PackageError: the package is not installed, or cannot be imported; says how to install it.
    """
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (package, module)
        state = "is not installed" if missing else f"cannot be imported ({error})"
        raise PackageError(
            f"{what_for} needs the package {package}, which {state}.\n  Fix: pip install 'frpc[{extra}]'"
        ) from error
