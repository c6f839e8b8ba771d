"""Canonicalization and folding: what each pass rewrites, and the smallest graphs that look alike and that it must leave alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from frpc.canonicalize import fused, moving, recovered, sliding, trimming
from frpc.canonicalize import passes as canonicalize
from frpc.canonicalize.attention import expand_attention
from frpc.canonicalize.bags import expand_embedding_bags
from frpc.canonicalize.batch_norm import fold_batch_norm
from frpc.canonicalize.complex.complexes import split_complex
from frpc.canonicalize.precision import keep_float64, norms_in_one_type, promote_explicitly
from frpc.canonicalize.recurrent import unroll_recurrent_layers
from frpc.capture.decompose import expand_composites, spell_out
from rewrites import Line, Rewrite

aten = torch.ops.aten
V, S, I, P = (4,), (4, 6), (4, 6, 5), (2, 2, 5)  # noqa: E741 - a vector, a signal, an image, a signal in two groups


def fold(graph_module: fx.GraphModule) -> bool:
    return fold_batch_norm(graph_module, frozenset())


def keep_first(graph_module: fx.GraphModule) -> bool:
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.convolution.default):
        node.meta["layers"] = ("conv",)
    return fold_batch_norm(graph_module, frozenset({"conv"}))


def batch(x: Any) -> Any:
    return aten.sym_size.int(x, 0)


def conv(c: Any, x: Any, *weight: int, bias: Any = None, transposed: bool = False) -> Any:
    rank = len(weight) - 2
    return aten.convolution.default(x, c(*weight), bias, [1] * rank, [0] * rank, [1] * rank, transposed, [0] * rank, 1)


def normed(c: Any, x: Any, channels: int, mean: Any = None, item: int = 0) -> Any:
    mean, variance = c(channels) if mean is None else mean, c(torch.linspace(0.5, 2.0, channels, dtype=torch.float64))
    return aten._native_batch_norm_legit_no_training.default(x, c(channels), c(channels), mean, variance, 0.1, 1e-5)[item]


def shuffled(x: Any, inner: list[Any], outer: list[Any], dims: tuple[int, int] = (1, 2), copied: bool = True) -> Any:
    swapped = aten.transpose.int(aten.view.default(x, inner), *dims)
    if copied:
        swapped = aten.clone.default(swapped, memory_format=torch.contiguous_format)
    return aten.reshape.default(swapped, outer)


def soft(x: Any, bound: float = 0.5, shift: Any = None, other: Any = None, **alpha: Any) -> Any:
    shift = aten.mul.Tensor(aten.sign.default(x), bound) if shift is None else shift
    shrunk = aten.sub.Tensor(x, shift, **alpha)
    other = aten.mul.Tensor(x, 0) if other is None else other
    return aten.where.self(aten.gt.Scalar(aten.abs.default(x), bound), shrunk, other)


def hard(x: Any, bound: float = 0.5, taken: Any = 0, kept: Any = None, compare: Any = aten.le.Scalar) -> Any:
    return aten.where.ScalarSelf(compare(aten.abs.default(x), bound), taken, x if kept is None else kept)


def half(x: Any) -> Any:
    return aten._to_copy.default(x, dtype=torch.bfloat16)


# fmt: off
REWRITES: tuple[Rewrite, ...] = (
    Rewrite(trimming.refuse_random, (), (
        Line("dropout in evaluation", lambda c, x: aten.dropout.default(x, 0.5, False), (V,)),
        Line("attention without dropout", lambda c, x: aten.scaled_dot_product_attention.default(x, x, x), (S,)),
        Line("rrelu in evaluation", lambda c, x: aten.rrelu.default(x, 0.1, 0.3, False), (V,)),
    )),
    Rewrite(trimming.remove_assertions, (
        Line("of a tensor's type",
             lambda c, x: (aten._assert_tensor_metadata.default(x, None, None, torch.float64), aten.neg.default(x))[1], (V,)),
    ), (
        Line("nothing asserted", lambda c, x: aten.neg.default(x), (V,)),
        Line("an operator of another library", lambda c, x: torch.ops.near._assert_scalar_like.default(x), (V,)),
    )),
    Rewrite(keep_float64, (
        Line("cast to float32", lambda c, x: aten.mul.Tensor(aten._to_copy.default(x, dtype=torch.float32), 2.0), (V,)),
        Line("there and back",
             lambda c, x: aten.to.dtype(aten.neg.default(aten.to.dtype(x, torch.float32)), torch.float64), (V,)),
        Line("meets what is made in float32",
             lambda c, x: aten.mul.Tensor(aten._to_copy.default(x, dtype=torch.float32), c(4, dtype=torch.float32)), (V,)),
    ), (
        Line("cast to half", lambda c, x: aten._to_copy.default(x, dtype=torch.float16), (V,)),
        Line("cast to integers", lambda c, x: aten._to_copy.default(x, dtype=torch.int64), (V,)),
        Line("cast of bools", lambda c, x: aten._to_copy.default(aten.gt.Scalar(x, 0), dtype=torch.float32), (V,)),
        Line("its bits are read", lambda c, x: aten.view.dtype(aten._to_copy.default(x, dtype=torch.float32), torch.int32), (V,)),
    ), bound=1e-5, widens=True),
    Rewrite(norms_in_one_type, (
        Line("layer norm", lambda c, x: aten.layer_norm.default(half(x), [4], c(4), c(4)), (V,)),
        Line("without a bias", lambda c, x: aten.layer_norm.default(half(x), [4], c(4), None), (V,)),
        Line("group norm", lambda c, x: aten.group_norm.default(half(x), 1, c(2), c(2)), ((2, 5),)),
        Line("batch norm", lambda c, x: aten.batch_norm.default(
            half(x), c(4), c(4), c(torch.zeros(4)), c(torch.ones(4)), False, 0.1, 1e-5, False), (V,)),
    ), (
        Line("of one type", lambda c, x: aten.layer_norm.default(x, [4], c(4), c(4)), (V,)),
        Line("half throughout", lambda c, x: aten.layer_norm.default(
            half(x), [4], c(4, dtype=torch.bfloat16), c(4, dtype=torch.bfloat16)), (V,)),
        Line("without weights", lambda c, x: aten.layer_norm.default(half(x), [4]), (V,)),
    ), dtype=torch.float32, bound=1e-2),
    Rewrite(promote_explicitly, (
        Line("a sum", lambda c, x: aten.add.Tensor(x, aten._to_copy.default(x, dtype=torch.float32)), (V,)),
        Line("a constant", lambda c, x: aten.mul.Tensor(c(4, dtype=torch.float32), x), (V,)),
        Line("side by side", lambda c, x: aten.cat.default([aten._to_copy.default(x, dtype=torch.float32), x], 1), (V,)),
        Line("one or the other",
             lambda c, x: aten.where.self(aten.gt.Scalar(x, 0), x, aten._to_copy.default(x, dtype=torch.float32)), (V,)),
    ), (
        Line("of one type", lambda c, x: aten.add.Tensor(x, x), (V,)),
        Line("a number", lambda c, x: aten.mul.Tensor(x, 2.0), (V,)),
        Line("a tensor without dimensions", lambda c, x: aten.mul.Tensor(x, c(torch.tensor(0.3, dtype=torch.float32))), (V,)),
        Line("integers", lambda c, x: aten.mul.Tensor(x, aten._to_copy.default(aten.gt.Scalar(x, 0), dtype=torch.int64)), (V,)),
        Line("a norm of half in weights of float32", lambda c, x: aten.layer_norm.default(
            aten._to_copy.default(x, dtype=torch.bfloat16), [4], c(4, dtype=torch.float32), None), (V,)),
    )),
    Rewrite(trimming.remove_copies, (
        Line("dropout", lambda c, x: aten.dropout.default(x, 0.5, False), (V,)),
        Line("dropout of nothing", lambda c, x: aten.dropout.default(x, 0.0, True), (V,)),
        Line("dropout of features", lambda c, x: aten.feature_dropout.default(x, p=0.5, train=False), (S,)),
        Line("cast to its own type", lambda c, x: aten._to_copy.default(x, dtype=torch.float64), (V,)),
        Line("the whole", lambda c, x: aten.slice.Tensor(x, 1, 0, 2**63 - 1), (V,)),
        Line("the whole, nothing said", lambda c, x: aten.slice.Tensor(x, -1), (V,)),
        Line("contiguous already", lambda c, x: aten.contiguous.default(x), (S,)),
        Line("contiguous", lambda c, x: aten.view.default(aten.contiguous.default(aten.transpose.int(x, 1, 2)), [-1, 24]), (S,)),
    ), (
        Line("dropout in training", lambda c, x: aten.mul.Tensor(aten.dropout.default(x, 0.5, True), 0), (V,)),
        Line("cast to another type", lambda c, x: aten._to_copy.default(x, dtype=torch.float32), (V,)),
        Line("put in order for a view",
             lambda c, x: aten.view.default(aten._to_copy.default(aten.transpose.int(x, 1, 2),
                 memory_format=torch.contiguous_format), [-1, 24]), (S,)),
        Line("all but the first", lambda c, x: aten.slice.Tensor(x, 1, 1, 2**63 - 1), (V,)),
        Line("all but the last", lambda c, x: aten.slice.Tensor(x, 1, 0, -1), (V,)),
        Line("as many as there are now", lambda c, x: aten.slice.Tensor(x, 1, 0, 3), (V,)),
        Line("every other", lambda c, x: aten.slice.Tensor(x, 1, 0, 2**63 - 1, 2), (V,)),
        Line("plus nothing", lambda c, x: aten.add.Tensor(x, 0.0), (V,)),
    )),
    Rewrite(sliding.unify_convolutions, (
        Line("1d", lambda c, x: aten.conv1d.default(x, c(4, 2, 3), c(4), [2], [1], [1], 2), (S,)),
        Line("2d, by name", lambda c, x: aten.conv2d.default(x, c(4, 4, 2, 2), dilation=[2, 1], padding=[0, 1]), (I,)),
        Line("valid", lambda c, x: aten.conv2d.padding(x, c(4, 4, 2, 2), None, [1, 1], "valid"), (I,)),
        Line("same, even kernel", lambda c, x: aten.conv1d.padding(x, c(4, 4, 4), None, [1], "same"), (S,)),
        Line("transposed", lambda c, x: aten.conv_transpose1d.default(x, c(4, 2, 3), None, [2], [1], [1], 2), (S,)),
        Line("one sample without a batch", lambda c, x: aten.conv1d.default(x, c(4, 2, 3)), (V,), fixed=True),
    ), (
        Line("as it should be", lambda c, x: conv(c, x, 3, 4, 2), (S,)),
        Line("linear", lambda c, x: aten.linear.default(x, c(3, 4)), (V,)),
    )),
    Rewrite(unroll_recurrent_layers, (
        Line("gru", lambda c, x: aten.gru.input(
            x, c(1, 2, 6), [c(18, 6), c(18, 6), c(18), c(18)], True, 1, 0.0, False, False, True)[0], (S,), fixed=True),
        Line("lstm, both directions", lambda c, x: aten.lstm.input(
            x, [c(2, 2, 3), c(2, 2, 3)], [w for _ in range(2) for w in (c(12, 6), c(12, 3))], False, 1, 0.5, False, True,
                True)[0], (S,), fixed=True),
        Line("a cell", lambda c, x: aten.rnn_tanh_cell.default(x, x, c(4, 4), c(4, 4), c(4), c(4)), (V,)),
        Line("cells one after another", lambda c, x: aten.gru_cell.default(
            x, aten.gru_cell.default(x, x, a := c(12, 4), b := c(12, 4)), a, b), (V,)),
    ), (
        Line("dropout between layers", lambda c, x: aten.mul.Tensor(aten.gru.input(
            x, c(2, 2, 6), [w for _ in range(2) for w in (c(18, 6), c(18, 6))], False, 2, 0.5, True, False, True)[0], 0),
                (S,), fixed=True),
        Line("written out already", lambda c, x: aten.tanh.default(aten.add.Tensor(aten.linear.default(x, c(4, 4)), x)), (V,)),
    )),
    Rewrite(moving.split_to_slices, (
        Line("split", lambda c, x: aten.sub.Tensor(*(p := aten.split.Tensor(x, 2, 1), (p[0], p[1]))[1]), (V,)),
        Line("from the end, backwards",
             lambda c, x: aten.cat.default([(p := aten.split_with_sizes.default(x, [1, 5], -1))[1], p[0]], -1), (S,)),
        Line("split of a split", lambda c, x: aten.split.Tensor(aten.split.Tensor(x, 2, 1)[1], 1, 1)[0], (V,)),
        Line("unbind", lambda c, x: aten.sub.Tensor((p := aten.unbind.int(x, 2))[5], p[0]), (S,)),
        Line("the last, counted from the end", lambda c, x: aten.unbind.int(x, -2)[-1], (S,)),
        Line("chunk", lambda c, x: aten.chunk.default(x, 4, 2)[2], (S,)),
    ), (
        Line("all pieces at once", lambda c, x: aten.cat.default(aten.split.Tensor(x, 2, 1), 1), (V,)),
        Line("pieces of the batch", lambda c, x: aten.chunk.default(aten.cat.default([x, x]), 2)[0], (V,)),
    )),
    Rewrite(sliding.expose_winners, (
        Line("1d", lambda c, x: aten.max_pool1d.default(x, [3], [2], [1], [1], True), (S,)),
        Line("1d, by name", lambda c, x: aten.max_pool1d.default(x, [2], ceil_mode=True, dilation=[2]), (S,)),
        Line("2d, the stride not given", lambda c, x: aten.max_pool2d.default(x, [2, 2], ceil_mode=True), (I,)),
        Line("2d, one number for both", lambda c, x: aten.max_pool2d.default(x, [2], [1]), (I,)),
        Line("3d", lambda c, x: aten.max_pool3d.default(aten.unsqueeze.default(x, 1), [2, 2, 2]), (I,)),
    ), (
        Line("winners known", lambda c, x: aten.max_pool2d_with_indices.default(x, [2, 2])[0], (I,)),
        Line("averages", lambda c, x: aten.avg_pool1d.default(x, [2]), (S,)),
    )),
    Rewrite(recovered.unify_shuffles, (
        Line("two groups", lambda c, x: shuffled(x, [batch(x), 2, 2, 5], [batch(x), 4, 5]), ((4, 5),)),
        Line("four groups, counted from the end",
             lambda c, x: shuffled(x, [-1, 4, 2, 3], [-1, 8, 3], (-2, -3), False), ((8, 3),)),
        Line("one after another",
             lambda c, x: shuffled(shuffled(x, [-1, 2, 2, 5], [-1, 4, 5]), [-1, 2, 2, 5], [-1, 4, 5]), ((4, 5),)),
        Line("images of a fixed batch", lambda c, x: shuffled(x, [2, 2, 2, 2, 2], [2, 4, 2, 2]), ((4, 2, 2),), fixed=True),
    ), (
        Line("the batch is dealt too", lambda c, x: shuffled(x, [-1, 2, 2, 5], [batch(x), 8, 5]), ((8, 5),)),
        Line("the batch is dealt, of four samples", lambda c, x: shuffled(x, [4, 2, 2, 5], [2, 8, 5]), ((8, 5),), fixed=True),
        Line("batch and groups change places", lambda c, x: shuffled(x, [2, 2, 2, 5], [2, 4, 5], (0, 1)), ((4, 5),), fixed=True),
        Line("vectors, which PyTorch does not shuffle", lambda c, x: shuffled(x, [-1, 2, 3], [-1, 6]), ((6,),)),
        Line("groups and what is behind them", lambda c, x: shuffled(x, [-1, 2, 2, 5], [-1, 4, 5], (2, 3)), ((4, 5),)),
        Line("channels dealt with what is behind them", lambda c, x: shuffled(x, [-1, 2, 4, 2], [-1, 4, 4], (1, 2)), ((4, 4),)),
        Line("what is behind is dealt", lambda c, x: shuffled(x, [-1, 4, 2, 2], [-1, 4, 4], (1, 2)), ((4, 4),)),
        Line("to another shape", lambda c, x: shuffled(x, [-1, 2, 2, 5], [-1, 2, 10]), ((4, 5),)),
    )),
    Rewrite(recovered.recover_shrinks, (
        Line("soft", lambda c, x: soft(x), (V,)),
        Line("hard", lambda c, x: hard(x), (V,)),
        Line("one of the other", lambda c, x: soft(hard(soft(x, 0.25), 0.5), 1), (V,)),
        Line("by 0", lambda c, x: soft(x, 0), (V,)),
    ), (
        Line("the other branch is x", lambda c, x: soft(x, other=x), (V,)),
        Line("the other branch is 1 x", lambda c, x: soft(x, other=aten.mul.Tensor(x, 1)), (V,)),
        Line("the other branch is 0 y", lambda c, x, y: soft(x, other=aten.mul.Tensor(y, 0)), (V, V)),
        Line("twice the shift", lambda c, x: soft(x, alpha=2), (V,)),
        Line("another bound", lambda c, x: soft(x, 0.5, aten.mul.Tensor(aten.sign.default(x), 0.25)), (V,)),
        Line("another's sign", lambda c, x, y: soft(x, 0.5, aten.mul.Tensor(aten.sign.default(y), 0.5)), (V, V)),
        Line("a bound below 0", lambda c, x: soft(x, -0.5), (V,)),
        Line("not the size",
             lambda c, x: aten.where.self(aten.gt.Scalar(x, 0.5), aten.sub.Tensor(x, aten.mul.Tensor(aten.sign.default(x),
                 0.5)), aten.mul.Tensor(x, 0)), (V,)),
        Line("the bound is let through", lambda c, x: hard(x, compare=aten.lt.Scalar), (V,)),
        Line("1 in between", lambda c, x: hard(x, taken=1), (V,)),
        Line("another is kept", lambda c, x, y: hard(x, kept=y), (V, V)),
        Line("of whole numbers", lambda c, x: hard(aten._to_copy.default(aten.mul.Tensor(x, 4.0), dtype=torch.int64), 1), (V,)),
        Line("a choice of bools",
             lambda c, x: aten.where.ScalarSelf(aten.le.Scalar(aten.abs.default(x), 0.5), False, aten.gt.Scalar(x, 0)), (V,)),
    )),
    Rewrite(moving.unroll_circular_pads, (
        Line("one axis", lambda c, x: aten.pad.default(x, [1, 2], "circular"), (S,)),
        Line("two axes", lambda c, x: aten.pad.default(x, [1, 0, 2, 1], "circular"), (I,)),
        Line("cut before, added behind", lambda c, x: aten.pad.default(x, [-1, 2], mode="circular"), (S,)),
        Line("cut on both sides", lambda c, x: aten.pad.default(x, [-1, -2], "circular"), (S,)),
        Line("once round", lambda c, x: aten.pad.default(x, [6, 6], "circular"), (S,)),
        Line("of a padded one", lambda c, x: aten.pad.default(aten.pad.default(x, [1, 1], "circular"), [0, 3], "circular"), (S,)),
    ), (
        Line("reflected", lambda c, x: aten.pad.default(x, [1, 2], "reflect"), (S,)),
        Line("constant", lambda c, x: aten.pad.default(x, [1, 2]), (S,)),
        Line("more than is left", lambda c, x: aten.slice.Tensor(aten.pad.default(x, [-2, 5], "circular"), 2, 0, 4), (S,)),
    )),
    Rewrite(moving.select_to_slice_scatter, (
        Line("one channel", lambda c, x: aten.select_scatter.default(x, aten.select.int(x, 1, 0), 1, 2), (S,)),
        Line("the last, counted from the end",
             lambda c, x: aten.select_scatter.default(x, aten.select.int(x, 2, 0), -1, -1), (S,)),
        Line("the last sample",
             lambda c, x: aten.select_scatter.default(x, aten.mul.Tensor(aten.select.int(x, 0, 0), 2.0), 0, -1), (V,)),
        Line("twice",
             lambda c, x: aten.select_scatter.default(aten.select_scatter.default(x, aten.select.int(x, 1, 1), 1, 0),
                 aten.select.int(x, 1, 0), 1, 1), (V,)),
    ), (
        Line("a slice", lambda c, x: aten.slice_scatter.default(x, aten.slice.Tensor(x, 1, 0, 1), 1, 1, 2), (V,)),
        Line("a diagonal", lambda c, x: aten.diagonal_scatter.default(x, aten.select.int(x, 2, 0), 0, 1, 2), ((4, 4),)),
    )),
    Rewrite(moving.stack_to_cat, (
        Line("behind", lambda c, x: aten.stack.default([x, aten.neg.default(x)], -1), (S,)),
        Line("before the last", lambda c, x: aten.stack.default([x, aten.neg.default(x)], -2), (S,)),
        Line("in front", lambda c, x: aten.stack.default([x, x]), (V,)),
        Line("of a stack",
             lambda c, x: aten.select.int(aten.stack.default([s := aten.stack.default([x, x], 1), s], 2), 1, 0), (V,)),
    ), (
        Line("side by side", lambda c, x: aten.cat.default([x, x], -1), (V,)),
        Line("one below the other", lambda c, x: aten.hstack.default([x, x]), (V,)),
    )),
    Rewrite(moving.drop_blank_operands, (
        Line("in front", lambda c, x: aten.cat.default([c(torch.zeros(0, dtype=torch.float64)), x], 1), (S,)),
        Line("behind two", lambda c, x: aten.cat.default([x, x, c(torch.zeros(0, dtype=torch.float64))], -1), (S,)),
        Line("of another type, which decides nothing",
             lambda c, x: aten.cat.default([c(torch.zeros(0, dtype=torch.float32)), x], 1), (S,)),
    ), (
        Line("nothing is blank", lambda c, x: aten.cat.default([x, x], 1), (S,)),
        Line("no columns", lambda c, x: aten.cat.default([aten.slice.Tensor(x, 1, 0, 0), x], 1), (V,)),
        Line("its type decides",
             lambda c, x: aten.cat.default(
                 [c(torch.zeros(0, dtype=torch.float64)), aten._to_copy.default(x, dtype=torch.float32)], 1), (S,)),
    )),
    Rewrite(moving.drop_blank_operands, (
        Line("in front", lambda c, x: aten.cat.default([c(torch.zeros(0, dtype=torch.float64)), x], 1), (V,)),
        Line("between two", lambda c, x: aten.cat.default([x, c(torch.zeros(0, dtype=torch.float64)), x], -1), (S,)),
    ), (
        Line("nothing blank", lambda c, x: aten.cat.default([x, x], 1), (V,)),
        Line("blank, of more dimensions", lambda c, x: aten.cat.default([aten.slice.Tensor(x, 1, 0, 0), x], 1), (V,)),
        Line("of vectors",
             lambda c, x: aten.cat.default([c(torch.zeros(0, dtype=torch.float64)), aten.select.int(x, 1, 0)]), (V,)),
        Line("of a type that counts", lambda c, x: aten.cat.default(
            [c(torch.zeros(0, dtype=torch.float64)), aten._to_copy.default(x, dtype=torch.float32)], 1), (V,)),
    )),
    Rewrite(split_complex, (
        Line("a transform's size", lambda c, x: aten.abs.default(aten._fft_r2c.default(x, [1], 0, True)), (V,)),
        Line("there and back", lambda c, x: aten._fft_c2r.default(aten._fft_r2c.default(x, [1], 0, True), [1], 2, 4), (V,)),
    ), (
        Line("all real", lambda c, x: aten.abs.default(aten.mul.Tensor(x, c(4))), (V,)),
        Line("the real part of what is real", lambda c, x: aten.neg.default(x), (V,)),
    )),
    Rewrite(expand_embedding_bags, (), (
        Line("of lengths that differ", lambda c, x: aten._embedding_bag_forward_only.default(
            c(6, 3), c(torch.tensor([0, 2, 1, 5])), c(torch.tensor([0, 1])))[0], (V,)),
        Line("an embedding", lambda c, x: aten.embedding.default(c(6, 3), c(torch.tensor([0, 2, 1, 5]))), (V,)),
    )),
    Rewrite(fused.expand_gated_linear_units, (
        Line("of channels", lambda c, x: aten.glu.default(x, 1), (S,)),
        Line("of the last", lambda c, x: aten.glu.default(x), (S,)),
        Line("of another", lambda c, x: aten.glu.default(aten.glu.default(x, dim=1), dim=-1), (S,)),
    ), (
        Line("written out",
             lambda c, x: aten.mul.Tensor(aten.slice.Tensor(x, 1, 0, 2), aten.sigmoid.default(aten.slice.Tensor(x, 1, 2,
                 4))), (V,)),
        Line("of samples", lambda c, x: aten.glu.default(aten.cat.default([x, x]), 0), (V,)),
    )),
    Rewrite(expand_attention, (
        Line("plain", lambda c, x: aten.scaled_dot_product_attention.default(x, aten.neg.default(x), x), (S,)),
        Line("causal", lambda c, x: aten.scaled_dot_product_attention.default(x, x, x, is_causal=True, scale=0.7), (S,)),
        Line("a row that is masked throughout",
             lambda c, x: aten.scaled_dot_product_attention.default(x, x, x, c(torch.tensor([[False] * 4,
                 *[[True] * 4] * 3]))), (S,)),
        Line("an added mask", lambda c, x: aten.scaled_dot_product_attention.default(x, x, x, c(4, 4)), (S,)),
        Line("grouped queries", lambda c, x: aten.scaled_dot_product_attention.default(
            x, k := aten.slice.Tensor(x, 1, 0, 2), k, None, 0.0, False, enable_gqa=True), (I,)),
        Line("of attention", lambda c, x: aten.scaled_dot_product_attention.default(
            y := aten.scaled_dot_product_attention.default(x, x, x), y, y), (S,)),
    ), (
        Line("dropout", lambda c, x: aten.mul.Tensor(aten.scaled_dot_product_attention.default(x, x, x, None, 0.5), 0), (S,)),
        Line("written out",
             lambda c, x: aten.matmul.default(aten._softmax.default(aten.matmul.default(x, aten.transpose.int(x, 1, 2)), -1,
                 False), x), (S,)),
    )),
    Rewrite(fused.expand_products_added, (
        Line("product", lambda c, x: aten.addcmul.default(x, x, c(4), value=2), (V,)),
        Line("quotient", lambda c, x: aten.addcdiv.default(x, x, aten.add.Scalar(aten.abs.default(x), 1.0), value=-0.5), (V,)),
        Line("between", lambda c, x: aten.lerp.Tensor(x, aten.neg.default(x), c(4)), (V,)),
        Line("of another", lambda c, x: aten.addcmul.default(y := aten.addcmul.default(x, x, x), x, y), (V,)),
        Line("between what was added",
             lambda c, x: aten.lerp.Tensor(y := aten.addcmul.default(x, x, x, value=3), aten.lerp.Tensor(x, y, y), y), (V,)),
        Line("of whole numbers",
             lambda c, x: aten.addcmul.default(y := aten._to_copy.default(x, dtype=torch.int64), y, y, value=2), (V,)),
    ), (
        Line("written out", lambda c, x: aten.add.Tensor(x, aten.mul.Tensor(x, x), alpha=2), (V,)),
        Line("by a number", lambda c, x: aten.lerp.Scalar(x, aten.neg.default(x), 0.25), (V,)),
    )),
    Rewrite(fused.expand_moments, (
        Line("variance and mean",
             lambda c, x: aten.add.Tensor((p := aten.var_mean.correction(x, [1], correction=0, keepdim=True))[0], p[1]), (V,)),
        Line("without correction said", lambda c, x: aten.var_mean.correction(x, [1], keepdim=True)[0], (V,)),
        Line("as the older name", lambda c, x: aten.std_mean.dim(x, [-1], False, True)[0], (V,)),
        Line("of moments",
             lambda c, x: aten.var_mean.dim(aten.mul.Tensor(x, aten.var_mean.dim(x, [1], True, True)[1]), [1], True,
                 True)[0], (V,)),
    ), (
        Line("variance alone", lambda c, x: aten.var.correction(x, [1], correction=0, keepdim=True), (V,)),
        Line("of everything", lambda c, x: aten.var_mean.default(x)[0], (V,)),
    )),
    Rewrite(fused.expand_bounds, (
        Line("both", lambda c, x: aten.clamp.Tensor(x, c(4), c(4)), (V,)),
        Line("the upper, by name", lambda c, x: aten.clamp.Tensor(x, max=c(4)), (V,)),
        Line("the lower", lambda c, x: aten.clamp_min.Tensor(x, aten.neg.default(x)), (V,)),
        Line("of bounds",
             lambda c, x: aten.clamp.Tensor(y := aten.clamp_max.Tensor(x, c(4)), aten.clamp_min.Tensor(y, c(4)), y), (V,)),
        Line("of whole numbers", lambda c, x: aten.clamp_min.Tensor(aten._to_copy.default(x, dtype=torch.int64), c(4)), (V,)),
    ), (
        Line("numbers", lambda c, x: aten.clamp.default(x, -0.5, 0.5), (V,)),
        Line("the larger", lambda c, x: aten.maximum.default(x, c(4)), (V,)),
    )),
    Rewrite(fused.expand_distances, (
        Line("to constants", lambda c, x: aten.cdist.default(x, c(3, 6)), (S,)),
        Line("of order 1, of distances", lambda c, x: aten.cdist.default(aten.cdist.default(x, x, 1.0), c(5, 4), 1.0), (S,)),
        Line("the largest", lambda c, x: aten.cdist.default(x, c(3, 6), math.inf), (S,)),
        Line("how many differ", lambda c, x: aten.cdist.default(x, c(3, 6), 0.0), (S,)),
    ), (
        Line("between pairs", lambda c, x: aten.pairwise_distance.default(x, c(4, 6)), (S,)),
    )),
    Rewrite(fused.expand_similarities, (
        Line("to a constant", lambda c, x: aten.cosine_similarity.default(x, c(4)), (V,)),
        Line("along an axis of one",
             lambda c, x: aten.cosine_similarity.default(aten.unsqueeze.default(x, 1), c(1, 5, 4), 1), (V,)),
        Line("along an axis that one has not", lambda c, x: aten.cosine_similarity.default(x, c(6), 1), (S,)),
        Line("counted from the front", lambda c, x: aten.cosine_similarity.default(c(6), x, 2, 0.5), (S,)),
        Line("of similarities",
             lambda c, x: aten.cosine_similarity.default(x, aten.unsqueeze.default(aten.cosine_similarity.default(x, c(4)),
                 1), 1), (V,)),
    ), (
        Line("a product", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4)), [1]), (V,)),
        Line("of another type", lambda c, x: aten.cosine_similarity.default(x, c(4, dtype=torch.float32)), (V,)),
        Line("along the samples", lambda c, x: aten.cosine_similarity.default(x, x, 0), (V,)),
    )),
    Rewrite(expand_composites, (
        Line("pad", lambda c, x: aten.pad.default(x, [1, 2], "constant", 0.5), (V,)),
        Line("the least and the largest", lambda c, x: aten.sub.Tensor((p := aten.aminmax.default(x, dim=-1))[1], p[0]), (V,)),
        Line("side by side, twice", lambda c, x: aten.hstack.default([y := aten.hstack.default([x, x]), y]), (V,)),
        Line("a sum over products", lambda c, x: aten.einsum.default("bij,kj->bik", [x, c(2, 6)]), (S,)),
        Line("pairs", lambda c, x: aten.einsum.default("bi,bj->bij", [x, x]), (V,)),
    ), (
        Line("has a rule", lambda c, x: aten.tanh.default(x), (V,)),
        Line("of another library", lambda c, x: torch.ops.near._assert_scalar_like.default(x), (V,)),
        Line("a size", lambda c, x: aten.expand.default(c(4), [batch(x), 4]), (V,)),
    )),
    Rewrite(fused.unify_norms, (
        Line("of order 3", lambda c, x: aten.norm.ScalarOpt_dim(x, 3, [-1]), (V,)),
        Line("no order", lambda c, x: aten.norm.ScalarOpt_dim(x, None, [1], True), (V,)),
        Line("of norms", lambda c, x: aten.norm.ScalarOpt_dim(aten.norm.ScalarOpt_dim(x, 1, [1]), 1, [1]), (S,)),
    ), (
        Line("the newer name", lambda c, x: aten.linalg_vector_norm.default(x, 3, [-1]), (V,)),
        Line("in another type", lambda c, x: aten.norm.ScalarOpt_dim_dtype(x, 2, [-1], True, dtype=torch.float64), (V,)),
    )),
    Rewrite(trimming.fold_constants, (
        Line("a product", lambda c, x: aten.linear.default(x, aten.mul.Tensor(c(3, 4), 2.0)), (V,)),
        Line("what folds folds on", lambda c, x: aten.mul.Tensor(x, aten.exp.default(aten.neg.default(c(4)))), (V,)),
    ), (
        Line("of a size", lambda c, x: aten.expand.default(c(4), [batch(x), 4]), (V,)),
        Line("draws numbers", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(x, 0.0), aten.rand_like.default(c(4))), (V,)),
        Line("of the input", lambda c, x: aten.mul.Tensor(x, c(4)), (V,)),
    )),
    Rewrite(fold, (
        Line("behind a convolution", lambda c, x: normed(c, conv(c, x, 3, 4, 2), 3), (S,)),
        Line("with a bias", lambda c, x: normed(c, conv(c, x, 3, 4, 2, 2, bias=c(3)), 3), (I,)),
        Line("transposed", lambda c, x: normed(c, conv(c, x, 4, 3, 2, transposed=True), 3), (S,)),
        Line("linear", lambda c, x: normed(c, aten.linear.default(x, c(3, 4)), 3), (V,)),
    ), (
        Line("read by another", lambda c, x: aten.add.Tensor(normed(c, y := conv(c, x, 3, 4, 2), 3), y), (S,)),
        Line("linear over signals", lambda c, x: normed(c, aten.linear.default(x, c(6, 6)), 4), (S,)),
        Line("weights of the input's", lambda c, x: normed(c, aten.convolution.default(
            x, aten.mul.Tensor(c(3, 4, 2), aten.sum.default(x)), None, [1], [0], [1], False, [0], 1), 3), (S,)),
        Line("statistics of the input's",
             lambda c, x: normed(c, conv(c, x, 3, 4, 2), 3, aten.mul.Tensor(c(3), aten.sum.default(x))), (S,)),
        Line("divided by 0", lambda c, x: aten._native_batch_norm_legit_no_training.default(
            conv(c, x, 3, 4, 2), c(3), c(3), c(3), c(torch.zeros(3, dtype=torch.float64)), 0.1, 0.0)[0], (S,)),
        Line("nothing before", lambda c, x: normed(c, x, 4), (S,)),
        Line("something in between", lambda c, x: normed(c, aten.relu.default(conv(c, x, 3, 4, 2)), 3), (S,)),
    )),
    Rewrite(keep_first, (), (
        Line("its own output is wanted", lambda c, x: normed(c, conv(c, x, 3, 4, 2), 3), (S,)),
    ), drawn=False),
    Rewrite(spell_out, (
        Line("layer norm", lambda c, x: aten.native_layer_norm.default(x, [6], c(6), None, 0.5)[0], (S,)),
        Line("group norm", lambda c, x: aten.group_norm.default(x, 2, c(4), c(4), 0.5), (S,)),
        Line("RMS norm of two dimensions", lambda c, x: aten.rms_norm.default(x, [4, 6], c(4, 6), 0.5), (S,)),
        Line("instance norm", lambda c, x: aten.instance_norm.default(x, None, c(4), None, None, True, 0.1, 0.5, False), (S,)),
        Line("of norms",
             lambda c, x: aten.rms_norm.default(aten.native_layer_norm.default(x, [6], None, None, 0.5)[0], [6]), (S,)),
    ), (
        Line("batch norm", lambda c, x: normed(c, x, 4), (S,)),
        Line("softmax", lambda c, x: aten._softmax.default(x, -1, False), (S,)),
    )),
)
# fmt: on

EVERY = {*canonicalize.PASSES, fold, spell_out}
