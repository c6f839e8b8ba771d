"""Embedding bags: the tokens of a bag are looked up one by one and then reduced, so that each of them has relevance."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from frpc.core.editor import Editor
from frpc.core.graph import bind, replace
from frpc.rules.carriers import EMBEDDING_BAGS

__all__ = ["expand_embedding_bags"]

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2  # PyTorch's numbers for the modes


def expand_embedding_bags(graph_module: fx.GraphModule) -> bool:
    """``embedding_bag(W, t.view(-1), arange(0, B L, L)) -> reduce(embedding(W, t), 1)`` for bags of one length, ``t [B, L]``.

    Bags of other lengths, given by offsets, have no batch of samples and are left alone.
    """
    changed = False
    for node in [n for n in graph_module.graph.nodes if n.target in EMBEDDING_BAGS]:
        given = bind(node.target, node.args, node.kwargs)
        length = _bag_length(given)
        results = [user for user in node.users if user.users]
        if length and all(user.target is operator.getitem and user.args[1] == 0 for user in results):
            edit = Editor(graph_module, node)
            reduced = _reduced(edit, given, length)
            for user in results:
                replace(user, reduced)
            changed = True
    if changed:
        graph_module.graph.eliminate_dead_code()
    return changed


def _bag_length(given: dict[str, Any]) -> int:
    """Returns how many tokens every bag has: the step of offsets that cover exactly all tokens; 0 if they do not."""
    offsets = given["offsets"]
    if given["include_last_offset"] or offsets.target is not aten.arange.start_step:
        return 0
    start, _, step = (*offsets.args, 1)[:3]
    bags, tokens = offsets.meta["val"].shape[0], given["indices"].meta["val"].shape[0]
    return step if start == 0 and isinstance(step, int) and step > 0 and str(bags * step) == str(tokens) else 0


def _reduced(edit: Editor, given: dict[str, Any], length: int) -> fx.Node:
    """Looks up, weights and reduces along the tokens of a bag; padding counts for nothing, and a bag of padding is 0."""
    tokens = _in_bags(edit, given["indices"], length)  # [B, L]
    rows = edit.call(aten.embedding.default, given["weight"], tokens)  # [B, L, D]
    mode, padding = given["mode"], given["padding_idx"]
    if given["per_sample_weights"] is not None:
        weights = edit.call(aten.unsqueeze.default, _in_bags(edit, given["per_sample_weights"], length), -1)
        rows = edit.call(aten.mul.Tensor, rows, weights)
    if padding < 0:
        ops = {_SUM: aten.sum.dim_IntList, _MEAN: aten.mean.dim}
        return _largest(edit, rows) if mode == _MAX else edit.call(ops[mode], rows, [1])
    kept = edit.call(aten.unsqueeze.default, edit.call(aten.ne.Scalar, tokens, padding), -1)  # [B, L, 1]
    if mode == _MAX:
        lowest = torch.finfo(rows.meta["val"].dtype).min  # a number, which increments can subtract
        seen = edit.call(aten.where.ScalarOther, kept, rows, lowest)
        return edit.call(aten.where.ScalarOther, edit.call(aten.any.dim, kept, 1), _largest(edit, seen), 0.0)
    total = edit.call(aten.sum.dim_IntList, edit.call(aten.where.ScalarOther, kept, rows, 0.0), [1])
    if mode == _SUM:
        return total
    count = edit.call(aten.clamp_min.default, edit.call(aten.sum.dim_IntList, kept, [1]), 1)  # [B, 1]
    return edit.call(aten.div.Tensor, total, count)


def _largest(edit: Editor, rows: fx.Node) -> fx.Node:
    """Of equal tokens the first wins, as in the bag; ``amax`` would share among them."""
    return edit.call(operator.getitem, edit.call(aten.max.dim, rows, 1), 0)


def _in_bags(edit: Editor, flat: fx.Node, length: int) -> fx.Node:
    """Undoes the flattening of ``[B, L]``."""
    whole = flat.args[0] if flat.target in (aten.view.default, aten.reshape.default) else None
    if isinstance(whole, fx.Node) and whole.meta["val"].dim() == 2 and whole.meta["val"].shape[1] == length:
        return whole
    return edit.call(aten.view.default, flat, [-1, length])
