"""Canonicalization: the captured graph is rewritten into the operators that rules are written for.

Each pass is a function ``pass(graph_module) -> bool`` that states its algebra, returns whether it changed anything, and keeps
the computed function. They run in the order of :data:`PASSES`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from frpc.affine import bind
from frpc.attention import expand_attention
from frpc.decompose import expand_composites
from frpc.editor import Editor
from frpc.errors import TrainingModeError
from frpc.fused import (
    expand_bounds,
    expand_distances,
    expand_moments,
    expand_products_added,
    expand_similarities,
    unify_norms,
)
from frpc.graph import fetch, origin_of, replace
from frpc.precision import keep_float64
from frpc.recurrent import unroll_recurrent_layers
from frpc.stopped import stopped_by
from frpc.torch_compat import OpOverload

__all__ = ["PASSES", "Pass"]

aten = torch.ops.aten
Pass = Callable[[fx.GraphModule], bool]

_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unbind_copy.int,
}
_UNBINDS = {aten.unbind.int, aten.unbind_copy.int}
_COPIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.contiguous.default,
    aten.alias.default,
}


def _calls(graph_module: fx.GraphModule, ops: set[Any]) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in ops]


def refuse_random(graph_module: fx.GraphModule) -> bool:
    """Refuses operators that draw random numbers: their result has no account of its own."""
    for node in graph_module.graph.nodes:
        if _draws(node):
            origin = origin_of(node)
            raise TrainingModeError(
                f"{node.target} draws random numbers in evaluation mode\n    {origin.module}   {origin.where}   {origin.source}\n"
                "  Pass training=self.training to functional dropout, or take the noise out of forward."
            )
    return False


def _draws(node: fx.Node) -> bool:
    """Says whether a call draws random numbers; dropout and its like do so in training alone."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = bind(node.target, node.args, node.kwargs)
    return given.get("train") is not False and given.get("training") is not False and given.get("dropout_p") != 0


def remove_copies(graph_module: fx.GraphModule) -> bool:
    """``dropout(x) -> x``, ``contiguous(x) -> x``, ``detach(x) -> x``, ``to(x, its own dtype) -> x``, ``x[:] -> x``.

    ``x + 0`` stays: values are not looked at. A ``detach`` at which gradients stop stays too; see :mod:`frpc.stopped`.
    """
    changed = False
    for node in graph_module.graph.nodes:
        cast = node.target in (aten._to_copy.default, aten.to.dtype) and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        detached = node.target is aten.detach.default and stopped_by(node) is None
        copies = node.target in _COPIES or cast or detached or (node.target is aten.slice.Tensor and _takes_all(node))
        if node.op == "call_function" and copies and isinstance(node.args[0], fx.Node):
            replace(node, node.args[0])
            changed = True
    return changed


def _takes_all(node: fx.Node) -> bool:
    """Says whether a slice starts at 0, steps by 1 and reaches past any end."""
    given = bind(aten.slice.Tensor, node.args, node.kwargs)
    return given["start"] in (0, None) and given["end"] in (None, 2**63 - 1) and given["step"] == 1


def remove_assertions(graph_module: fx.GraphModule) -> bool:
    """Drops run-time assertions: the explainer checks its inputs before the program runs."""
    names = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range")
    found = [n for n in graph_module.graph.nodes if n.op == "call_function" and any(s in str(n.target) for s in names)]
    for node in found:
        graph_module.graph.erase_node(node)
    return bool(found)


def unify_convolutions(graph_module: fx.GraphModule) -> bool:
    """``conv{1,2,3}d``, ``conv_transpose{1,2,3}d`` and string padding ``-> aten.convolution``, one operator for all."""
    nodes = _calls(graph_module, _CONVOLUTIONS | _TRANSPOSED)
    for node in nodes:
        given = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        edit, transposed = Editor(graph_module, node), node.target in _TRANSPOSED
        x, spatial = given["input"], given["weight"].meta["val"].dim() - 2
        padding, dilation = given["padding"], _each(given["dilation"], spatial)
        if isinstance(padding, str):
            x, padding = _string_padding(edit, x, padding, given["weight"].meta["val"].shape[2:], dilation)
        new = edit.call(
            aten.convolution.default,
            x,
            given["weight"],
            given["bias"],
            _each(given["stride"], spatial),
            _each(padding, spatial),
            dilation,
            transposed,
            _each(given.get("output_padding", [0]), spatial),
            given["groups"],
        )
        replace(node, new)
    return bool(nodes)


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _string_padding(
    edit: Editor, x: fx.Node, padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[fx.Node, list[int]]:
    """``"same"`` pads ``d (k - 1)`` in all; where that is odd, the extra cell goes to the far side, by an explicit pad."""
    if padding == "valid":
        return x, [0] * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        x = edit.call(aten.constant_pad_nd.default, x, extra, 0.0)
    return x, [t // 2 for t in total]


def split_to_slices(graph_module: fx.GraphModule) -> bool:
    """``getitem(split(x), i) -> slice(x)`` and ``getitem(unbind(x), i) -> select(x)``: one result a node."""
    nodes = _calls(graph_module, _SPLITS)
    for node in nodes:
        given = bind(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        dim, offset = given["dim"], 0
        starts = []
        for piece in node.meta["val"]:
            starts.append(offset)
            offset += 1 if node.target in _UNBINDS else piece.shape[dim]
        for user in list(node.users):
            edit = Editor(graph_module, user)
            position: Any = user.args[1]
            start = starts[position]
            if node.target in _UNBINDS:
                new = edit.call(aten.select.int, given["self"], dim, start)
            else:
                stop = start + node.meta["val"][position].shape[dim]
                new = edit.call(aten.slice.Tensor, given["self"], dim, start, stop)
            replace(user, new)
        graph_module.graph.erase_node(node)
    return bool(nodes)


def expose_winners(graph_module: fx.GraphModule) -> bool:
    """``max_pool(x) -> max_pool_with_indices(x)[0]``: the rule reads the winners from the second result."""
    with_indices: dict[Any, OpOverload] = {
        aten.max_pool2d.default: aten.max_pool2d_with_indices.default,
        aten.max_pool3d.default: aten.max_pool3d_with_indices.default,
        aten.max_pool1d.default: aten.max_pool2d_with_indices.default,
    }
    nodes = _calls(graph_module, set(with_indices))
    for node in nodes:
        edit, flat = Editor(graph_module, node), node.target is aten.max_pool1d.default
        x, *rest = node.args
        if flat:  # one dimension is pooled as two, the first of size 1
            x = edit.call(aten.unsqueeze.default, x, -2)
            neutral = (1, 1, 0, 1, False)
            rest = [([n, *a] if isinstance(a, list) and a else a) for a, n in zip(rest, neutral, strict=False)]
        pooled = edit.call(with_indices[node.target], x, *rest)
        new = edit.call(operator.getitem, pooled, 0)
        replace(node, edit.call(aten.squeeze.dim, new, -2) if flat else new)
    return bool(nodes)


def unify_shuffles(graph_module: fx.GraphModule) -> bool:
    """``view(transpose(view(x, [B, g, C/g, ...]), 1, 2), [B, C, ...]) -> channel_shuffle(x, g)``."""
    views = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
    changed = False
    for node in _calls(graph_module, views):
        swapped: Any = node.args[0]
        while isinstance(swapped, fx.Node) and swapped.target is aten.clone.default:
            swapped = swapped.args[0]
        dealt = swapped.args[0] if isinstance(swapped, fx.Node) and swapped.target is aten.transpose.int else None
        if not isinstance(dealt, fx.Node) or dealt.target not in views or {swapped.args[1], swapped.args[2]} != {1, 2}:
            continue
        x, inner, outer = dealt.args[0], dealt.meta["val"], node.meta["val"]
        assert isinstance(x, fx.Node)
        whole = x.meta["val"]
        same = whole.dim() == outer.dim() and inner.dim() == whole.dim() + 1
        if same and str(list(whole.shape)) == str(list(outer.shape)) and str(list(inner.shape[3:])) == str(list(whole.shape[2:])):
            replace(node, Editor(graph_module, node).call(aten.channel_shuffle.default, x, int(inner.shape[1])))
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


def recover_shrinks(graph_module: fx.GraphModule) -> bool:
    """``where(|x| > l, x - l sgn(x), 0 x) -> softshrink(x, l)`` and ``where(|x| <= l, 0, x) -> hardshrink(x, l)``.

    Making a graph functional spells these two out; their secants need them whole.
    """
    changed = False
    for node in _calls(graph_module, {aten.where.self, aten.where.ScalarSelf}):
        condition: Any = node.args[0]
        size: Any = condition.args[0] if condition.target in (aten.gt.Scalar, aten.le.Scalar) else None
        if not isinstance(size, fx.Node) or size.target is not aten.abs.default:
            continue
        x, bound = size.args[0], condition.args[1]
        taken: Any = node.args[1]
        soft = condition.target is aten.gt.Scalar and isinstance(taken, fx.Node) and _is_shrunk(taken, x, bound)
        hard = condition.target is aten.le.Scalar and taken == 0 and node.args[2] is x
        if soft or hard:
            whole = aten.softshrink.default if soft else aten.hardshrink.default
            replace(node, Editor(graph_module, node).call(whole, x, bound))
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


def _is_shrunk(node: fx.Node, x: Any, bound: Any) -> bool:
    """Says whether a node is ``x - sgn(x) * bound``."""
    if node.target is not aten.sub.Tensor or node.args[0] is not x:
        return False
    shift: Any = node.args[1]
    if not isinstance(shift, fx.Node) or shift.target is not aten.mul.Tensor:
        return False
    sign: Any = shift.args[0]
    return shift.args[1] == bound and isinstance(sign, fx.Node) and sign.target is aten.sign.default and sign.args[0] is x


def unroll_circular_pads(graph_module: fx.GraphModule) -> bool:
    """``pad(x, [l, r], "circular") -> cat([x[-l:], x, x[:r]])``, axis by axis; PyTorch's own way writes in place."""
    nodes = [
        n for n in _calls(graph_module, {aten.pad.default}) if bind(aten.pad.default, n.args, n.kwargs)["mode"] == "circular"
    ]
    for node in nodes:
        given = bind(aten.pad.default, node.args, node.kwargs)
        x, edit = given["self"], Editor(graph_module, node)
        pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))
        for axis, (before, after) in enumerate(pairs, start=1):
            dim = node.meta["val"].dim() - axis
            size = x.meta["val"].shape[dim]
            parts = [edit.call(aten.slice.Tensor, x, dim, size - before, size)] if before else []
            parts = [*parts, x, edit.call(aten.slice.Tensor, x, dim, 0, after)] if after else [*parts, x]
            x = edit.call(aten.cat.default, parts, dim) if len(parts) > 1 else x
        replace(node, x)
    return bool(nodes)


def select_to_slice_scatter(graph_module: fx.GraphModule) -> bool:
    """``select_scatter(x, y, d, i) -> slice_scatter(x, unsqueeze(y, d), d, i, i + 1)``."""
    nodes = _calls(graph_module, {aten.select_scatter.default})
    for node in nodes:
        edit, given = Editor(graph_module, node), bind(aten.select_scatter.default, node.args, node.kwargs)
        dim = given["dim"] % node.meta["val"].dim()
        index = given["index"] % int(node.meta["val"].shape[dim])
        source = edit.call(aten.unsqueeze.default, given["src"], dim)
        replace(node, edit.call(aten.slice_scatter.default, given["self"], source, dim, index, index + 1))
    return bool(nodes)


def stack_to_cat(graph_module: fx.GraphModule) -> bool:
    """``stack([a, b], d) -> cat([unsqueeze(a, d), unsqueeze(b, d)], d)``."""
    nodes = _calls(graph_module, {aten.stack.default})
    for node in nodes:
        edit, given = Editor(graph_module, node), bind(aten.stack.default, node.args, node.kwargs)
        dim = given["dim"] % node.meta["val"].dim()
        replace(node, edit.call(aten.cat.default, [edit.call(aten.unsqueeze.default, a, dim) for a in given["tensors"]], dim))
    return bool(nodes)


def expand_gated_linear_units(graph_module: fx.GraphModule) -> bool:
    """``glu(x) -> x[:half] * sigmoid(x[half:])``."""
    nodes = _calls(graph_module, {aten.glu.default})
    for node in nodes:
        edit = Editor(graph_module, node)
        x, dim = node.args[0], node.args[1] if len(node.args) > 1 else -1
        half = x.meta["val"].shape[dim] // 2  # type: ignore[union-attr]
        first = edit.call(aten.slice.Tensor, x, dim, 0, half)
        second = edit.call(aten.sigmoid.default, edit.call(aten.slice.Tensor, x, dim, half, 2 * half))
        replace(node, edit.call(aten.mul.Tensor, first, second))
    return bool(nodes)


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """``f(parameters) -> tensor``: what no input reaches (weight norm, standardised weights) is computed now."""
    changed = False
    for node in list(graph_module.graph.nodes):
        arguments = node.all_input_nodes
        if node.op != "call_function" or not arguments or any(n.op != "get_attr" for n in arguments):
            continue
        real = fx.map_arg((node.args, node.kwargs), lambda n: fetch(graph_module, str(n.target)))
        value = node.target(*real[0], **real[1])
        if isinstance(value, Tensor):
            replace(node, Editor(graph_module, node).constant(node.name, value, node.meta["val"]))
            changed = True
    graph_module.graph.eliminate_dead_code()
    return changed


PASSES: tuple[Pass, ...] = (
    refuse_random,
    remove_assertions,
    keep_float64,
    remove_copies,
    unify_convolutions,
    unroll_recurrent_layers,
    split_to_slices,
    expose_winners,
    unify_shuffles,
    recover_shrinks,
    unroll_circular_pads,
    select_to_slice_scatter,
    stack_to_cat,
    expand_gated_linear_units,
    expand_attention,
    expand_products_added,
    expand_moments,
    expand_bounds,
    expand_distances,
    expand_similarities,
    expand_composites,
    unify_norms,
    fold_constants,
)
"""In this order; :func:`frpc.folding.fold_batch_norm` follows, knowing which layers must stay."""
