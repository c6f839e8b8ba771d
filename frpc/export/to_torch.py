"""Files of `torch.export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from frpc.core.torch_compat import trace_lock
from frpc.explainer.explainer import Explainer
from frpc.export.question import Question, Signature, Targets
from frpc.export.traced import traced

__all__ = ["SIGNATURE", "run_torch_export", "torch_export"]

SIGNATURE = "frpc.json"  # the name of the signature inside the archive


def torch_export(
    explainer: Explainer,
    path: str | Path,
    inputs: Sequence[Tensor] | None = None,
    *,
    targets: Targets = "one",
    at: Sequence[str] = (),
    grad_cam: str = "",
    layer: str = "",
) -> Signature:
    """Writes the explainer as a ``.pt2`` file of ``torch.export``: ``(*inputs, target) -> (output, relevance, bias)``.

    ``torch.export.load(path).module()`` runs it, without frpc. Loading such a file can execute code that is in it: open only your
    own.

    Args:
        explainer: a compiled explainer.
        path: the file to write.
        inputs: an example whose range :func:`~frpc.export.verify` draws from; needed for inputs of integers.
        targets: ``one`` a sample, ``[B]``; ``several``, ``[B, K]``; a ``seed``, ``[B, *O]``; or nothing: ``top`` explains the
            predicted class, which the file computes itself.
        at: layers whose relevance is wanted instead of the input's.
        grad_cam: layer whose class activation map is wanted instead.
        layer: the layer whose neurons are all explained, at the example's size.

    Raises:
        InputError, OptionError, LayerNameError, CompileError: see :func:`frpc.export.traced.traced`.
    """
    program, signature = traced(explainer, Question(targets, tuple(at), grad_cam, layer), inputs)
    torch.export.save(program, str(path), extra_files={SIGNATURE: signature.to_json()})
    return signature


def run_torch_export(path: str | Path) -> tuple[Callable[..., list[Tensor]], Signature]:
    """Opens a file for running; see :func:`torch_export` about trust."""
    extra = {SIGNATURE: ""}
    with trace_lock:
        module = torch.export.load(str(path), extra_files=extra).module()
    signature = Signature.from_json(extra[SIGNATURE], path)

    def run(*given: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*given))

    return run, signature
