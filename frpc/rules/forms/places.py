"""Reductions of elements at given indices: sums, means, products, and the largest or smallest of those written to one element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frpc.maps import Compose, LinearMap, LinearOp, Scale, Transpose
from frpc.rules.forms.selection import corner, gathered
from frpc.rules.functions.arithmetic import back, refuse_batch, unmasked
from frpc.rules.functions.quotients import over
from frpc.rules.table import Affine, Call, Operand, rule

__all__ = ["placed", "shares"]

aten = torch.ops.aten


def shares(call: Call, a: Tensor, b: Tensor, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the coefficients of a and of b (cut to the index) in the result; for products, their Jacobians.

    Args:
        call: of ``scatter_reduce``.
        a, b: values of the two operands.
        ties: equal winners share evenly, as in PyTorch's derivative; otherwise the first gets everything.
    """
    how, own = call.args["reduce"], bool(call.args["include_self"])
    dim, index = back(call.args["dim"], a.dim()), call.args["index"]
    b = corner(b, index.shape)

    def collect(start: Tensor, part: Tensor) -> Tensor:
        return start.scatter_add(dim, index, part)

    count = collect(torch.zeros_like(a), torch.ones_like(b))  # how many elements are written to a place
    kept = torch.ones_like(a) if own else (count == 0).to(a.dtype)
    number = kept + count
    if how == "sum":
        return kept, torch.ones_like(b)
    if how == "mean":
        return kept / number, (1.0 / number).gather(dim, index)
    if how == "prod":
        return _factors(a, b, kept, dim, index)
    z = call.op(a, dim, index, b, how, include_self=own)
    first, second = (a == z).to(a.dtype) * kept, (b == z.gather(dim, index)).to(a.dtype)
    if ties:
        winners = collect(first, second)
        return first / winners, second / winners.gather(dim, index)
    places = torch.arange(index.shape[dim], device=a.device).reshape([-1, *[1] * (-dim - 1)]).expand_as(index)
    late = index.shape[dim]
    earliest = torch.full_like(a, late, dtype=torch.int64).scatter_reduce(
        dim, index, torch.where(second > 0, places, late), "amin", include_self=True
    )
    chosen = (second > 0) & (places == earliest.gather(dim, index)) & (first.gather(dim, index) == 0)
    return first, chosen.to(a.dtype)


def _factors(a: Tensor, b: Tensor, kept: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """The product of the other factors at a place, for each of them."""

    def read(u: Tensor) -> Tensor:
        return u.gather(dim, index)

    none_a, none_b = ((a == 0) & (kept > 0)).to(a.dtype), (b == 0).to(a.dtype)
    zeros = none_a.scatter_add(dim, index, none_b)
    plain_a, plain_b = torch.where((a == 0) | (kept == 0), 1.0, a), torch.where(b == 0, 1.0, b)
    rest = plain_a.scatter_reduce(dim, index, plain_b, "prod")  # of the factors that are not 0
    alone = torch.where(zeros == 1, rest, 0.0)
    whole = torch.where(zeros == 0, rest, 0.0)
    return (
        torch.where(none_a > 0, alone, over(whole, a)) * kept,
        torch.where(b == 0, read(alone), over(read(whole), b)),
    )


def placed(call: Call, on_a: Tensor, on_b: Tensor) -> dict[Operand, LinearMap]:
    """The maps of both operands with these coefficients: b's are added up at their places."""
    a, b, index = call.args["self"], call.args["src"], call.args["index"]
    cut = LinearOp(lambda u: corner(u, index.shape), b.shape, index.shape)
    spread = Transpose(LinearOp(gathered(index, back(call.args["dim"], a.dim())), a.shape, index.shape))
    return {"self": Scale(on_a, a.shape), "src": Compose(Compose(cut, Scale(on_b, index.shape)), spread)}


@rule(
    aten.scatter_reduce.two,
    carries=("self", "src"),
    formula="sum, mean: their weights; amax, amin: the winner, the first on ties; prod: p/n, p the product of the others",
    source="method §2: linear, selection, products of many factors",
    in_file="constants",
)
def scatter_reduce(call: Call, a: Tensor, dim: int, index: Tensor, b: Tensor, *how: Any) -> Affine:
    refuse_batch(a, [back(dim, a.dim())])
    on_a, on_b = shares(call, a, b)
    if call.args["reduce"] == "prod":
        kept, each = shares(Call(call.op, {**call.args, "reduce": "mean"}, None, call.carried), a, b)
        on_a, on_b = on_a * kept, on_b * each  # 1/n
    maps = placed(call, on_a, on_b)
    terms = {name: m for name, m in maps.items() if call.carries(name)}
    if len(terms) == 2:
        return Affine(terms)
    if call.carries("src"):
        return Affine(terms, unmasked(torch.where(on_a == 0, 0.0, a * on_a)))
    return Affine(terms, maps["src"].push(b))
