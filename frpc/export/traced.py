"""From an explainer to an `ExportedProgram`: one traced graph of ATen operators, from which every file is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from frpc.errors import ExportError
from frpc.explainer.explainer import Explainer
from frpc.export.answer import Rewrite, exportable
from frpc.export.question import Question, Signature

__all__ = ["traced"]


def traced(
    explainer: Explainer, question: Question, inputs: Sequence[Tensor] | None, rewrites: Sequence[Rewrite] = ()
) -> tuple[ExportedProgram, Signature]:
    """Traces the computation of a question, with a free batch, and with a free number of targets if there are several.

    Raises:
        ExportError: if the graph holds an operator that is not PyTorch's own.
        FrpcError: see :func:`frpc.export.answer.exportable`.
    """
    with explainer.programs.reading_graphs():
        return _traced(explainer, question, inputs, rewrites)


def _traced(
    explainer: Explainer, question: Question, inputs: Sequence[Tensor] | None, rewrites: Sequence[Rewrite]
) -> tuple[ExportedProgram, Signature]:
    made = exportable(explainer, question, inputs, rewrites)
    sizes = {name: Dim(name, min=1) for name in ("batch", "targets")}
    free = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in made.signature.free.items()}
    with torch.no_grad():
        program = torch.export.export(made.module, made.example, dynamic_shapes=free, strict=False)
        program = program.run_decompositions({})
    foreign = {str(n.target) for n in program.graph.nodes if getattr(n.target, "namespace", "aten") != "aten"}
    if foreign:
        raise ExportError(
            f"The program of {made.signature.model} calls {', '.join(sorted(foreign))}, which other runtimes do not have. Only "
            "PyTorch's own operators can be exported. Write the layer with those, or leave it out of the exported model."
        )
    return program, made.signature
