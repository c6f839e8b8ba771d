"""Optimization and exports: what each pass rewrites in a program, and what only looks alike."""

from __future__ import annotations

import torch

from frpc.export import blocked, decompositions, separable
from frpc.optimize import lower
from frpc.optimize import passes as optimize
from frpc.optimize.lower import memory
from rewrites import Line, Rewrite
from rewrites_lower import LOWER
from rewrites_pieces import (
    I,
    L,
    V,
    aten,
    batch,
    conv,
    early,
    gate,
    over,
    up,
    written,
)

# fmt: off
OPTIMIZE: tuple[Rewrite, ...] = (
    Rewrite(optimize.overwrite_nothing, (
        Line("sum", lambda c, x: aten.add_.Scalar(written(x), 1), (V,)),
        Line("twice, and read afterwards",
             lambda c, x: (y := written(x), aten.mul_.Tensor(y, x), aten.neg_.default(y), aten.exp.default(y))[2:], (V,)),
        Line("read before", lambda c, x: (y := written(x), aten.neg.default(y), aten.mul_.Tensor(y, 2.0))[1:], (V,)),
        Line("with itself", lambda c, x: aten.mul_.Tensor(y := written(x), y), (V,)),
    ), (
        Line("seen through a view", lambda c, x: (y := written(x), aten.view.default(y, [-1]), aten.add_.Scalar(y, 1))[1:], (V,)),
        Line("a view itself", lambda c, x: (y := written(x), aten.add_.Scalar(aten.view.default(y, [-1]), 1), y)[1:], (V,)),
        Line("may be a view", lambda c, x: (y := written(x), aten.add_.Scalar(aten.reshape.default(y, [-1]), 1), y)[1:], (V,)),
        Line("gives bools, written as numbers", lambda c, x: aten.mul.Tensor(aten.gt_.Scalar(written(x), 0.5), 2.0), (V,)),
        Line("gives a wider type", lambda c, x: aten.add_.Tensor(aten._to_copy.default(x, dtype=torch.float32), x), (V,)),
    )),
    Rewrite(optimize.remove_dead, (
        Line("read by nobody", lambda c, x: (aten.exp.default(x), aten.neg.default(x))[1], (V,)),
    ), (
        Line("all is read", lambda c, x: aten.exp.default(aten.neg.default(x)), (V,)),
        Line("written into what is read", lambda c, x: (y := written(x), aten.add_.Scalar(y, 1), y)[2], (V,)),
    )),
    Rewrite(optimize.merge_common, (
        Line("two of one", lambda c, x: aten.sub.Tensor(aten.exp.default(x), aten.mul.Tensor(aten.exp.default(x), 2)), (V,)),
        Line("chains of two", lambda c, x: [aten.neg.default(aten.sum.dim_IntList(x, [1], True)) for _ in range(2)], (V,)),
    ), (
        Line("1, 1.0 and True",
             lambda c, x: [aten.mul.Tensor(x, n) for n in (1, 1.0)] + [aten.sum.dim_IntList(x, [1], b) for b in (True,
                 False)], (V,)),
        Line("0.0 and -0.0",
             lambda c, x: [aten.copysign.Tensor(x, aten.mul.Tensor(y, z)) for y in [aten.abs.default(x)] for z in (0.0,
                 -0.0)], (V,)),
        Line("random numbers", lambda c, x: aten.sub.Tensor(aten.rand_like.default(x), aten.rand_like.default(x)), (V,)),
        Line("memory that is written into", lambda c, x: [
            (z := aten.new_zeros.default(x, [4]), aten.add_.Tensor(aten.view.default(z, [-1]), w), z)[2] for w in (c(4),
                c(4))], (V,)),
        Line("before and after it is written into", lambda c, x: (
            y := written(x), aten.neg.default(y), aten.add_.Scalar(aten.view.default(y, [-1]), 1),
                aten.neg.default(y))[1::2], (V,)),
    )),
    Rewrite(optimize.merge_scales, (
        Line("two factors", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(x, c(4)), c(4)), (V,)),
        Line("three", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(aten.mul.Tensor(x, c(4)), c(4)), c(4)), (V,)),
    ), (
        Line("read in between", lambda c, x: [y := aten.mul.Tensor(x, c(4)), aten.mul.Tensor(y, c(4))], (V,)),
        Line("of other shapes", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(x, c(4)), c(1)), (V,)),
        Line("of other types", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(x, c(4)), c(4, dtype=torch.float32)), (V,)),
        Line("not a constant", lambda c, x: aten.mul.Tensor(aten.mul.Tensor(x, c(4)), aten.neg.default(x)), (V,)),
        Line("with itself", lambda c, x: aten.mul.Tensor(y := aten.mul.Tensor(x, c(4)), y), (V,)),
        Line("whose product is infinite",
             lambda c, x: aten.mul.Tensor(aten.mul.Tensor(aten.mul.Tensor(x, 1e-200), s := c(torch.full((4,), 1e200,
                 dtype=torch.float64))), s), (V,)),
        Line("whose product is 0",
             lambda c, x: aten.mul.Tensor(aten.mul.Tensor(aten.mul.Tensor(x, 1e200), s := c(torch.full((4,), 1e-200,
                 dtype=torch.float64))), s), (V,)),
        Line("a quotient", lambda c, x: aten.mul.Tensor(aten.div.Tensor(x, aten.add.Scalar(aten.abs.default(x), 1)), c(4)), (V,)),
    )),
    Rewrite(optimize.fold_constants, (
        Line("a product", lambda c, x: aten.mul.Tensor(x, aten.exp.default(c(4))), (V,)),
        Line("winners", lambda c, x: aten.add.Tensor(x, aten.max.dim(c(3, 4), 0)[0]), (V,)),
        Line("a view of what folds", lambda c, x: aten.mm.default(x, aten.exp.default(aten.t.default(c(3, 4)))), (V,)),
    ), (
        Line("a view", lambda c, x: aten.mm.default(x, aten.t.default(c(3, 4))), (V,)),
        Line("of a size", lambda c, x: aten.add.Tensor(x, aten.expand.default(c(4), [batch(x), 4])), (V,)),
        Line("random numbers",
             lambda c, x: aten.add.Tensor(x, aten.mul.Tensor(aten.mul.Tensor(aten.rand_like.default(c(4)), x), 0.0)), (V,)),
        Line("written into",
             lambda c, x: aten.add.Tensor(x, aten.mul.Tensor(aten.add_.Scalar(aten.expand.default(c(4), [batch(x), 4]), 0.0),
                 2.0)), (V,)),
    )),
    Rewrite(optimize.drop_unread, (), (
        Line("all is read", lambda c, x: aten.mul.Tensor(x, c(4)), (V,)),
    )),
    Rewrite(optimize.fold_added_bias, (
        Line("one a channel", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), c(3, 1, 1)), (I,)),
        Line("transposed, in groups", lambda c, x: aten.add.Tensor(up(c, x, 4, 3, 2, 2, groups=2), c(6, 1, 1)), (I,)),
    ), (
        Line("one an element", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), c(3, 5, 4)), (I,)),
        Line("one for all", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), c(1, 1, 1)), (I,)),
        Line("one a row", lambda c, x: aten.add.Tensor(conv(c, x, 5, 4, 2, 2), c(1, 5, 1)), (I,)),
        Line("one a column", lambda c, x: aten.add.Tensor(conv(c, x, 4, 4, 2, 2), c(4)), (I,)),
        Line("twice", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), c(3, 1, 1), alpha=2), (I,)),
        Line("of another type", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), c(3, 1, 1, dtype=torch.float32)), (I,)),
        Line("read by another", lambda c, x: [y := conv(c, x, 3, 4, 2, 2), aten.add.Tensor(y, c(3, 1, 1))], (I,)),
        Line("a bias is there", lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2, bias=c(3)), c(3, 1, 1)), (I,)),
        Line("of the input's",
             lambda c, x: aten.add.Tensor(conv(c, x, 3, 4, 2, 2), aten.mul.Tensor(c(3, 1, 1), aten.sum.default(x))), (I,)),
    )),
    Rewrite(optimize.drop_covered_gates, (
        Line("covered",
             lambda c, x, v: aten.mul.Tensor(aten.threshold_backward.default(v, r := aten.relu.default(x), 0), over(r)), (V, V)),
        Line("from the other side",
             lambda c, x, v: aten.mul.Tensor(over(r := aten.relu.default(x)), aten.threshold_backward.default(v, r, 0)), (V, V)),
    ), (
        Line("above another threshold",
             lambda c, x, v: aten.mul.Tensor(aten.threshold_backward.default(v, r := aten.relu.default(x), 0.5), over(r)),
                 (V, V)),
        Line("another ReLU", lambda c, x, v: aten.mul.Tensor(gate(v, x), over(aten.relu.default(v))), (V, V)),
        Line("no ReLU",
             lambda c, x, v: aten.mul.Tensor(aten.threshold_backward.default(v, y := aten.sin.default(x), 0),
                 aten.div.Tensor(y, 2.0)), (V, V)),
        Line("in the denominator",
             lambda c, x, v: aten.mul.Tensor(aten.threshold_backward.default(v, r := aten.relu.default(x), 0),
             aten.div.Tensor(x, aten.add.Tensor(r, 0.5))), (V, V)),
        Line("a sum",
             lambda c, x, v: aten.add.Tensor(aten.threshold_backward.default(v, r := aten.relu.default(x), 0), over(r)), (V, V)),
    )),
)


EXPORT: tuple[Rewrite, ...] = (
    Rewrite(separable.transposed_as_products, (
        Line("averages",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [3, 3], [2, 2], [1, 1], False, True, None), ((4, 4, 6),
                 (4, 2, 3))),
        Line("padding not counted",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [3, 2], [2, 2], [1, 0], True, False, None), ((4, 4, 6),
                 (4, 3, 3))),
        Line("a divisor of its own",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [2, 2], [2, 2], [0, 0], False, True, 3), ((4, 4, 6), (4,
                 2, 3))),
        Line("adaptive", lambda c, x, v: aten._adaptive_avg_pool2d_backward.default(v, x), ((4, 4, 6), (4, 3, 3))),
    ), (
        Line("of one image",
             lambda c, x, v: aten.avg_pool2d_backward.default(v, x, [1, 2], [1, 2], [0, 0], False, True, None), ((4, 6), (4, 3))),
        Line("forward", lambda c, x: aten.avg_pool2d.default(x, [2, 2]), (I,)),
    )),
    Rewrite(decompositions.transposed_as_convolutions, (
        Line("stride 1", lambda c, x: up(c, x, 4, 6, 3, 2, padding=1), (I,)),
        Line("in groups", lambda c, x: up(c, x, 4, 3, 3, 3, groups=2, bias=c(6)), (I,)),
        Line("of two groupings", lambda c, x: [up(c, x, w=w, groups=g) for w in [c(4, 2, 3, 3)] for g in (1, 2)], (I,)),
    ), (
        Line("strided", lambda c, x: up(c, x, 4, 6, 3, 3, stride=2), (I,)),
        Line("padding wider than the kernel", lambda c, x: up(c, x, 4, 6, 2, 2, padding=2), (I,)),
        Line("weights of the input's", lambda c, x: up(c, x, w=aten.mul.Tensor(c(4, 6, 3, 3), aten.sum.default(x))), (I,)),
        Line("forward", lambda c, x: conv(c, x, 6, 4, 3, 3), (I,)),
    )),
    Rewrite(decompositions.strided_as_convolutions, (
        Line("stride 2", lambda c, x: up(c, x, 4, 6, 3, 3, stride=2, padding=1, output_padding=1), (I,)),
        Line("one weight, two paddings",
             lambda c, x: [up(c, x, w=(w := c(4, 6, 4, 4)), stride=2, padding=1), up(c, x, w=w, stride=4)], (I,)),
    ), (
        Line("of another size", lambda c, x: up(c, x, 4, 6, 3, 3, stride=2), (I,)),
        Line("with a bias", lambda c, x: up(c, x, 4, 6, 2, 2, stride=2, bias=c(6)), (I,)),
        Line("in groups", lambda c, x: up(c, x, 4, 6, 2, 2, stride=2, groups=2), (I,)),
        Line("dilated", lambda c, x: up(c, x, 4, 6, 2, 2, stride=2, dilation=2), (I,)),
        Line("1 x 1", lambda c, x: up(c, x, 4, 6, 1, 1, stride=2, output_padding=1), (I,)),
        Line("strides that differ", lambda c, x: up(c, x, 4, 6, 2, 3, stride=[2, 3]), (I,)),
    )),
    Rewrite(blocked.transposed_into_blocks, (
        Line("whole blocks", lambda c, x: up(c, x, 4, 16, 3, 3), (I,)),
        Line("shuffled", lambda c, x: aten.pixel_shuffle.default(aten.cat.default([x] * 4, 1), 2), (L,)),
    ), (
        Line("few channels", lambda c, x: up(c, x, 4, 6, 3, 3), (I,)),
        Line("forward", lambda c, x: conv(c, x, 16, 4, 3, 3), (I,)),
    ), dtype=torch.float32),
    Rewrite(blocked.means_as_convolutions, (
        Line("a mean's transpose",
             lambda c, x: aten.div.Scalar(aten.expand.default(aten.sum.dim_IntList(x, [2, 3], True), [-1, 16, 6, 5]), 30), (L,)),
    ), (
        Line("by nothing", lambda c, x: aten.gt.Scalar(aten.div.Scalar(aten.expand.default(aten.exp.default(aten.sum.dim_IntList(
            x, [2, 3], True)), [-1, 16, 6, 5]), 0), 1.0), (L,)),
        Line("not spread", lambda c, x: aten.div.Scalar(x, 30), (L,)),
        Line("by a tensor",
             lambda c, x: aten.div.Tensor(aten.expand.default(aten.sum.dim_IntList(x, [2, 3], True), [-1, 16, 6, 5]),
                 c(torch.tensor(30.0))), (L,)),
        Line("of whole numbers", lambda c, x: aten.div.Tensor(aten.expand.default(aten._to_copy.default(aten.sum.dim_IntList(
            x, [2, 3], True), dtype=torch.int64), [-1, 16, 6, 5]), 30), (L,)),
        Line("few channels",
             lambda c, x: aten.div.Scalar(aten.expand.default(aten.sum.dim_IntList(x, [2, 3], True), [-1, 4, 6, 5]), 30), (I,)),
    ), dtype=torch.float32),
    Rewrite(blocked.gates_as_convolutions, (
        Line("a gate", lambda c, x, v: gate(v, x), (L, L)),
    ), (
        Line("above another threshold", lambda c, x, v: gate(v, x, 0.25), (L, L)),
        Line("no ReLU", lambda c, x, v: gate(v, x, 0, aten.sin.default), (L, L)),
        Line("few channels", lambda c, x, v: gate(v, x), (I, I)),
    ), dtype=torch.float32),
    Rewrite(blocked.sums_as_averages, (
        Line("over space", lambda c, x: aten.sum.dim_IntList(x, [2, 3]), (L,)),
        Line("kept, counted from the end", lambda c, x: aten.sum.dim_IntList(x, [-1, -2], True), (L,)),
    ), (
        Line("over rows", lambda c, x: aten.sum.dim_IntList(x, [2]), (L,)),
        Line("over channels too", lambda c, x: aten.sum.dim_IntList(x, [1, 2, 3]), (L,)),
        Line("in another type", lambda c, x: aten.sum.dim_IntList(x, [2, 3], dtype=torch.float64), (L,)),
        Line("few channels", lambda c, x: aten.sum.dim_IntList(x, [2, 3]), (I,)),
    ), dtype=torch.float32),
    Rewrite(decompositions.gates_as_products, (
        Line("a gate", lambda c, x, v: gate(v, x), (V, V)),
        Line("above a threshold", lambda c, x, v: aten.threshold_backward.default(v, x, 0.25), (V, V)),
        Line("of a gate", lambda c, x, v: gate(gate(v, x), v, 0.5), (V, V)),
    ), (
        Line("another gate", lambda c, x, v: aten.leaky_relu_backward.default(v, x, 0.1, False), (V, V)),
    )),
)
# fmt: on

REWRITES = (*OPTIMIZE, *LOWER, *EXPORT)
EVERY = {early, *optimize.PASSES, *lower.PASSES, *lower.QUICK, *blocked.ONNX_REWRITES} - {memory.early_coefficients}
