"""Products of many factors: each factor has an equal share, ``z/n`` of n (method §2, products).

``z = sum_k (p_k / n) a_k`` with p_k the product of the other factors, which has a value where a factor is 0 too. Of two factors
this is the half to each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import if_all
from frpc.errors import RuleDeclinedError
from frpc.maps import LinearMap, LinearOp
from frpc.rules.forms.norms import weighed_sum
from frpc.rules.functions.arithmetic import back, refuse_batch
from frpc.rules.functions.quotients import over
from frpc.rules.table import Affine, Call, rule

__all__ = ["others", "others_so_far", "so_far"]

aten = torch.ops.aten


def others(a: Tensor, dim: int) -> Tensor:
    """The product of the other factors along a dimension, for every factor."""
    zero = a == 0
    rest = torch.where(zero, 1.0, a).prod(dim, keepdim=True)
    zeros = zero.sum(dim, keepdim=True)
    alone = torch.where(zeros == 1, rest, 0.0)  # of the only factor that is 0
    return torch.where(zero, alone, torch.where(zeros == 0, over(rest, a), 0.0))


def others_so_far(a: Tensor, dim: int) -> Tensor:
    """``P[j, i]``, the product of the factors up to i but for j, in the last two dimensions; 0 for i before j."""
    last = a.movedim(dim, -1)
    count = last.shape[-1]
    places = torch.arange(count, device=a.device)
    later = places[None, :] > places[:, None]  # [j, i]
    between = torch.where(later, last.unsqueeze(-2), 1.0).cumprod(-1)
    before = torch.cat([torch.ones_like(last[..., :1]), last[..., :-1].cumprod(-1)], -1)
    whole = before.unsqueeze(-1) * between * (places[None, :] >= places[:, None]).to(a.dtype)
    product = last.cumprod(-1).unsqueeze(-2) * (places[None, :] >= places[:, None]).to(a.dtype)
    factor = last.unsqueeze(-1)
    return torch.where(factor == 0, whole, over(product, factor.expand_as(product)))


def so_far(a: Tensor, matrix: Tensor, dim: int) -> LinearMap:
    """Returns ``z_i = sum_j matrix[j, i] a_j`` along a dimension counted from the end."""

    def function(u: Tensor) -> Tensor:
        return (u.movedim(dim, -1).unsqueeze(-2) @ matrix).squeeze(-2).movedim(-1, dim)

    return LinearOp(function, a.shape, a.shape)


def along(call: Call, a: Tensor) -> int:
    """Returns the dimension of the factors, counted from the end."""
    dim = back(call.args["dim"], a.dim())
    refuse_batch(a, [dim])
    if call.args["dtype"] not in (None, a.dtype):
        raise RuleDeclinedError("it multiplies in another dtype: convert first, x.to(dtype).prod(dim)")
    return dim


@rule(
    aten.prod.dim_int,
    formula="p/n, p the product of the n - 1 other factors",
    source="method §2: products of many factors",
    nonnegative=if_all("self"),
    in_file="constants",
)
def prod(call: Call, a: Tensor, *arguments: Any) -> Affine:
    dim = along(call, a)
    return Affine({"self": weighed_sum(call, others(a, dim) / a.shape[dim], [dim], call.args["keepdim"])})


@rule(
    aten.cumprod.default,
    formula="p/i, p the product of the i - 1 other factors so far",
    source="method §2: products of many factors",
    nonnegative=if_all("self"),
    in_file="constants",
)
def cumprod(call: Call, a: Tensor, *arguments: Any) -> Affine:
    dim = along(call, a)
    number = torch.arange(1, a.shape[dim] + 1, device=a.device, dtype=a.dtype)
    return Affine({"self": so_far(a, others_so_far(a, dim) / number, dim)})
