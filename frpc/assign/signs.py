"""Which values are nonnegative for every input: rules that treat the two signs separately then need only one half."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from frpc.core.graph import bind
from frpc.core.torch_compat import OpOverload, schema_of
from frpc.core.traits import Operand, is_nonnegative
from frpc.rules.carriers import is_first_result, operands_of
from frpc.rules.table import traits_of

__all__ = ["is_nonnegative_call", "never_negative"]


def never_negative(graph: fx.Graph) -> set[fx.Node]:
    """Returns the calls whose (first) result never has a negative element."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and (_is_mask(node) or _is_known(node, found)):
            found.add(node)
    return found


def _is_mask(node: fx.Node) -> bool:
    """Says whether a result holds 0 and 1 alone, by its type."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_known(node: fx.Node, found: set[fx.Node]) -> bool:
    if node.target is operator.getitem:
        return is_first_result(node) and node.args[0] in found
    if not isinstance(node.target, OpOverload):
        return False
    positive = {name for name, n in operands_of(node).items() if n in found}
    return is_nonnegative_call(node.target, bind(node.target, node.args, node.kwargs), positive)


def is_nonnegative_call(op: OpOverload, arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """Says whether the (first) result of a call never has a negative element.

    Args:
        op: the operator.
        arguments: by schema name, defaults filled in.
        positive: the operands that are known to have none.
    """
    traits, first = traits_of(op), str(schema_of(op).arguments[0].name)
    if traits.nonnegative is not None:
        return traits.nonnegative(arguments, positive)
    return traits.picks and is_nonnegative(first, arguments[first], positive)
