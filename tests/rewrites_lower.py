"""Lowering: what each pass rewrites in a program, and what only looks alike."""

from __future__ import annotations

import torch

from frpc.optimize.lower import convolutions, gates, memory, onednn, pooling, shares
from rewrites import Line, Rewrite
from rewrites_pieces import (
    BACK,
    I,
    V,
    aten,
    batch,
    columns,
    conv,
    early,
    first_column,
    gate,
    over,
    packed,
    pooled,
    scattered,
    share,
    up,
)

__all__ = ["LOWER"]

# fmt: off
LOWER: tuple[Rewrite, ...] = (
    Rewrite(memory.free_views, (
        Line("a view", lambda c, x: aten.view.default(x, [-1, 2]), (V,)),
        Line("an unsafe view", lambda c, x: aten._unsafe_view.default(aten.exp.default(x), [-1]), (V,)),
    ), (
        Line("of bits", lambda c, x: aten.view.dtype(x, torch.int64), (V,)),
        Line("of strides", lambda c, x: aten.transpose.int(x, 0, 1), (V,)),
    )),
    Rewrite(pooling.gates_before_pools, (
        Line("one target", lambda c, x, v: aten.threshold_backward.default(
            BACK(v, r := aten.relu.default(x), [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(r)[1]), r, 0), ((4, 4, 6), (4,
                2, 3))),
        Line("columns",
             lambda c, x: aten.mul.Tensor(scattered(columns(x), pooled(r := aten.relu.default(x)), x), aten.gt.Scalar(r, 0)),
                 ((4, 4, 6),)),
    ), (
        Line("gated by what is no ReLU", lambda c, x, v: aten.threshold_backward.default(
            BACK(v, r := aten.sin.default(x), [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(r)[1]), r, 0), ((4, 4, 6), (4, 2,
                3))),
        Line("pooled something else", lambda c, x, v: aten.threshold_backward.default(
            BACK(v, x, [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(x)[1]), aten.relu.default(x), 0), ((4, 4, 6), (4, 2, 3))),
        Line("above another threshold", lambda c, x, v: aten.threshold_backward.default(
            BACK(v, r := aten.relu.default(x), [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(r)[1]), r, 0.5), ((4, 4, 6), (4,
                2, 3))),
        Line("read ungated too",
             lambda c, x, v: [b := BACK(v, r := aten.relu.default(x), [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(r)[1]),
             aten.threshold_backward.default(b, r, 0)], ((4, 4, 6), (4, 2, 3))),
        Line("columns in planes of another shape",
             lambda c, x: aten.mul.Tensor(scattered(columns(x), pooled(r := aten.relu.default(x)), x, [2, -1, 4, 6, 4]),
             aten.gt.Scalar(aten.reshape.default(r, [-1, 4, 6, 4]), 0)), ((4, 4, 6),)),
        Line("columns gated by another's pool",
             lambda c, x: aten.mul.Tensor(scattered(columns(x), pooled(x), x), aten.gt.Scalar(aten.relu.default(x), 0)), ((4,
                 4, 6),)),
        Line("columns above another threshold",
             lambda c, x: aten.mul.Tensor(scattered(columns(x), pooled(r := aten.relu.default(x)), x), aten.gt.Scalar(r,
                 0.5)), ((4, 4, 6),)),
    )),
    Rewrite(gates.byte_gates, (
        Line("a large gate", lambda c, x, v: gate(v, x), ((4096,), (4096,))),
        Line("of winners",
             lambda c, x, v: aten.threshold_backward.default(v, pooled(aten.relu.default(x))[0], 0), ((64, 16, 16), (64, 8, 8))),
    ), (
        Line("a small one", lambda c, x, v: gate(v, x), (V, V)),
        Line("above another threshold", lambda c, x, v: gate(v, x, 0.25), ((4096,), (4096,))),
        Line("no ReLU", lambda c, x, v: gate(v, x, 0, aten.sin.default), ((4096,), (4096,))),
        Line("of whole numbers",
             lambda c, x, v: gate(aten._to_copy.default(v, dtype=torch.int8), aten._to_copy.default(x, dtype=torch.int8)),
             ((4096,), (4096,))),
    )),
    Rewrite(gates.byte_gates_of_middle_size, (
        Line("a large gate", lambda c, x, v: gate(v, x), ((65536,), (65536,))),
    ), (
        Line("one of some thousands", lambda c, x, v: gate(v, x), ((65535,), (65535,))),
    ), drawn=False),
    Rewrite(gates.byte_masks, (
        Line("columns", lambda c, x, v: aten.mul.Tensor(v, aten.gt.Scalar(aten.relu.default(x), 0)), (V, V)),
        Line("two readers",
             lambda c, x, v: [aten.mul.Tensor(v, g := aten.gt.Scalar(aten.relu.default(x), 0)), aten.mul.Tensor(x, g)], (V, V)),
    ), (
        Line("above another threshold", lambda c, x, v: aten.mul.Tensor(v, aten.gt.Scalar(aten.relu.default(x), 0.25)), (V, V)),
        Line("no ReLU", lambda c, x, v: aten.mul.Tensor(v, aten.gt.Scalar(x, 0)), (V, V)),
        Line("at least", lambda c, x, v: aten.mul.Tensor(v, aten.ge.Scalar(aten.relu.default(x), 0)), (V, V)),
        Line("a product of gates",
             lambda c, x, v: aten.mul.Tensor(aten.gt.Scalar(v, 0), aten.gt.Scalar(aten.relu.default(x), 0)), (V, V)),
        Line("a choice", lambda c, x, v: aten.where.self(aten.gt.Scalar(aten.relu.default(x), 0), v, x), (V, V)),
    )),
    Rewrite(pooling.scatter_columns, (
        Line("columns", lambda c, x: scattered(columns(x), pooled(x), x), ((4, 4, 6),)),
    ), (
        Line("as many as there are", lambda c, x: scattered(columns(x), pooled(x), x, [2, -1, 4, 4, 6]), ((4, 4, 6),)),
        Line("into planes of another shape", lambda c, x: scattered(columns(x), pooled(x), x, [2, -1, 4, 6, 4]), ((4, 4, 6),)),
        Line("into what is not empty",
             lambda c, x: aten.scatter_add.default(aten.reshape.default(x, [-1, 4, 24]), -1, aten.reshape.default(
            pooled(x)[1], [-1, 4, 6]), aten.reshape.default(aten.select.int(columns(x), 0, 0), [-1, 4, 6])), ((4, 4, 6),)),
        Line("by channels and cells at once", lambda c, x: aten.reshape.default(aten.scatter_add.default(
            aten.new_zeros.default(x, [2, batch(x), 96]), -1, aten.expand.default(aten.reshape.default(pooled(x)[1], [-1,
                24]), [2, batch(x), 24]),
            aten.reshape.default(columns(x), [2, -1, 24])), [2, -1, 4, 4, 6]), ((4, 4, 6),)),
        Line("one column's indices for each sample", lambda c, x: aten.reshape.default(aten.scatter_add.default(
            aten.new_zeros.default(x, [2, 2, 4, 24]), -1, aten.expand.default(aten.reshape.default(pooled(x)[1], [2, 1, 4,
                6]), [2, 2, 4, 6]),
            aten.reshape.default(columns(x), [2, 2, 4, 6])), [2, 2, 4, 4, 6]), ((4, 4, 6),), fixed=True),
    )),
    Rewrite(pooling.pools_without_input, (
        Line("largest", lambda c, x, v: BACK(v, x, [2, 2], [2, 2], [0, 0], [1, 1], False, pooled(x)[1]), ((4, 4, 6), (4, 2, 3))),
        Line("averages",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [3, 3], [2, 2], [1, 1], True, False, None), ((4, 4, 6),
                 (4, 3, 4))),
    ), (
        Line("of one image",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [1, 2], [1, 2], [0, 0], False, True, None), ((4, 6), (4, 3))),
        Line("averages themselves", lambda c, x: aten.avg_pool2d.default(x, [2, 2]), (I,)),
    )),
    Rewrite(shares.dot_shares, (
        Line("features", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4)), [1]), (V,)),
        Line("the constant first", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(c(4), x), [-1]), (V,)),
        Line("summed over space",
             lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(aten.sum.dim_IntList(x, [2, 3], True), c(4, 1, 1)), [1, 2,
                 3]), (I,)),
    ), (
        Line("kept", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4)), [1], True), (V,)),
        Line("of everything",
             lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(aten.select.int(x, 1, 0), c(torch.tensor(2.0,
                 dtype=torch.float64))), []), (V,)),
        Line("of samples", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4)), [0]), (V,)),
        Line("in another type", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4)), [1], dtype=torch.float32), (V,)),
        Line("constants of another type",
             lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4, dtype=torch.float32)), [1]), (V,)),
        Line("one for all", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(1)), [1]), (V,)),
        Line("one a sample", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(2, 4)), [1]), (V,), fixed=True),
        Line("space not summed", lambda c, x: aten.sum.dim_IntList(aten.mul.Tensor(x, c(4, 1, 1)), [1, 2, 3]), (I,)),
        Line("read by another", lambda c, x: [p := aten.mul.Tensor(x, c(4)), aten.sum.dim_IntList(p, [1])], (V,)),
    )),
    Rewrite(shares.add_shares, (
        Line("a product with a vector", lambda c, x: aten.add.Tensor(first_column(x), aten.mv.default(x, c(4))), (V,)),
        Line("the product first", lambda c, x: aten.add.Tensor(aten.mv.default(x, c(4)), first_column(x)), (V,)),
        Line("element by element",
             lambda c, x: aten.add.Tensor(aten.mul.Tensor(x, aten.neg.default(x)), aten.sum.dim_IntList(x, [1], True)), (V,)),
    ), (
        Line("twice", lambda c, x: aten.add.Tensor(first_column(x), aten.mv.default(x, c(4)), alpha=2), (V,)),
        Line("with itself", lambda c, x: aten.add.Tensor(p := aten.mv.default(x, c(4)), p), (V,)),
        Line("read by another", lambda c, x: [p := aten.mv.default(x, c(4)), aten.add.Tensor(first_column(x), p)], (V,)),
        Line("spread over more",
             lambda c, x: aten.add.Tensor(aten.unsqueeze.default(first_column(x), 1), aten.mv.default(x, c(4))), (V,),
                 fixed=True),
        Line("of another type",
             lambda c, x: aten.add.Tensor(aten._to_copy.default(first_column(x), dtype=torch.float32), aten.mv.default(x,
                 c(4))), (V,)),
        Line("times a number", lambda c, x: aten.add.Tensor(aten.mul.Tensor(x, 2.0), x), (V,)),
        Line("a number added", lambda c, x: aten.add.Tensor(aten.mul.Tensor(x, x), 2.0), (V,)),
    )),
    Rewrite(memory.hold_views, (
        Line("turned", lambda c, x: aten.mm.default(x, aten.t.default(c(3, 4))), (V,)),
        Line("reshaped", lambda c, x: aten.mul.Tensor(x, aten.reshape.default(c(2, 2), [4])), (V,)),
    ), (
        Line("copied",
             lambda c, x: aten.mul.Tensor(x, aten.select.int(aten.reshape.default(aten.t.default(aten.mul.Tensor(c(3, 4),
                 aten.sum.default(x))), [3, 4]), 0, 0)), (V,)),
        Line("of the input", lambda c, x: aten.mm.default(aten.t.default(x), x), (V,)),
        Line("a part", lambda c, x: aten.mul.Tensor(x, aten.slice.Tensor(c(5), 0, 0, 4)), (V,)),
        Line("of a size", lambda c, x: aten.mul.Tensor(x, aten.view.default(c(2, 4), [batch(x), 4])), (V,), fixed=True),
    )),
    Rewrite(shares.join_shares, (
        Line("three",
             lambda c, x: share(share(share(first_column(x), x, c, 4), aten.neg.default(x), c, 4), aten.exp.default(x), c,
                 4), (V,)),
    ), (
        Line("two", lambda c, x: share(share(first_column(x), x, c, 4), aten.neg.default(x), c, 4), (V,)),
        Line("read in between",
             lambda c, x: [s := share(share(first_column(x), x, c, 4), aten.neg.default(x), c, 4), share(s, x, c, 4)], (V,)),
        Line("scaled", lambda c, x: aten.addmv.default(aten.addmv.default(aten.addmv.default(
            first_column(x), x, c(4)), x, c(4), beta=2), x, c(4)), (V,)),
        Line("of no constants", lambda c, x: aten.addmv.default(aten.addmv.default(aten.addmv.default(
            first_column(x), x, w := aten.select.int(x, 0, 0)), x, w), x, w), (V,)),
    )),
    Rewrite(early, (
        Line("behind what it is made of",
             lambda c, x, s: [r := aten.relu.default(x), aten.exp.default(r), aten.mul.Tensor(s, over(r))], (V, V)),
    ), (
        Line("there already", lambda c, x, s: aten.mul.Tensor(s, over(aten.relu.default(x))), (V, V)),
        Line("waits for the seed",
             lambda c, x, s: [r := aten.relu.default(x), y := aten.neg.default(s), aten.mul.Tensor(y, r)], (V, V)),
        Line("of an input alone", lambda c, x, s: [aten.exp.default(s), aten.mul.Tensor(s, aten.neg.default(x))], (V, V)),
        Line("reads what is written into",
             lambda c, x, s: [r := aten.relu.default(x), aten.add_.Scalar(aten.view.default(r, [-1]), 1),
                 aten.exp.default(r)], (V, V)),
    )),
    Rewrite(convolutions.transposed_to_pixel_shuffle, (
        Line("stride 1", lambda c, x: up(c, x, 4, 2, 3, 3, padding=1), (I,)),
        Line("stride 2", lambda c, x: up(c, x, 4, 3, 3, 2, stride=2, output_padding=1), (I,)),
        Line("one weight, two paddings",
             lambda c, x: [up(c, x, w=(w := c(4, 2, 3, 3)), padding=1), up(c, x, w=w), up(c, x, w=w, stride=2)], (I,)),
        Line("with a bias", lambda c, x: up(c, x, 4, 2, 3, 3, bias=c(2)), (I,)),
    ), (
        Line("many channels", lambda c, x: up(c, x, 4, 5, 3, 3), (I,)),
        Line("dilated", lambda c, x: up(c, x, 4, 2, 3, 3, dilation=2), (I,)),
        Line("in groups", lambda c, x: up(c, x, 4, 2, 3, 3, groups=2), (I,)),
        Line("strides that differ", lambda c, x: up(c, x, 4, 2, 3, 3, stride=[2, 1]), (I,)),
        Line("forward", lambda c, x: conv(c, x, 2, 4, 3, 3), (I,)),
        Line("weights of the input's", lambda c, x: up(c, x, w=aten.mul.Tensor(c(4, 2, 3, 3), aten.sum.default(x))), (I,)),
    )),
    Rewrite(convolutions.flip_transposed, (
        Line("stride 1", lambda c, x: up(c, x, 4, 6, 3, 2, padding=1), (I,)),
        Line("dilated, a bias", lambda c, x: up(c, x, 4, 6, 3, 2, dilation=2, bias=c(6)), (I,)),
        Line("used twice", lambda c, x: [up(c, x, w=w, padding=p) for w in [c(4, 6, 3, 3)] for p in (0, 2)], (I,)),
    ), (
        Line("strided", lambda c, x: up(c, x, 4, 6, 3, 3, stride=2), (I,)),
        Line("in groups", lambda c, x: up(c, x, 4, 3, 3, 3, groups=2), (I,)),
        Line("padding wider than the kernel", lambda c, x: up(c, x, 4, 6, 2, 2, padding=2), (I,)),
        Line("weights of the input's", lambda c, x: up(c, x, w=aten.mul.Tensor(c(4, 6, 3, 3), aten.sum.default(x))), (I,)),
        Line("forward", lambda c, x: conv(c, x, 6, 4, 3, 3), (I,)),
    ), dtype=torch.float32),
    Rewrite(onednn.prepack, (
        Line("forward", lambda c, x: conv(c, x, 6, 4, 3, 2, bias=c(6)), (I,)),
        Line("one weight, two paddings",
             lambda c, x: [conv(c, x, w=w, padding=p) for w in [c(6, 4, 3, 3)] for p in (0, 1)], (I,)),
        Line("transposed", lambda c, x: up(c, x, 4, 6, 3, 3, stride=2, output_padding=1), (I,)),
    ), (
        Line("weights of the input's", lambda c, x: conv(c, x, w=aten.mul.Tensor(c(6, 4, 3, 3), aten.sum.default(x))), (I,)),
        Line("a bias of the input's", lambda c, x: conv(c, x, 6, 4, 3, 3, bias=aten.mul.Tensor(c(6), aten.sum.default(x))), (I,)),
        Line("of signals", lambda c, x: aten.convolution.default(x, c(6, 4, 3), None, [1], [0], [1], False, [0], 1), ((4, 6),)),
    ), dtype=torch.float32),
    Rewrite(convolutions.channels_last, (), (
        Line("transposed", lambda c, x: aten.matmul.default(x, c(5, 3)), (I,)),
        Line("of signals", lambda c, x: aten.convolution.default(x, c(6, 4, 3), None, [1], [0], [1], False, [0], 1), ((4, 6),)),
    ), dtype=torch.float32),
    Rewrite(onednn.sum_samples, (
        Line("columns",
             lambda c, x, y: aten.add.Tensor(y, aten.reshape.default(packed(c, aten.reshape.default(x, [-1, 4, 6, 5]), 4, 4,
                 3, 3), [-1, 2, 4, 6, 5])),
             ((2, 4, 6, 5), (2, 4, 6, 5))),
    ), (
        Line("twice",
             lambda c, x, y: aten.add.Tensor(y, aten.reshape.default(packed(c, aten.reshape.default(x, [-1, 4, 6, 5]), 4, 4,
                 3, 3), [-1, 2, 4, 6, 5]), alpha=2),
             ((2, 4, 6, 5), (2, 4, 6, 5))),
        Line("spread over columns",
             lambda c, x, y: aten.add.Tensor(y, aten.reshape.default(packed(c, aten.reshape.default(x, [-1, 4, 6, 5]), 4, 4,
                 3, 3), [-1, 2, 4, 6, 5])),
             ((2, 4, 6, 5), (1, 4, 6, 5))),
        Line("read by another",
             lambda c, x, y: [s := aten.reshape.default(packed(c, aten.reshape.default(x, [-1, 4, 6, 5]), 4, 4, 3, 3), [-1,
                 2, 4, 6, 5]),
             aten.add.Tensor(y, s)], ((2, 4, 6, 5), (2, 4, 6, 5))),
    ), dtype=torch.float32),
    Rewrite(onednn.fuse_into_convolutions, (
        Line("ReLU", lambda c, x: aten.relu.default(packed(c, x, 4, 4, 3, 3)), (I,)),
        Line("sum and ReLU", lambda c, x: aten.relu.default(aten.add.Tensor(packed(c, x, 4, 4, 3, 3), x)), (I,)),
        Line("sum of two", lambda c, x: aten.add.Tensor(packed(c, x, 4, 4, 3, 3), packed(c, x, 4, 4, 3, 3)), (I,)),
        Line("a summand of its own", lambda c, x: aten.add.Tensor(aten.neg.default(x), packed(c, x, 4, 4, 3, 3)), (I,)),
    ), (
        Line("read by another", lambda c, x: [y := packed(c, x, 4, 4, 3, 3), aten.relu.default(y)], (I,)),
        Line("with itself", lambda c, x: aten.add.Tensor(y := packed(c, x, 4, 4, 3, 3), y), (I,)),
        Line("twice", lambda c, x: aten.add.Tensor(x, packed(c, x, 4, 4, 3, 3), alpha=2), (I,)),
        Line("one a channel", lambda c, x: aten.add.Tensor(packed(c, x, 4, 4, 3, 3), c(4, 1, 1)), (I,)),
        Line("another activation", lambda c, x: aten.tanh.default(packed(c, x, 4, 4, 3, 3)), (I,)),
    ), dtype=torch.float32),
    Rewrite(memory.reuse_memory, (
        Line("fresh", lambda c, x: aten.neg.default(aten.exp.default(x)), (V,)),
        Line("the second operand", lambda c, x: aten.add.Tensor(x, aten.exp.default(x)), (V,)),
        Line("through a view", lambda c, x: aten.neg.default(aten.reshape.default(aten.exp.default(x), [-1, 2])), (V,)),
        Line("a gate", lambda c, x, v: gate(aten.exp.default(v), x), (V, V)),
    ), (
        Line("the caller's", lambda c, x: aten.neg.default(x), (V,)),
        Line("a constant", lambda c, x: aten.add.Tensor(c(2, 4), x), (V,), fixed=True),
        Line("a view of the caller's", lambda c, x: aten.neg.default(aten.reshape.default(x, [-1, 2])), (V,)),
        Line("may be the caller's", lambda c, x: aten.neg.default(aten.contiguous.default(x)), (V,)),
        Line("a silent view", lambda c, x: aten.neg.default(aten.lift.default(x)), (V,)),
        Line("read later", lambda c, x: [aten.neg.default(y := aten.exp.default(x)), aten.sum.dim_IntList(y, [1])], (V,)),
        Line("twice", lambda c, x: aten.mul.Tensor(y := aten.exp.default(x), y), (V,)),
        Line("spread", lambda c, x: aten.neg.default(aten.expand.default(aten.sum.dim_IntList(x, [1], True), [-1, 4])), (V,)),
        Line("of another size", lambda c, x: aten.mul.Tensor(aten.sum.dim_IntList(x, [1], True), x), (V,)),
        Line("of another type", lambda c, x: aten.mul.Tensor(aten._to_copy.default(x, dtype=torch.float32), x), (V,)),
    )),
)
# fmt: on
