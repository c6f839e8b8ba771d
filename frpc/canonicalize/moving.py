"""Operators that move elements, written in the few that have rules: slices, concatenation, slices written into."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from frpc.core.editor import Editor, calls
from frpc.core.graph import replace

__all__ = ["drop_blank_operands", "select_to_slice_scatter", "split_to_slices", "stack_to_cat", "unroll_circular_pads"]

aten = torch.ops.aten

_UNBINDS = {aten.unbind.int, aten.unbind_copy.int}
_SPLITS = {
    *_UNBINDS,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
}
_END = 2**63 - 1  # past every end


def split_to_slices(graph_module: fx.GraphModule) -> bool:
    """``getitem(split(x), i) -> slice(x)`` and ``getitem(unbind(x), i) -> select(x)``: one result a node.

    Exact when: the pieces have fixed sizes, and are read one by one.
    """
    changed = False
    for node, _, given in calls(graph_module, *_SPLITS):
        dim, pieces, unbinds = given["dim"], node.meta["val"], node.target in _UNBINDS
        sizes: list[Any] = [1 if unbinds else piece.shape[dim] for piece in pieces]
        if any(user.target is not operator.getitem for user in node.users) or any(not isinstance(n, int) for n in sizes):
            continue
        for user in list(node.users):
            edit, position = Editor(graph_module, user), range(len(pieces))[user.args[1]]  # type: ignore[index]
            start = sum(sizes[:position])
            if unbinds:
                replace(user, edit.call(aten.select.int, given["self"], dim, start))
            else:
                replace(user, edit.call(aten.slice.Tensor, given["self"], dim, start, start + sizes[position]))
        graph_module.graph.erase_node(node)
        changed = True
    return changed


def stack_to_cat(graph_module: fx.GraphModule) -> bool:
    """``stack([a, b], d) -> cat([unsqueeze(a, d), unsqueeze(b, d)], d)``; d counts the dimensions of the result."""
    changed = False
    for node, edit, given in calls(graph_module, aten.stack.default):
        dim = given["dim"] % node.meta["val"].dim()
        replace(node, edit.call(aten.cat.default, [edit.call(aten.unsqueeze.default, a, dim) for a in given["tensors"]], dim))
        changed = True
    return changed


def drop_blank_operands(graph_module: fx.GraphModule) -> bool:
    """``cat([blank, x], d) -> x`` where ``blank`` has shape ``[0]`` and ``x`` more than one dimension: PyTorch skips it.

    A blank whose type decides that of the result stays.
    """
    changed = False
    for node, edit, given in calls(graph_module, aten.cat.default):
        kept = [x for x in given["tensors"] if tuple(x.meta["val"].shape) != (0,)]
        types = {x.meta["val"].dtype for x in kept}
        if len(kept) == len(given["tensors"]) or types != {node.meta["val"].dtype} or node.meta["val"].dim() < 2:
            continue
        replace(node, kept[0] if len(kept) == 1 else edit.call(aten.cat.default, kept, given["dim"]))
        changed = True
    return changed


def select_to_slice_scatter(graph_module: fx.GraphModule) -> bool:
    """``select_scatter(x, y, d, i) -> slice_scatter(x, unsqueeze(y, d), d, i, i + 1)``.

    An index from the end stays one where the size is not known: the last slice reaches past the end then.
    """
    changed = False
    for node, edit, given in calls(graph_module, aten.select_scatter.default):
        dim, start = given["dim"] % node.meta["val"].dim(), given["index"]
        size = node.meta["val"].shape[dim]
        start = start % size if isinstance(size, int) else start
        source = edit.call(aten.unsqueeze.default, given["src"], dim)
        end = _END if start == -1 else start + 1
        replace(node, edit.call(aten.slice_scatter.default, given["self"], source, dim, start, end))
        changed = True
    return changed


def unroll_circular_pads(graph_module: fx.GraphModule) -> bool:
    """``pad(x, [l, r], "circular") -> cat([x[-l:], x, x[:r]])``, axis by axis; PyTorch's own way writes in place.

    A negative pad cuts first, and what is left goes round. Exact when: no more is added than is left; PyTorch takes more where
    the other side is cut, and gives what was in memory.
    """
    changed = False
    for node, edit, given in calls(graph_module, aten.pad.default):
        pads, rank = given["pad"], node.meta["val"].dim()
        axes = [(rank - k, *pads[2 * k - 2 : 2 * k]) for k in range(1, len(pads) // 2 + 1)]
        if given["mode"] != "circular" or not all(_goes_round(given["self"].meta["val"].shape[d], *pair) for d, *pair in axes):
            continue
        x = given["self"]
        for dim, before, after in axes:
            if min(before, after) < 0:
                x = edit.call(aten.slice.Tensor, x, dim, max(-before, 0), min(after, 0) or _END)
            parts = [edit.call(aten.slice.Tensor, x, dim, -before, _END)] if before > 0 else []
            parts = [*parts, x, edit.call(aten.slice.Tensor, x, dim, 0, after)] if after > 0 else [*parts, x]
            x = edit.call(aten.cat.default, parts, dim) if len(parts) > 1 else x
        replace(node, x)
        changed = True
    return changed


def _goes_round(size: Any, before: Any, after: Any) -> bool:
    """Says whether an axis of fixed size has as many elements left as are added to either side."""
    if not all(isinstance(n, int) for n in (size, before, after)):
        return False
    return max(before, after) <= size + min(before, 0) + min(after, 0)
