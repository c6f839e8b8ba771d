"""Derivatives that are infinite or have no value are an error that names the operator, and never a map of NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from frpc.assign.assignment import Assigned
from frpc.core.graph import fetch, first_result, origin_of
from frpc.core.values import all_hold, is_traced, whole
from frpc.driver.pipeline import Compiled
from frpc.emit.program import at_reference, reference_constants
from frpc.emit.propagate import affine_maps, evaluate, pull
from frpc.errors import NonFiniteError
from frpc.rules.table import Operand

__all__ = ["demand_finite"]


def demand_finite(compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor, results: Sequence[Tensor]) -> None:
    """Refuses maps of derivatives that hold NaN or Inf; rules of values have no such places, and are not looked at.

    Raises:
        NonFiniteError: names the operator and its line, found by going through the graph once more.
    """
    if not compiled.assignment.account.spelled_out:
        return
    maps = results[1 : 1 + len(compiled.plan.wanted)]
    if all(all_hold(torch.isfinite(m), "A derivative on the way is infinite or NaN.") for m in maps) or is_traced():
        return
    try:
        node, phase = _first_place(compiled, [whole(x) for x in inputs], whole(functional))
    except RuntimeError:  # under torch.func.vmap the seed does not fit the samples of one call
        node, phase = None, "derivative"
    if node is None:
        raise NonFiniteError("The relevance contains NaN or Inf: a derivative on the path from the output is infinite or NaN.")
    origin = origin_of(node)
    raise NonFiniteError(
        f"The relevance would contain NaN or Inf: the {phase} of {node.target} is infinite or NaN for this input\n"
        f"    {origin.module or '(top level)'}   {origin.where}   {origin.source}\n"
        "  Keep its operand away from that point, e.g. sqrt(x + 1e-12) or clamp(min=1e-6); or use "
        "frpc.rules.FRP(), which does not use derivatives."
    )


class _FoundError(Exception):
    def __init__(self, node: fx.Node) -> None:
        self.node = node


def _first_place(compiled: Compiled, inputs: Sequence[Tensor], functional: Tensor) -> tuple[fx.Node | None, str]:
    """Returns the first node on the way whose value, or else whose derivative, is not finite."""
    assignment, module = compiled.assignment, compiled.assignment.graph_module
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    constants |= reference_constants(assignment)

    def stop_at(assigned: Assigned, v: Tensor, passed: Mapping[Operand, Tensor]) -> None:
        if bool(torch.isfinite(v).all()) and not all(bool(torch.isfinite(share).all()) for share in passed.values()):
            raise _FoundError(assigned.node)

    with torch.no_grad():
        values = evaluate(module.graph, constants, [x.detach() for x in inputs])
        for node, value in values.items():
            one = first_result(value)
            if node in assignment.carried and isinstance(one, Tensor) and not bool(torch.isfinite(one).all()):
                return node, "value"
        references = at_reference(assignment, constants, inputs, values)
        for node, value in (references or {}).items():
            one = first_result(value)
            if node in assignment.carried and isinstance(one, Tensor) and not bool(torch.isfinite(one).all()):
                return node, "value at the reference"
        maps = affine_maps(assignment, values, compiled.plan.pulled, references=references)
        result = compiled.plan.result
        output, there = first_result(values[result]), None if references is None else first_result(references[result])
        try:
            pull(
                assignment,
                maps,
                {result: compiled.plan.query.top(functional, output, there)},
                compiled.plan.wanted,
                record=stop_at,
            )
        except _FoundError as found:
            return found.node, "derivative"
    return None, ""
