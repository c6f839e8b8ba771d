"""Optimization, lowering and exports: what each pass rewrites in a program, and what only looks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frpc.export import blocked, decompositions, separable
from frpc.optimize import lower
from frpc.optimize import passes as optimize
from frpc.optimize.lower import convolutions, gates, memory, onednn, pooling, shares
from rewrites import Line, Rewrite

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
V, I, L = (4,), (4, 6, 5), (16, 6, 5)  # noqa: E741 - a vector, an image, an image of a whole block of channels
BACK = aten.max_pool2d_with_indices_backward.default


def batch(x: Any) -> Any:
    return aten.sym_size.int(x, 0)


def conv(c: Any, x: Any, *weight: int, **given: Any) -> Any:
    """A convolution with stride 1 and no padding where nothing else is said; ``w`` is the weight where it is given."""
    options = {
        "w": None,
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "transposed": False,
        "output_padding": 0,
        "groups": 1,
    }
    options |= given
    weights = c(*weight) if options["w"] is None else options["w"]
    pair = {k: [v] * 2 for k, v in options.items() if k in ("stride", "padding", "dilation", "output_padding") and type(v) is int}
    o = {**options, **pair}
    return aten.convolution.default(
        x, weights, o["bias"], o["stride"], o["padding"], o["dilation"], o["transposed"], o["output_padding"], o["groups"]
    )


def up(c: Any, x: Any, *weight: int, **given: Any) -> Any:
    return conv(c, x, *weight, **({"transposed": True} | given))


def gate(v: Any, x: Any, threshold: float = 0, op: Any = aten.relu.default) -> Any:
    return aten.threshold_backward.default(v, op(x), threshold)


def written(x: Any) -> Any:
    return aten.exp.default(x)


def over(r: Any) -> Any:
    return aten.div.Tensor(r, aten.add.Tensor(r, 0.5))


def pooled(r: Any) -> Any:
    return aten.max_pool2d_with_indices.default(r, [2, 2], [2, 2])


def scattered(v: Any, pool: Any, x: Any, sizes: Any = None) -> Any:
    """Two columns of the pool's results carried back to their winners, as programs have it: ``[2, B, 4, 4, 6]``."""
    flat = aten.reshape.default(v, [2, -1, 4, 6])
    index = aten.expand.default(aten.reshape.default(pool[1], [-1, 4, 6]), [2, batch(x), 4, 6])
    zeros = aten.new_zeros.default(v, [2, batch(x), 4, 24])
    return aten.reshape.default(aten.scatter_add.default(zeros, -1, index, flat), sizes or [2, batch(x), 4, 4, 6])


def columns(x: Any, scale: float = 2.0) -> Any:
    """Two columns ``[2, B, 4, 2, 3]`` made of ``[B, 4, 4, 6]``."""
    small = aten.slice.Tensor(aten.slice.Tensor(x, 2, 0, 2), 3, 0, 3)
    return aten.cat.default([aten.unsqueeze.default(small, 0), aten.unsqueeze.default(aten.mul.Tensor(small, scale), 0)])


def packed(c: Any, x: Any, *weight: int) -> Any:
    return mkldnn._convolution_pointwise.default(x, c(*weight), None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def share(total: Any, v: Any, c: Any, size: int) -> Any:
    return aten.addmv.default(total, v, c(size))


def first_column(x: Any) -> Any:
    return aten.select.int(x, 1, 0)


def early(graph_module: fx.GraphModule) -> Any:
    """The pass on a program in which all is computed by rules."""
    for node in graph_module.graph.nodes:
        node.meta["phase"] = "rule"
    return memory.early_coefficients(graph_module)


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
