"""Jacobians, and their averages over the straight path from a reference: the rules of gradients, LID and DeepLIFT.

At one input ``y`` with a reference ``r``, every operator has an exact account of its increment,
``z - z_ref = sum_k M_k (a_k - r_k)``: linear operators are their own M, elementwise functions have the secant
``(f(y) - f(r)) / (y - r)``, a product has ``(b + b_r)/2`` on a and ``(a + a_r)/2`` on b. Each M is the operator's Jacobian,
averaged over the straight path from r to y (L 19 to 21, in the limit of many points), so that without a reference (r = y) the
same formulas are the Jacobian itself.

A :class:`~frpc.rules.increments.paths.Path` says which average is asked for: at the input alone, exact, or of n points
``r + (k/n) (y - r)`` as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.errors import RuleDeclinedError
from frpc.maps import LinearMap, ReLUGate, Scale, scaled
from frpc.rules.forms.norms import weighed_sum
from frpc.rules.forms.spectral import turn
from frpc.rules.functions.arithmetic import from_end, refuse_batch
from frpc.rules.functions.quotients import over
from frpc.rules.increments.changes import cumulative_product, of_two, product, reduced
from frpc.rules.increments.paths import Increment, Path, derivative, part_above, secant
from frpc.rules.increments.products import div, linear, matrix_product, mul
from frpc.rules.increments.softmax import log_softmax, logsumexp, softmax
from frpc.rules.increments.winners import extreme, larger, max_pool, ordered, running
from frpc.rules.table import TABLE, Affine, Call, Operand, Rule

__all__ = ["INCREMENTS", "increment_rule"]

aten = torch.ops.aten

# Functions of one number --------------------------------------------------------------------------------------------------


def _elementwise(call: Call, path: Path) -> Affine:
    name = str(schema_of(call.op).arguments[0].name)
    return _of_one(call, path, name, call.args[name].shape)


def _of_one(call: Call, path: Path, name: str, operand: Sequence[Any]) -> Affine:
    """A function of the elements of one operand, which may be stretched to the result's shape."""
    a = call.args[name]

    def function(u: Tensor) -> Tensor:
        out = call.op(**{**call.args, name: u})
        value: Tensor = out[0] if isinstance(out, tuple | list) else out
        return value

    if call.reference is not None and path.steps is None:
        slope = secant(function, a, call.reference.args[name], call.value - call.reference.value)
    else:
        slopes = [derivative(function, point) for point in path.points(call, name)]
        slope = sum(slopes[1:], slopes[0]) / len(slopes)
    return Affine({name: scaled(slope, operand, call.value.shape)})


def _relu(call: Call, path: Path) -> Affine:
    """``[a > 0]``; of the path from r the part above 0, ``(a+ + r+) / (|a| + |r|)``."""
    a: Tensor = call.args["self"]
    if call.reference is None:
        return Affine({"self": ReLUGate(call.value)})
    if path.steps is not None:
        above = [(point > 0).to(a.dtype) for point in path.points(call, "self")]
        return Affine({"self": Scale(sum(above[1:], above[0]) / len(above), a.shape)})
    r: Tensor = call.reference.args["self"]
    return Affine({"self": Scale(part_above(call.value, a, call.reference.value, r), a.shape)})


def _exponential(call: Call, path: Path) -> Affine:
    """``base ** p`` of a constant base, and ``a ** p`` with a constant exponent: functions of one number each."""
    carried = [str(name) for name in call.carried]
    if len(carried) != 1:
        return of_two(call, path)
    return _of_one(call, path, carried[0], call.args[carried[0]].shape)


def _sign(call: Call, path: Path) -> Affine:
    """``sgn`` of real numbers as ``sign``: PyTorch's derivative of sgn, made for complex ones, fixes the batch size."""
    return _elementwise(replace(call, op=aten.sign.default), path)


def _copied(call: Call, path: Path) -> Affine:
    """The source; of what it overwrites nothing is left."""
    return Affine({"src": scaled(1, call.args["src"].shape, call.value.shape)} if call.carries("src") else {})


# Functions of several numbers ----------------------------------------------------------------------------------------------


def _variance(call: Call, path: Path) -> Affine:
    """A quadratic form: twice the deviations in the middle of the path, over n - correction, summed."""
    a = path.middle(call, "self")
    dims = from_end(call.args["dim"], call.args["self"].dim())
    refuse_batch(call.args["self"], dims)
    correction = call.args["correction"]
    count = math.prod(call.args["self"].shape[d] for d in dims)
    coefficient = 2.0 * (a - a.mean(dims, keepdim=True)) / (count - (1 if correction is None else correction))
    return Affine({"self": weighed_sum(call, coefficient, dims, call.args["keepdim"])})


def _hypot(call: Call, path: Path) -> Affine:
    """``a/|z|`` on a, ``b/|z|`` on b; exactly ``(a + a_r) / (|z| + |z_r|)``: the increments of the squares add up to |z|'s."""
    terms: dict[Operand, LinearMap] = {}
    sides = [(call.args["self"], call.args["other"])]
    if call.reference is not None and path.steps is not None:
        sides = list(zip(path.points(call, "self"), path.points(call, "other"), strict=True))
    for which, name in enumerate(("self", "other")):
        if not call.carries(name):
            continue
        if call.reference is not None and path.steps is None:
            slope = over(call.args[name] + call.reference.args[name], call.value + call.reference.value)
        else:
            slopes = [over(point[which], torch.hypot(*point)) for point in sides]
            slope = sum(slopes[1:], slopes[0]) / len(slopes)
        terms[name] = scaled(slope, call.args[name].shape, call.value.shape)
    return Affine(terms)


def _atan2(call: Call, path: Path) -> Affine:
    """The Jacobian; exactly one secant for each operand, the mean of those with the other at either end of the path.

    As for products: the first operand moves before the second, or behind it, and both ways count half.
    """
    a, b, there = call.args["self"], call.args["other"], call.reference
    if there is None or path.steps is not None:
        points = list(zip(path.points(call, "self"), path.points(call, "other"), strict=True))
        turns = [turn(*point) for point in points]
        slopes = [sum(parts[1:], parts[0]) / len(points) for parts in zip(*turns, strict=True)]
    else:
        p, q = there.args["self"], there.args["other"]
        first, second = torch.atan2(a, q), torch.atan2(p, b)  # where one of them has moved
        slopes = [
            0.5 * (_angle_secant(a, p, b, call.value - second) + _angle_secant(a, p, q, first - there.value)),
            0.5 * (_angle_secant(b, q, a, call.value - first, 1) + _angle_secant(b, q, p, second - there.value, 1)),
        ]
    named = zip(("self", "other"), slopes, strict=True)
    return Affine({n: scaled(slope, call.args[n].shape, call.value.shape) for n, slope in named if call.carries(n)})


def _angle_secant(a: Tensor, r: Tensor, other: Tensor, change: Tensor, place: int = 0) -> Tensor:
    """The secant of ``atan2`` in one of its operands, the other held; ``place`` says which one moves."""
    a, r, other = torch.broadcast_tensors(a, r, other)
    return secant(lambda u: torch.atan2(other, u) if place else torch.atan2(u, other), a, r, change)


def _norm(call: Call, path: Path) -> Affine:
    """The derivative of a norm or of a deviation; on the way from a reference they are taken as what they compute."""
    standard = TABLE.get(call.op)
    if standard is None or call.reference is not None:
        raise RuleDeclinedError("its increment is that of what it computes")
    return Affine(standard(call).terms)


# The table ----------------------------------------------------------------------------------------------------------------


INCREMENTS: dict[Any, tuple[Increment, tuple[str, ...], str]] = {
    aten.relu.default: (_relu, ("self",), "(a+ + r+) / (|a| + |r|)"),
    aten.mul.Tensor: (mul, ("self", "other"), "(b + b_r)/2 on a, (a + a_r)/2 on b"),
    aten.div.Tensor: (div, ("self", "other"), "(1/b + 1/b_r)/2 on a, -(a + a_r)/2 / (b b_r) on b"),
    aten.mm.default: (matrix_product("self", "mat2"), ("self", "mat2"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.bmm.default: (matrix_product("self", "mat2"), ("self", "mat2"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.matmul.default: (matrix_product("self", "other"), ("self", "other"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.mv.default: (matrix_product("self", "vec"), ("self", "vec"), "(b + b_r)/2 on A, (A + A_r)/2 on b"),
    aten.addmm.default: (matrix_product("mat1", "mat2", "self"), ("self", "mat1", "mat2"), "beta C + the product as in mm"),
    aten.baddbmm.default: (
        matrix_product("batch1", "batch2", "self"),
        ("self", "batch1", "batch2"),
        "beta C + the product as in bmm",
    ),
    aten.linear.default: (linear, ("input", "weight", "bias"), "W on a; both carried: as mm"),
    aten.hypot.default: (_hypot, ("self", "other"), "(a + a_r) / (|z| + |z_r|) on a, (b + b_r) / (|z| + |z_r|) on b"),
    aten.atan2.default: (_atan2, ("self", "other"), "secants, the other operand at either end"),
    aten.var.correction: (_variance, ("self",), "(dev(a) + dev(r)) / (n - correction), summed"),
    aten.linalg_vector_norm.default: (_norm, ("self",), "sgn(a) (|a| / |a|_p)^(p-1), summed; 0 at a = 0"),
    aten.std.correction: (_norm, ("self",), "dev(a) / ((n - correction) std), summed; 0 at std = 0"),
    aten.maximum.default: (larger, ("self", "other"), "the part of the path on which each is ahead"),
    aten.minimum.default: (larger, ("self", "other"), "the part of the path on which each is behind"),
    aten.fmax.default: (larger, ("self", "other"), "the part of the path on which each is ahead"),
    aten.fmin.default: (larger, ("self", "other"), "the part of the path on which each is behind"),
    aten.pow.Tensor_Tensor: (_exponential, ("self", "exponent"), "secant"),
    aten.pow.Scalar: (_exponential, ("exponent",), "secant"),
    **dict.fromkeys(
        (
            aten.logaddexp.default,
            aten.logaddexp2.default,
            aten.xlogy.Tensor,
            aten.xlogy.Scalar_Self,
            aten.xlogy.Scalar_Other,
            aten.special_xlog1py.default,
            aten.special_xlog1py.self_scalar,
            aten.special_xlog1py.other_scalar,
            aten.copysign.Tensor,
            aten.copysign.Scalar,
            aten.div.Tensor_mode,
            aten.remainder.Tensor,
            aten.fmod.Tensor,
        ),
        (of_two, ("self", "other"), "secants, one operand after the other, in both orders"),
    ),
    aten.igamma.default: (of_two, ("other",), "secant"),
    aten.igammac.default: (of_two, ("other",), "secant"),
    aten.polygamma.default: (lambda call, path: _of_one(call, path, "self", call.args["self"].shape), ("self",), "secant"),
    aten.prod.dim_int: (product, ("self",), "the product of the others, averaged"),
    aten.cumprod.default: (cumulative_product, ("self",), "the product of the others so far, averaged"),
    aten.scatter_reduce.two: (reduced, ("self", "src"), "weights; the winners at both ends; the product of the others, averaged"),
    aten.sgn.default: (_sign, ("self",), "(f(a) - f(r)) / (a - r)"),
    aten.copy.default: (_copied, ("self", "src"), "the source"),
    aten._softmax.default: (softmax, ("self",), "k (v - <k, v> / sum k), k = (s - s_r) / log(s / s_r)"),
    aten._safe_softmax.default: (softmax, ("self",), "k (v - <k, v> / sum k), k = (s - s_r) / log(s / s_r)"),
    aten._log_softmax.default: (log_softmax, ("self",), "v - k <1, v> / sum k, k as for softmax"),
    aten.logsumexp.default: (logsumexp, ("self",), "k / sum k, k as for softmax"),
    **dict.fromkeys(
        (aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim),
        (extreme, ("self",), "the elements taken at the ends of the path"),
    ),
    **dict.fromkeys(
        (aten.cummax.default, aten.cummin.default), (running, ("self",), "the elements taken at the ends of the path")
    ),
    **dict.fromkeys(
        (
            aten.median.dim,
            aten.nanmedian.dim,
            aten.mode.default,
            aten.kthvalue.default,
            aten.topk.default,
            aten.sort.default,
            aten.sort.stable,
        ),
        (ordered, ("self",), "the elements taken at the points of the path"),
    ),
    aten.max_pool2d_with_indices.default: (max_pool, ("self",), "the winners on the path"),
    aten.max_pool3d_with_indices.default: (max_pool, ("self",), "the winners at its ends"),
    aten.adaptive_max_pool2d.default: (max_pool, ("self",), "the winners at its ends"),
    aten.adaptive_max_pool3d.default: (max_pool, ("self",), "the winners at its ends"),
}
"""Operators that are not linear in what they carry, with their carried arguments and formula. Elementwise functions are known by
their row in the rule table."""


def increment_rule(op: Any, path: Path) -> Rule | None:
    """Returns the rule of an operator's increments, or None where none is known.

    Linear operators keep their affine form: M does not depend on where it is taken.
    """
    standard = TABLE.get(op)
    if op in INCREMENTS:
        function, carries, formula = INCREMENTS[op]
        return Rule(op, _named(function, path, standard), carries, formula, "L 12, 19-21; method §4")
    if standard is None:
        return None
    if standard.traits.elementwise:
        return Rule(op, _named(_elementwise, path, standard), standard.carries[:1], "(f(a) - f(r)) / (a - r)", "L 19-21")
    return (
        Rule(op, _linear_part(standard), standard.carries, standard.formula, standard.source) if standard.traits.linear else None
    )


def _named(function: Increment, path: Path, standard: Rule | None) -> Callable[..., Affine]:
    def rule(call: Call, *arguments: Any) -> Affine:
        return function(call, path)

    rule.__name__ = standard.name if standard is not None else function.__name__.strip("_")
    return rule


def _linear_part(standard: Rule) -> Callable[..., Affine]:
    """The standard rule without its constant; every operand that carries has to have a term."""

    def rule(call: Call, *arguments: Any) -> Affine:
        affine = standard(call)
        if missing := set(call.carried) - set(affine.terms):
            raise RuleDeclinedError(f"no derivative by {', '.join(map(str, sorted(missing, key=str)))}")
        return Affine(affine.terms)

    rule.__name__ = standard.name
    return rule
