"""Are samples treated apart? A captured model is run twice: another sample changes, and the first one's result must not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.capture import Captured
from frpc.graph import Batch, batch_of, describe, first_result, origin_of

__all__ = ["mixing"]


def mixing(captured: Captured, inputs: Sequence[Tensor]) -> str | None:
    """Finds out whether samples are treated apart, by changing one and looking at the result of another.

    Args:
        captured: the model.
        inputs: its example inputs.

    Returns:
        What is wrong, or None: the output does not hold one result for each sample, or one sample's result depends on another.
    """
    result = captured.graph_module.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    fixed = captured.inputs[0].batch
    if batch_of(result.meta["val"], fixed) != Batch(0, 1):
        return (
            f"The explained output {describe(result.meta['val'])} does not hold one result for each sample, samples first.\n"
            f"    {_place(result)}\n  Let the model return [B, ...], or choose another of its outputs with output=."
        )
    count = 2 if fixed is None else fixed
    if count == 1:
        return None
    alike = [x.detach()[:1].expand(count, *x.shape[1:]).clone() for x in inputs]
    later = [torch.cat([x[:1], _changed(x[1:])]) for x in alike]
    earlier = [x.flip(0) for x in later]  # a scan over the samples lets only the later ones see the earlier
    with torch.no_grad():
        expected = captured.graph_module(*alike)
        for unlike, kept in ((later, 0), (earlier, count - 1)):
            if not _same(expected[kept], captured.graph_module(*unlike)[kept]):
                return (
                    "One sample's result depends on the other samples of the batch, so no map of that sample could sum to it.\n"
                    f"    {_place(_first_mixed(captured, alike, unlike, kept) or result)}\n"
                    "  Let the model treat samples apart; explain one that compares samples for fixed partners, held as buffers."
                )
    return None


def _changed(x: Tensor) -> Tensor:
    """Another sample of the same kind: other numbers, or the same integers in another order."""
    return 0.37 * x + 0.21 if x.is_floating_point() else x.flip(-1) if x.dim() > 1 else x


def _place(node: fx.Node) -> str:
    origin = origin_of(node)
    return f"{origin.module or '(top level)'}   {origin.where}   {origin.source}   {describe(node.meta['val'])}"


def _same(one: Tensor, other: Tensor) -> bool:
    bound = 1e4 * torch.finfo(one.dtype).eps * float(one.nan_to_num().abs().amax())
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)


def _first_mixed(captured: Captured, alike: Sequence[Tensor], unlike: Sequence[Tensor], kept: int) -> fx.Node | None:
    """Returns the first node whose part that belongs to the sample that was kept differs."""
    values: list[dict[fx.Node, Any]] = []
    for inputs in (alike, unlike):
        interpreter = fx.Interpreter(captured.graph_module, garbage_collect_values=False)
        interpreter.run(*inputs)
        values.append(interpreter.env)
    for node in captured.graph_module.graph.nodes:
        one, other = (first_result(v.get(node)) for v in values)
        example = first_result(node.meta.get("val"))
        if node.op != "call_function" or not isinstance(one, Tensor) or not one.is_floating_point():
            continue
        batch = batch_of(example, captured.inputs[0].batch)
        if batch is not None and not _same(*(x.narrow(batch.axis, kept * batch.factor, batch.factor) for x in (one, other))):
            return node
    return None
