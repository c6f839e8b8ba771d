"""What is compiled is compared with the model it came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from frpc.capture import InputSpec
from frpc.errors import CompileError
from frpc.pipeline import Compiled, Front
from frpc.precision import rounding
from frpc.top import Logit
from frpc.torch_compat import pytree

__all__ = ["confirm", "conservation", "verify"]


def verify(compiled: Compiled, shared: Front, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Runs the program once, for the sum of all outputs, and compares its output with the captured model's; gives the results.

    Raises:
        CompileError: if they differ by more than rounding can explain.
    """
    with torch.no_grad():
        expected = shared.captured.graph_module(*inputs)
        kept = shared.canonical.graph.output_node().args[0].meta["val"].dtype  # type: ignore[union-attr]
        seed = torch.ones_like(expected, dtype=kept)  # a model in float64 may end in float32
        results = compiled.function(*inputs, seed, *compiled.references[0])
    got = results[0]
    scale = expected.abs().amax() + torch.finfo(expected.dtype).tiny
    error = float((got - expected).abs().amax() / scale)
    unit = rounding(shared.captured.graph_module, expected)
    bound = 1e4 * unit  # folding and another memory order re-associate sums, no more
    if not error <= bound and bool(torch.isfinite(expected).all()):
        bound = max(bound, 1e2 * _sensitivity(shared, inputs, expected, unit))
        if not error <= bound:
            raise CompileError(
                f"the compiled program's output differs from the model's by {error:.1e} of its largest value (bound {bound:.1e})"
            )
    return results


def conservation(compiled: Compiled, results: Sequence[Tensor]) -> float | None:
    """Returns the largest ``|sum V + bias - y| / sum|V|`` of the samples, y being the sum of the outputs.

    None where a method makes no such account, or the seed says more than which numbers are explained.
    """
    query, account = compiled.plan.query, compiled.assignment.account
    if not account.constants or query.layers or query.top != Logit():
        return None
    output, *maps, left = [r.double() for r in results]
    spread = torch.zeros_like(left) if query.bias != "separate" else left
    parts = [m.reshape(len(m), -1) for m in maps]
    total = sum((m.sum(1) for m in parts), spread)
    size = sum((m.abs().sum(1) for m in parts), spread.abs())
    lost = (total - output.reshape(len(output), -1).sum(1)).abs()
    return float(torch.where(lost == 0, 0.0, lost / size).max())


def confirm(shared: Front, model: nn.Module, names: Sequence[str]) -> None:
    """Runs a model and its captured graph on one made-up input and compares: code may depend on more than weights.

    Args:
        shared: the graph, with the model's tensors.
        model: the model.
        names: names to pass inputs by; empty to pass them by position.

    Raises:
        CompileError: if they differ.
    """
    inputs = [_made_up(spec) for spec in shared.captured.inputs]
    with torch.no_grad():
        got = shared.captured.graph_module(*inputs)
        found = model(**dict(zip(names, inputs, strict=True))) if names else model(*inputs)
    given = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and (x.shape, x.dtype) == (got.shape, got.dtype)]
    bound = 1e4 * rounding(shared.captured.graph_module, got) * float(got.abs().amax())
    if bool(torch.isfinite(got).all()) and not any(float((x - got).abs().amax()) <= bound for x in given):
        raise CompileError(
            f"{type(model).__name__} computes something else than what was captured from it, with the same weights: its code or "
            "an attribute that is no parameter or buffer has changed. Compile it anew."
        )


def _made_up(spec: InputSpec) -> Tensor:
    """An input of the right kind: standard normal numbers, the index 0, masks that hide nothing."""
    shape = [spec.batch or 2, *spec.shape]
    if spec.dtype.is_floating_point:
        chance = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=chance).to(spec.device, spec.dtype)
    return torch.full(shape, spec.dtype is torch.bool, dtype=spec.dtype, device=spec.device)


def _sensitivity(shared: Front, inputs: Sequence[Tensor], expected: Tensor, unit: float) -> float:
    """How much the model's own output moves, relative to its largest value, where its input moves by about one rounding.

    A deep net with weights that nobody trained can blow such a change up a millionfold; its output is then known no better.
    """
    chance = torch.Generator(device=expected.device).manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=chance, device=x.device) if x.is_floating_point() else None
        return x if noise is None else x * (1 + unit * noise.to(x.dtype))

    with torch.no_grad():
        changes = [shared.captured.graph_module(*(moved(x) for x in inputs)) - expected for _ in range(3)]
    return max(float(change.abs().amax()) for change in changes) / float(expected.abs().amax() + torch.finfo(expected.dtype).tiny)
