"""Increments of products and quotients: each factor by the other in the middle of the path."""

from __future__ import annotations

from torch import Tensor

from frpc.maps import BatchedMatMul, Compose, LinearMap, LinearOp, MatMul, scaled
from frpc.rules.increments.paths import Increment, Path
from frpc.rules.table import Affine, Call, Operand

__all__ = ["div", "linear", "matrix_product", "mul"]


def mul(call: Call, path: Path) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    for name, other in (("self", "other"), ("other", "self")):
        if call.carries(name):
            terms[name] = scaled(path.middle(call, other), call.args[name].shape, call.value.shape)
    return Affine(terms)


def div(call: Call, path: Path) -> Affine:
    """``1/b`` on a, ``-a/b^2`` on b; exactly ``(1/b + 1/b_r)/2`` and ``-(a + a_r)/2 / (b b_r)``."""
    terms: dict[Operand, LinearMap] = {}
    b, there = call.args["other"], call.reference
    if call.carries("self"):
        ends = [end.args["other"] for end in (call, there) if end is not None]  # of whole numbers 1/b would be float32
        parts = [1.0 / (end.to(call.value.dtype) if isinstance(end, Tensor) else end) for end in ends]
        inverse = parts[0] if len(parts) == 1 else 0.5 * (parts[0] + parts[1])
        terms["self"] = scaled(inverse, call.args["self"].shape, call.value.shape)
    if call.carries("other"):
        square = b * b if there is None else b * there.args["other"]
        middle = call.args["self"] if there is None else Path().middle(call, "self")
        terms["other"] = scaled(-middle / square, b.shape, call.value.shape)
    return Affine(terms)


def matrix_product(first: str, second: str, added: str = "") -> Increment:
    """Products of matrices, ``alpha A B (+ beta C)``."""

    def rule(call: Call, path: Path) -> Affine:
        alpha, result = call.args.get("alpha", 1), call.value.shape
        terms: dict[Operand, LinearMap] = {}
        a, b = path.middle(call, first), path.middle(call, second)
        shape = call.args[first].shape
        if call.carries(first):
            factor = b if alpha == 1 else b * alpha
            flat = factor.dim() == 2 and len(shape) > 1
            terms[first] = MatMul(factor.t(), shape) if flat else BatchedMatMul(factor, shape, result)
        if call.carries(second):
            factor = a if alpha == 1 else a * alpha
            terms[second] = BatchedMatMul(factor, call.args[second].shape, result, left=True)
        if added and call.carries(added):
            terms[added] = scaled(call.args.get("beta", 1), call.args[added].shape, result)
        return Affine(terms)

    return rule


def linear(call: Call, path: Path) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    weight, result = path.middle(call, "weight"), call.value.shape
    if call.carries("input"):
        terms["input"] = MatMul(weight, call.args["input"].shape)
    if call.carries("weight"):
        shape = call.args["weight"].shape
        turned = LinearOp(lambda u: u.transpose(-1, -2), shape, [shape[1], shape[0]])
        terms["weight"] = Compose(turned, BatchedMatMul(path.middle(call, "input"), turned.result, result, left=True))
    if call.carries("bias"):
        terms["bias"] = scaled(1, call.args["bias"].shape, result)
    return Affine(terms)
