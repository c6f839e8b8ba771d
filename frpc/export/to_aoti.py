"""AOTInductor packages: the explainer as machine code, for Python and for C++."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from frpc.core.torch_compat import aoti_compile, aoti_load
from frpc.errors import InputError, OptionError
from frpc.explainer.explainer import Explainer
from frpc.export.question import Question, Signature, Targets
from frpc.export.traced import traced

__all__ = ["METADATA", "aoti", "is_aoti", "run_aoti"]

METADATA = "frpc"  # the key of the signature in the package's metadata


def aoti(
    explainer: Explainer,
    path: str | Path,
    inputs: Sequence[Tensor] | None = None,
    *,
    targets: Targets = "one",
    at: Sequence[str] = (),
    grad_cam: str = "",
    layer: str = "",
) -> Signature:
    """Compiles the explainer into a ``.pt2`` package of machine code: ``(*inputs, target) -> (output, relevance, bias)``.

    ``torch._inductor.aoti_load_package(path)`` runs it, as ``torch::inductor::AOTIModelPackageLoader`` does in C++, on machines
    of this kind. Open only your own.

    Args:
        explainer, path, inputs, targets, at, grad_cam, layer: as for :func:`~frpc.export.torch_export`; the name ends in .pt2.

    Raises:
        OptionError: for a path that does not end in ``.pt2``.
        InputError, LayerNameError, ExportError: see :func:`frpc.export.traced.traced`.
    """
    if Path(path).suffix != ".pt2":
        raise OptionError(f"{path}: the name of an AOTInductor package must end in .pt2.")
    program, signature = traced(explainer, Question(targets, tuple(at), grad_cam, layer), inputs)
    settings = {"aot_inductor.metadata": {METADATA: signature.to_json()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated calls
        aoti_compile(program, str(path), settings)
    return signature


def is_aoti(path: str | Path) -> bool:
    """Says whether a ``.pt2`` archive holds machine code, and not a graph."""
    with zipfile.ZipFile(path) as archive:
        return any("/data/aotinductor/" in f"/{name}" for name in archive.namelist())


def run_aoti(path: str | Path) -> tuple[Callable[..., list[Tensor]], Signature]:
    """Opens a package for running; see :func:`aoti` about trust.

    Raises:
        InputError: if frpc did not write it.
    """
    package = aoti_load(str(path))
    text = package.loader.get_metadata().get(METADATA)
    if text is None:
        raise InputError(f"{path} was not written by frpc.export.aoti: its metadata has no entry {METADATA!r}.")

    def run(*given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(package(*given))

    return run, Signature.from_json(text, path)
