"""Selection: winners, and elements read or written at given places. Each element of the result is one element of an operand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import if_all
from frpc.errors import RuleDeclinedError
from frpc.maps import Broadcast, Compose, Identity, LinearMap, LinearOp, Scale, Transpose
from frpc.rules.functions.arithmetic import back, refuse_batch, unmasked
from frpc.rules.locality import along
from frpc.rules.table import Affine, Call, Operand, linear_op, rule

aten = torch.ops.aten


def gathered(indices: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    """Returns ``u -> u.gather(dim, indices)`` for u with columns in front; ``dim`` is negative."""
    return lambda u: u.gather(dim, indices.expand([*u.shape[: u.dim() - indices.dim()], *indices.shape]))


# Winners ----------------------------------------------------------------------------------------------------------------


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    aten.cummax.default,
    aten.cummin.default,
    formula="the chosen elements",
    source="method §2: selection",
    linear=True,
    picks=True,
    locality=along("dim"),
    in_file="constants",
)
def winners(call: Call, a: Tensor, *arguments: Any) -> Affine:
    dim, indices = back(call.args["dim"], a.dim()), call.out[1]
    refuse_batch(a, [dim])
    if indices.dim() == a.dim():
        return Affine({"self": LinearOp(gathered(indices, dim), a.shape, call.value.shape)})
    pick = gathered(indices.unsqueeze(dim), dim)
    return Affine({"self": LinearOp(lambda u: pick(u).squeeze(dim), a.shape, call.value.shape)})


def _extreme(call: Call, a: Tensor, dims: Sequence[int] = (), keepdim: bool = False) -> Callable[[Tensor], Tensor]:
    """Returns the selection of the first largest or smallest element over several dimensions."""
    rank = a.dim()
    chosen = sorted(back(d, rank) for d in dims) or list(range(-rank, 0))
    refuse_batch(a, chosen)
    order = [d for d in range(-rank, 0) if d not in chosen] + chosen

    def flat(u: Tensor) -> Tensor:
        lead = u.dim() - rank
        return u.permute([*range(lead), *(u.dim() + d for d in order)]).flatten(-len(chosen))

    largest = call.op is aten.amax.default
    found = flat(a)
    winner = (found.argmax(-1) if largest else found.argmin(-1)).unsqueeze(-1)
    pick = gathered(winner, -1)

    def select(u: Tensor) -> Tensor:
        return pick(flat(u)).reshape([*u.shape[: u.dim() - rank], *call.value.shape])

    return select


CHOSEN: dict[str, Any] = {"picks": True, "locality": along("dim"), "in_file": "constants"}
linear_op(aten.amax.default, _extreme, formula="the largest element, the first on ties", **CHOSEN)
linear_op(aten.amin.default, _extreme, formula="the smallest element, the first on ties", **CHOSEN)


# Reading ----------------------------------------------------------------------------------------------------------------


linear_op(
    aten.gather.default,
    lambda call, a, dim, index, sparse_grad=False: gathered(index, back(dim, a.dim())),
    formula="a[indices]",
    picks=True,
    in_file="constants",
)
linear_op(
    aten.index_select.default,
    lambda call, a, dim, index: lambda u: u.index_select(back(dim, a.dim()), index),
    formula="a[indices]",
    **CHOSEN,
)


def _indexed(indices: Sequence[Tensor | None], rank: int) -> Callable[[Tensor], Tensor]:
    """Returns ``u -> u[indices]``; columns stay in front.

    Index tensors with a slice between them put their dimensions first, before the columns: those are moved back.
    """
    given = [i for i in indices if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for i in given):
        raise RuleDeclinedError("the number of elements depends on a mask: use torch.where, or indices")
    places = [d for d, i in enumerate(indices) if i is not None]
    apart = places[-1] - places[0] + 1 != len(places)
    count = max(i.dim() for i in given)

    def read(u: Tensor) -> Tensor:
        lead = u.dim() - rank
        z: Tensor = aten.index.Tensor(u, [*[None] * lead, *indices])
        return z.movedim(tuple(range(count, count + lead)), tuple(range(lead))) if apart and lead else z

    return read


for _op in (aten.index.Tensor, aten._unsafe_index.Tensor):
    linear_op(_op, lambda call, a, indices: _indexed(indices, a.dim()), formula="a[indices]", picks=True, in_file="constants")


# Writing ----------------------------------------------------------------------------------------------------------------


FILLED: dict[str, Any] = {"linear": True, "nonnegative": if_all("self", "value"), "in_file": "constants"}


@rule(
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    formula="[kept] on a, c = the value elsewhere",
    source="method §2: selection",
    pointwise=True,
    keeps_tokens=True,
    **FILLED,
)
@rule(
    aten.scatter.value,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    formula="[kept] on a, c = the value elsewhere",
    source="method §2: selection",
    **FILLED,
)
def fill(call: Call, a: Tensor, *arguments: Any) -> Affine:
    rest = [value for name, value in call.args.items() if name != "self"]
    mark = torch.ones_like(rest[-1], dtype=torch.bool) if isinstance(rest[-1], Tensor) else True
    untouched = call.op(torch.zeros_like(a, dtype=torch.bool), *rest[:-1], mark).logical_not()
    return Affine({"self": Scale(untouched.to(a.dtype), a.shape)}, unmasked(call.op(torch.zeros_like(a), *rest)))


@rule(
    aten.scatter.src,
    aten.diagonal_scatter.default,
    carries=("self", "src"),
    formula="[kept] on a, b at the places written",
    source="method §2: selection",
    linear=True,
    nonnegative=if_all("self", "src"),
    in_file="constants",
)
def scatter(call: Call, a: Tensor, *arguments: Any) -> Affine:
    return _written(call, a, "src")


@rule(
    aten.index_copy.default,
    aten.masked_scatter.default,
    carries=("self", "source"),
    formula="[kept] on a, b at the places written",
    source="method §2: selection",
    linear=True,
    nonnegative=if_all("self", "source"),
    in_file="constants",
)
def copy_to(call: Call, a: Tensor, *arguments: Any) -> Affine:
    return _written(call, a, "source")


def _written(call: Call, a: Tensor, name: str) -> Affine:
    """The operator run on the numbers of elements says where each element of its result comes from."""
    b = call.args[name]
    numbers = torch.arange(b.numel(), device=a.device).reshape(b.shape)
    replaced = {"self": torch.full_like(a, -1, dtype=torch.int64), name: numbers}
    origin = call.op(**{**call.args, **replaced})
    kept = origin < 0

    def place(u: Tensor) -> Tensor:
        lead = u.shape[: u.dim() - b.dim()]
        taken = u.reshape([*lead, -1]).index_select(-1, origin.clamp(min=0).flatten()).reshape([*lead, *origin.shape])
        return taken.masked_fill(kept, 0.0)

    return _two(call, a, b, name, Scale(kept.to(a.dtype), a.shape), LinearOp(place, b.shape, call.value.shape))


def _two(call: Call, a: Tensor, b: Tensor, name: str, on_a: LinearMap, on_b: LinearMap) -> Affine:
    """``z = M_a a + M_b b``: an operand that is constant becomes part of c."""
    terms: dict[Operand, LinearMap] = {}
    constant: Tensor | None = None
    for key, operand, m in (("self", a, on_a), (name, b, on_b)):
        if call.carries(key):
            terms[key] = m
        else:
            constant = m.push(operand)
    return Affine(terms, constant)


@rule(
    aten.index_put.default,
    aten._unsafe_index_put.default,
    carries=("self", "values"),
    formula="[kept] on a, b at the places written; accumulating: a + b at the places",
    source="method §2: selection",
    linear=True,
    nonnegative=if_all("self", "values"),
    in_file="constants",
)
def index_put(call: Call, a: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Affine:
    if not accumulate:
        return _written(call, a, "values")
    read = _indexed(indices, a.dim())
    places = read(a).shape
    added = Compose(Broadcast(values.shape, places), Transpose(LinearOp(read, a.shape, places)))
    return _two(call, a, values, "values", Identity(a.shape), added)


@rule(
    aten.index_add.default,
    carries=("self", "source"),
    formula="a + alpha b at the places",
    source="method §2: linear",
    linear=True,
    nonnegative=if_all("self", "source", "alpha"),
    in_file="constants",
)
def index_add(call: Call, a: Tensor, dim: int, index: Tensor, b: Tensor, alpha: float = 1) -> Affine:
    read = LinearOp(lambda v: v.index_select(back(dim, a.dim()), index) * alpha, a.shape, b.shape)
    return _two(call, a, b, "source", Identity(a.shape), Transpose(read))


@rule(
    aten.scatter_add.default,
    carries=("self", "src"),
    formula="a + b at the places",
    source="method §2: linear",
    linear=True,
    nonnegative=if_all("self", "src"),
    in_file="constants",
)
def scatter_add(call: Call, a: Tensor, dim: int, index: Tensor, b: Tensor) -> Affine:
    within = LinearOp(lambda u: corner(u, index.shape), b.shape, index.shape)
    added = Compose(within, Transpose(LinearOp(gathered(index, back(dim, a.dim())), a.shape, index.shape)))
    return _two(call, a, b, "src", Identity(a.shape), added)


def corner(u: Tensor, shape: Sequence[Any]) -> Tensor:
    """Cuts the trailing dimensions down to ``shape``; a size that fits, the batch among them, is left alone."""
    for d, size in enumerate(shape, start=-len(shape)):
        if str(u.shape[d]) != str(size):
            u = u.narrow(d, 0, size)
    return u
