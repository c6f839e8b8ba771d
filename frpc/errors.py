"""Every exception frpc raises.

All derive from :class:`FrpcError`. :class:`InputError` and its subclasses are about *the caller's arguments* and say what to
change. The others say what frpc could not do with the model.
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
    """An argument is wrong; the message says what is allowed."""


class ShapeError(InputError):
    """A tensor has a different shape than the program was compiled for, or the number of inputs is different."""


class DtypeError(InputError):
    """A tensor has a different dtype than the program was compiled for."""


class DeviceError(InputError):
    """A tensor is on a different device than the program."""


class NonFiniteError(InputError):
    """An input contains NaN or Inf, so a map could not sum to the output."""


class EmptyBatchError(InputError):
    """An input has no samples."""


class TargetError(InputError):
    """A target is out of range, of the wrong kind, or missing."""


class LayerNameError(InputError):
    """No layer has that module path; the nearest names are listed."""


class OptionError(InputError):
    """An option has a value that frpc does not know."""


class SourceError(OptionError):
    """The source of relevance cannot be explained: it is not a real number, or no path leads from it to the output."""


class MemoryLimitError(InputError):
    """The result would not fit into the memory limit; the message gives its size and how to stream it."""


class DataError(InputError):
    """A data set is missing, empty, or not in a form that a job can read."""


class ImageError(InputError):
    """A file is missing, truncated, or is not an image."""


class WeightsError(InputError):
    """A weights file is not safetensors, or does not fit the model."""


class ProgramFileError(InputError):
    """A program file is damaged, of another version or has unknown contents, or something cannot be saved in one."""


class PickleRefusedError(FrpcError, PicklingError):
    """An explainer cannot be pickled, because opening a pickle can run code. Use ``explainer.save`` instead."""


class OutputFolderError(InputError):
    """A folder cannot be written to."""


class PackageError(InputError):
    """An optional package is not installed; the message says how to get it."""


class ModelNameError(InputError):
    """No model has that name; the nearest names are listed."""


class CaptureError(FrpcError):
    """torch.export could not turn the model into a graph."""


class BatchError(FrpcError):
    """One sample affects the result of another, or the model does not return one result per sample."""


class TrainingModeError(FrpcError):
    """The model, or one of its operators, stays in training mode."""


class CompileError(FrpcError):
    """The output of the compiled program differs from the model's."""


class ConservationError(CompileError):
    """A map does not add up to the explained number, by more than rounding error; names the rule that is wrong."""


class ExportError(FrpcError):
    """A program cannot be written in the chosen format; the message says which part cannot."""


class VerificationError(CompileError):
    """The results of an exported file differ from its explainer's; the message contains the comparison."""


class RuleDeclinedError(FrpcError):
    """Raised inside a rule that cannot express this call as an affine map; becomes a :class:`Gap`."""


class SamplesUnknownError(RuleDeclinedError):
    """There is a rule, but frpc cannot tell which elements of the result belong to which sample."""


@dataclass(frozen=True)
class Gap:
    """One node that carries relevance but has no rule that can be used.

    Attributes:
        node: name of the graph node.
        op: the operator, e.g. ``aten.cumsum.default``.
        reason: why it cannot carry relevance, in a few words.
        module: module path of the call.
        where: ``file:line`` of the user's code.
        source: that line's text.
        shape: dtype and shape of the result.
        fix: what to do, if registering a rule does not help.
        samples: the operator has a rule, but its samples cannot be separated.
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
        total: how many nodes should carry relevance.
        cure: how to treat the gaps as constants instead, or that this is not possible.
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
    """Returns which of ``known`` look like ``name``, as the end of an error message."""
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
