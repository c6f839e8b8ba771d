"""Products of two values: elementwise, of matrices, quotients, powers, and the larger or smaller of two.

With one factor carried the other is a coefficient. With both carried each gets half: ``ab = (b/2) a + (a/2) b``; where one
of them is a gate, :mod:`frpc.rules.carriers` has taken it off the call's carried operands already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import if_all
from frpc.maps import BatchedMatMul, Compose, LinearMap, LinearOp, MatMul, scaled
from frpc.rules.functions.arithmetic import Number, Term, refuse_batch, unmasked
from frpc.rules.functions.quotients import expm1_over
from frpc.rules.locality import products
from frpc.rules.table import Affine, Call, Operand, rule

aten = torch.ops.aten


def _product_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The sign of ``a b``; that of a square is known whatever a is."""
    square = not isinstance(arguments["other"], int | float) and arguments["self"] is arguments["other"]
    return square or if_all("self", "other")(arguments, positive)


@rule(
    aten.mul.Tensor,
    carries=("self", "other"),
    formula="b on a; both carried: b/2 on a, a/2 on b",
    source="method §2: products, half",
    pointwise=True,
    factors=("self", "other"),
    passes_gates=True,
    nonnegative=_product_sign,
    in_file="constants",
)
def mul(call: Call, a: Tensor, b: Term) -> Affine:
    result = call.value.shape
    both = call.carries("self") and call.carries("other")
    terms: dict[Operand, LinearMap] = {}
    if call.carries("self"):
        terms["self"] = scaled(b * 0.5 if both else b, a.shape, result)
    if call.carries("other"):
        assert isinstance(b, Tensor)
        terms["other"] = scaled(a * 0.5 if both else a, b.shape, result)
    return Affine(terms)


def _quotient_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The sign of ``a / b`` by a number b; a tensor may hold -0.0, and a quotient by that is minus infinity."""
    return isinstance(arguments["other"], int | float) and arguments["other"] > 0 and "self" in positive


@rule(
    aten.div.Tensor,
    carries=("self", "other"),
    formula="1/b on a; a carried b is a coefficient",
    source="method §2: products, gate",
    pointwise=True,
    passes_gates=True,
    nonnegative=_quotient_sign,
    in_file="constants",
)
def div(call: Call, a: Term, b: Term) -> Affine:
    if call.carries("self"):
        assert isinstance(a, Tensor)
        divisor = b.to(call.value.dtype) if isinstance(b, Tensor) else b  # 1 over whole numbers would be float32
        return Affine({"self": scaled(1.0 / divisor, a.shape, call.value.shape)})
    # c / b has no value at b = 0 to subtract: all of the result is carried by b, z = (z / b) b.
    assert isinstance(b, Tensor)
    return Affine({"other": scaled(call.value / b, b.shape, call.value.shape)})


# Products of matrices ---------------------------------------------------------------------------------------------------


def _times(a: Tensor, b: Tensor, result: torch.Size) -> LinearMap:
    """Returns ``a -> a b``."""
    if b.dim() == 2 and a.dim() > 1:
        return MatMul(b.t(), a.shape)
    return BatchedMatMul(b, a.shape, result)


def _contracted(call: Call, first: str, second: str, factor: Number = 1) -> dict[Operand, LinearMap]:
    """Returns the terms of ``factor a b``: the other factor on each carried one, half of it where both are."""
    a, b, result = call.args[first], call.args[second], call.value.shape
    refuse_batch(a, [-1])
    share = factor * (0.5 if call.carries(first) and call.carries(second) else 1)
    terms: dict[Operand, LinearMap] = {}
    if call.carries(first):
        terms[first] = _times(a, b if share == 1 else b * share, result)
    if call.carries(second):
        terms[second] = BatchedMatMul(a if share == 1 else a * share, b.shape, result, left=True)
    return terms


@rule(
    aten.mm.default,
    carries=("self", "mat2"),
    formula="B on A; both carried: B/2 on A, A/2 on B",
    source="method §2: products of matrices",
    weighted=True,
    factors=("self", "mat2"),
    nonnegative=if_all("self", "mat2"),
    in_file="constants",
)
@rule(
    aten.bmm.default,
    carries=("self", "mat2"),
    formula="B on A; both carried: B/2 on A, A/2 on B",
    source="method §2: products of matrices",
    factors=("self", "mat2"),
    nonnegative=if_all("self", "mat2"),
    locality=products("mat2"),
    in_file="constants",
)
def mm(call: Call, a: Tensor, b: Tensor) -> Affine:
    return Affine(_contracted(call, "self", "mat2"))


@rule(
    aten.matmul.default,
    carries=("self", "other"),
    formula="B on A; both carried: B/2 on A, A/2 on B",
    source="method §2: products of matrices",
    weighted=True,
    factors=("self", "other"),
    nonnegative=if_all("self", "other"),
    locality=products("other"),
    in_file="constants",
)
def matmul(call: Call, a: Tensor, b: Tensor) -> Affine:
    return Affine(_contracted(call, "self", "other"))


@rule(
    aten.mv.default,
    carries=("self", "vec"),
    formula="b on A; both carried: b/2 on A, A/2 on b",
    source="method §2: products of matrices",
    factors=("self", "vec"),
    nonnegative=if_all("self", "vec"),
    in_file="constants",
)
def mv(call: Call, a: Tensor, b: Tensor) -> Affine:
    return Affine(_contracted(call, "self", "vec"))


def _added(call: Call, added: Tensor, first: str, second: str, beta: Number, alpha: Number) -> Affine:
    """Builds ``beta added + alpha a b``; with beta = 0 PyTorch does not look at ``added``, which may hold NaN."""
    terms = _contracted(call, first, second, alpha)
    constant: Term | None = None
    if call.carries("self"):
        terms["self"] = scaled(beta, added.shape, call.value.shape)
    elif beta != 0:
        constant = unmasked(added if beta == 1 else added * beta)
    return Affine(terms, constant)


@rule(
    aten.addmm.default,
    carries=("self", "mat1", "mat2"),
    formula="beta C + alpha A B, the product as in mm",
    source="method §2: products of matrices",
    weighted=True,
    factors=("mat1", "mat2"),
    nonnegative=if_all("self", "mat1", "mat2", "beta", "alpha"),
    in_file="constants",
)
def addmm(call: Call, added: Tensor, a: Tensor, b: Tensor, beta: Number = 1, alpha: Number = 1) -> Affine:
    return _added(call, added, "mat1", "mat2", beta, alpha)


@rule(
    aten.baddbmm.default,
    carries=("self", "batch1", "batch2"),
    formula="beta C + alpha A B, the product as in bmm",
    source="method §2: products of matrices",
    factors=("batch1", "batch2"),
    nonnegative=if_all("self", "batch1", "batch2", "beta", "alpha"),
    in_file="constants",
)
def baddbmm(call: Call, added: Tensor, a: Tensor, b: Tensor, beta: Number = 1, alpha: Number = 1) -> Affine:
    return _added(call, added, "batch1", "batch2", beta, alpha)


@rule(
    aten.linear.default,
    carries=("input", "weight", "bias"),
    formula="a W^T, c = b; a carried W shares as in mm",
    source="T 3.5, 3.8",
    weighted=True,
    factors=("input", "weight"),
    locality=products("weight"),
    in_file="constants",
)
def linear(call: Call, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Affine:
    result = call.value.shape
    both = call.carries("input") and call.carries("weight")
    terms: dict[Operand, LinearMap] = {}
    if call.carries("input"):
        terms["input"] = MatMul(weight * 0.5 if both else weight, a.shape)
    if call.carries("weight"):
        turned = LinearOp(lambda u: u.transpose(-1, -2), weight.shape, weight.t().shape)
        factor = a * 0.5 if both else a
        terms["weight"] = Compose(turned, BatchedMatMul(factor, turned.result, result, left=True))
    if bias is not None and call.carries("bias"):
        terms["bias"] = scaled(1, bias.shape, result)
        return Affine(terms)
    return Affine(terms, bias)


# Powers and choices -----------------------------------------------------------------------------------------------------


def _power(base: Tensor, exponent: Tensor, value: Tensor) -> Tensor:
    """``(a^p - [p = 0]) / a``, and its limit at a = 0 where it has one."""
    limit = torch.where(exponent == 1, 1.0, torch.zeros_like(value))
    quotient = torch.where(base == 0, limit, value / torch.where(base == 0, 1.0, base))
    return torch.where(exponent == 0, 0.0, quotient)


def _exponential(base: Tensor, exponent: Tensor, value: Tensor) -> Tensor:
    """``(a^p - 1) / p``, the secant through p = 0: ``log a (e^(p log a) - 1) / (p log a)``."""
    logarithm = torch.log(torch.where(base > 0, base, 1.0))
    other = torch.where(exponent == 0, 0.0, (value - 1.0) / torch.where(exponent == 0, 1.0, exponent))
    return torch.where(base > 0, logarithm * expm1_over(exponent * logarithm), other)


def _base_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The sign of ``a^p``, of a base that may be -0.0: the power of that with a negative p is minus infinity."""
    base = arguments["self"]
    return base > 0 if isinstance(base, int | float) else {"self", "exponent"} <= set(positive)


@rule(
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    carries=("self", "exponent"),
    formula="a^(p-1) on a; of a constant a: (a^p - 1)/p on p, c = 1",
    source="method §2: secant through 0",
    pointwise=True,
    nonnegative=_base_sign,
    in_file="constants",
)
def power(call: Call, a: Term, exponent: Tensor) -> Affine:
    result = call.value.shape
    base = a if isinstance(a, Tensor) else torch.full_like(exponent, a)
    if call.carries("self"):
        coefficient = _power(base, exponent, call.value)
        return Affine({"self": scaled(coefficient, base.shape, result)}, (exponent == 0).to(call.value.dtype))
    return Affine({"exponent": scaled(_exponential(base, exponent, call.value), exponent.shape, result)}, 1.0)


def _larger_sign(arguments: Mapping[str, Any], positive: Collection[Operand]) -> bool:
    """The larger of two is not negative where one is not; NaN wins, unlike in fmax."""
    return "self" in positive or "other" in positive


@rule(
    aten.maximum.default,
    carries=("self", "other"),
    formula="[a wins] on a, [a loses] on b; a wins ties",
    source="method §2: selection",
    pointwise=True,
    nonnegative=_larger_sign,
    in_file="constants",
)
@rule(
    aten.minimum.default,
    aten.fmax.default,
    aten.fmin.default,
    carries=("self", "other"),
    formula="[a wins] on a, [a loses] on b; a wins ties",
    source="method §2: selection",
    pointwise=True,
    nonnegative=if_all("self", "other"),
    in_file="constants",
)
def winner(call: Call, a: Tensor, b: Tensor) -> Affine:
    wins = (call.value == a).to(call.value.dtype)
    terms: dict[Operand, LinearMap] = {}
    constant: Tensor | None = None
    for name, operand, chosen in (("self", a, wins), ("other", b, 1.0 - wins)):
        if call.carries(name):
            terms[name] = scaled(chosen, operand.shape, call.value.shape)
        else:
            constant = torch.where(chosen > 0, operand, 0.0).to(call.value.dtype)
    return Affine(terms, constant)
