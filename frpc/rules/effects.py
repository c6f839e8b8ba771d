"""Side effects of a call: memory that it shares or writes into, and random numbers that it draws."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from frpc.core.torch_compat import OpOverload, is_composite, schema_of
from frpc.rules.table import traits_of
from frpc_kernels import NAMESPACE

__all__ = ["is_fresh", "is_number", "is_pure", "owners_of", "shared_by", "writes", "written_into"]

aten = torch.ops.aten

_SILENT = {aten.lift.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default}
"""Operators that may share memory with their operand whatever the signature says, in addition to views."""


def is_pure(op: Any) -> bool:
    """Says whether an operator gives the same at every run, and does nothing else."""
    return not writes(op) and not (isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags)


def writes(op: Any) -> bool:
    """Says whether an operator writes into an operand."""
    return isinstance(op, OpOverload) and bool(schema_of(op).is_mutable)


def is_number(node: fx.Node) -> bool:
    """Says whether a node is a size, or arithmetic on sizes."""
    if node.op != "call_function" or node.target is aten.sym_size.int:
        return node.op == "call_function"
    return not isinstance(node.target, OpOverload) and node.target is not operator.getitem


def is_fresh(node: fx.Node) -> bool:
    """Says whether a call's result has separate memory, by the operator's signature."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload) or op.namespace not in ("aten", "mkldnn", NAMESPACE):
        return node.op != "call_function"
    if op in _SILENT or traits_of(op).whole_view:
        return False  # _unsafe_view is among them, which shares memory and does not say so
    if is_composite(op) and not op.is_view:
        return False  # made of other operators: it may return what it was given
    return all(result.alias_info is None for result in schema_of(op).returns)


def shared_by(node: fx.Node) -> list[fx.Node]:
    """Which operands a result may share memory with: those its operator's signature says, or else all tensors."""
    if is_number(node) or is_fresh(node):
        return []
    if isinstance(node.target, OpOverload) and all(r.alias_info for r in schema_of(node.target).returns):
        return _arguments(node, [a.name for a in schema_of(node.target).arguments if a.alias_info])
    return [x for x in node.all_input_nodes if not is_number(x)]


def written_into(node: fx.Node) -> list[fx.Node]:
    """Which operands a call writes into."""
    if not writes(node.target):
        return []
    return _arguments(node, [a.name for a in schema_of(node.target).arguments if a.alias_info and a.alias_info.is_write])


def _arguments(node: fx.Node, names: Collection[str]) -> list[fx.Node]:
    given = dict(zip((a.name for a in schema_of(node.target).arguments), node.args, strict=False)) | node.kwargs
    return [x for name in names if isinstance(x := given.get(name), fx.Node)]


def owners_of(graph: fx.Graph, apart: Collection[fx.Node] = ()) -> dict[fx.Node, frozenset[fx.Node]]:
    """Finds for every value the values whose memory it may share; itself if it has separate memory.

    Args:
        graph: the program.
        apart: values known to have separate memory, whatever their operators' signatures say.
    """
    owners: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        shared = () if node in apart else shared_by(node)
        owners[node] = frozenset(o for x in shared for o in owners[x]) or frozenset([node])
    return owners
