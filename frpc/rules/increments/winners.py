"""Winners on the way from a reference: the larger of two values, extremes, elements by their order, max pools.

The winner at the input and the winner at the reference share what changed in the proportion of the path on which each is ahead;
with points on the path, or over the whole of it, every winner on the way gets its part. Elements that are equal, or would be but
for rounding, win together and have even shares: which of them rounding made the largest must not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frpc.errors import RuleDeclinedError
from frpc.maps import Compose, LinearMap, Scale, Select, Taps, Total, WindowSum, scaled
from frpc.rules.forms.norms import weighed_sum
from frpc.rules.forms.pooling import max_pool2d
from frpc.rules.functions.arithmetic import from_end, refuse_batch
from frpc.rules.increments.paths import Path, averaged, part_above
from frpc.rules.table import TABLE, Affine, Call, Operand, Rule

__all__ = ["extreme", "larger", "max_pool", "ordered", "running"]

aten = torch.ops.aten


def larger(call: Call, path: Path) -> Affine:
    """``max(a, b) = b + relu(a - b)``, ``min(a, b) = a - relu(a - b)``: to each goes the part of the way on which it is taken."""
    names = ("self", "other") if call.op in (aten.maximum.default, aten.fmax.default) else ("other", "self")
    ahead: list[Tensor] = []
    for k in range(1, 2 if call.reference is None or path.steps is None else path.steps + 1):
        here = call.args[names[0]] - call.args[names[1]]
        if call.reference is None:
            ahead.append(torch.where(here == 0, 0.5, (here > 0).to(here.dtype)))  # on ties as PyTorch's derivative
            continue
        there = call.reference.args[names[0]] - call.reference.args[names[1]]
        if path.steps is None:
            part = part_above(here.clamp(min=0), here, there.clamp(min=0), there)
            ahead.append(torch.where((here == 0) & (there == 0), 0.5, part))
        else:
            point = there + (here - there) * (k / path.steps)
            ahead.append(torch.where(point == 0, 0.5, (point > 0).to(here.dtype)))
    share = sum(ahead[1:], ahead[0]) / len(ahead)
    terms: dict[Operand, LinearMap] = {}
    taken = share if names[0] == "self" else 1.0 - share  # of a minimum, the one that is behind
    for name, part in ((names[0], taken), (names[1], 1.0 - taken)):
        if call.carries(name):
            terms[name] = scaled(part, call.args[name].shape, call.value.shape)
    return Affine(terms)


def extreme(call: Call, path: Path) -> Affine:
    """The largest or smallest element along dimensions: as a max pool.

    The derivative on ties is PyTorch's: ``amax`` and ``amin`` share it evenly, ``max`` and ``min`` along a dimension, which say
    which element they took, give it to that one.
    """
    if call.reference is None and call.op in (aten.max.dim, aten.min.dim):
        return Affine(_standard(call)(call).terms)
    a: Tensor = call.args["self"]
    dims, kept = from_end(call.args["dim"], a.dim()), call.args["keepdim"]
    refuse_batch(a, dims)
    sign = 1.0 if call.op in (aten.amax.default, aten.max.dim) else -1.0
    if call.reference is None:
        shares = _even(a == a.amax(dims, keepdim=True) if sign > 0 else a == a.amin(dims, keepdim=True), dims, a.dtype)
    elif path.steps is not None:
        points = [sign * point for point in path.points(call, "self")]
        parts = [_even(_winning(p, dims, dims), dims, a.dtype) for p in points]
        shares = sum(parts[1:], parts[0]) / len(parts)
    else:
        shares = _ends(sign * a, sign * call.reference.args["self"], dims, dims)
    return Affine({"self": weighed_sum(call, shares, dims, kept)})


def running(call: Call, path: Path) -> Affine:
    """The largest or smallest element of every beginning of a dimension: as a max pool, the first or last winner on ties."""
    standard = _standard(call)
    if call.reference is None:
        return Affine(standard(call).terms)
    if path.steps is not None:
        return _at_points(call, path, standard)
    a, r = call.args["self"], call.reference.args["self"].expand_as(call.args["self"])
    began = {**call.reference.args, "self": r}
    start = Call(call.op, began, call.op(**began), call.carried)
    last, first = (standard(end).terms["self"] for end in (call, start))
    gained = (call.value - first.push(a)).abs()  # how far the later winner is ahead at the input
    ahead = (start.value - last.push(r)).abs()  # how far the earlier one was ahead at the reference
    share = torch.where(gained + ahead == 0, 1.0, gained / (gained + ahead + torch.finfo(a.dtype).tiny))
    return Affine({"self": Total([Compose(last, Scale(share, last.result)), Compose(first, Scale(1.0 - share, first.result))])})


def ordered(call: Call, path: Path) -> Affine:
    """Elements by their place in an order: the average of the selections at n points; exactly, it has no closed form."""
    standard = _standard(call)
    if call.reference is None:
        return Affine(standard(call).terms)
    if path.steps is None:
        raise RuleDeclinedError("which elements it selects changes on the path from the reference: give steps, LID(steps=10)")
    return _at_points(call, path, standard)


def _standard(call: Call) -> Rule:
    standard = TABLE.get(call.op)
    assert standard is not None
    return standard


def _at_points(call: Call, path: Path, standard: Rule) -> Affine:
    """The average of an operator's maps over the points of a path."""
    parts = []
    for point in path.points(call, "self"):
        args = {**call.args, "self": point}
        parts.append(standard(Call(call.op, args, call.op(**args), call.carried)).terms["self"])
    return Affine({"self": averaged(parts)})


def max_pool(call: Call, path: Path) -> Affine:
    """The winner; on the way from a reference, the winners at both ends, at every point, or of the whole way."""
    a: Tensor = call.args["self"]
    if call.reference is None:
        return _selection(call)
    taps, axis, layer = _taps(call), [2], list(range(1, a.dim() + 1))
    if path.steps is not None:
        points = path.points(call, "self")
        windows = [taps.elements(point, _lowest(a)) for point in points]
        shares = [_even(_winning(w, axis, layer), axis, a.dtype) for w in windows]
        return Affine({"self": WindowSum(sum(shares[1:], shares[0]) / len(shares), taps, a.shape)})
    here, there = (taps.elements(x, _lowest(a)) for x in (a, call.reference.args["self"]))  # [B, C, taps, *positions]
    shares_of = _ends if path.pooling == "ends" else _whole_path
    return Affine({"self": WindowSum(shares_of(here, there, axis, layer), taps, a.shape)})


def _selection(call: Call) -> Affine:
    """The selection of the winners; the first on ties, as PyTorch's derivative."""
    if call.op is aten.max_pool2d_with_indices.default:
        return max_pool2d(call, *call.args.values())
    return Affine({"self": Select(call.out[1], call.args["self"].shape)})


def _taps(call: Call) -> Taps:
    """The windows of a max pool."""
    a = call.args["self"]
    size, positions = ([int(n) for n in t.shape[2:]] for t in (a, call.value))
    if "kernel_size" not in call.args:
        return Taps.adaptive(size, positions, a.device)

    def along(name: str, otherwise: Sequence[int] = ()) -> list[int]:
        given = call.args[name] if call.args[name] not in ((), [], None) else otherwise
        values = [given] if isinstance(given, int) else list(given)
        return values * len(size) if len(values) == 1 else values

    kernel = along("kernel_size")
    lines = zip(kernel, along("stride", kernel), along("padding"), along("dilation"), strict=True)
    return Taps.stepping(size, positions, list(lines), a.device)


# Shares -------------------------------------------------------------------------------------------------------------------

_ROUNDINGS = 64  # of a layer's largest value: sums of products in float64 are off by less, also behind a few dozen layers


def _lowest(a: Tensor) -> float:
    """What stands at places outside: no value is below it, and a program can write it down, as it cannot minus infinity."""
    return torch.finfo(a.dtype).min


def _rounding(a: Tensor, axes: Sequence[int], layer: Sequence[int]) -> Tensor:
    """How far the largest elements along some axes may be apart and still be equal but for rounding.

    They are sums of products, and off by some roundings of what was added up: about as large as the largest values of the layer,
    however small a sum has become. In float64 nothing else lies so near. In float32 something would, in one window of a hundred
    thousand; there only one rounding counts. It is enough at a reference, which is computed in float64 and rounded once.

    Args:
        a: the elements.
        axes: among which the largest is sought.
        layer: over which the size of values is taken.
    """
    eps = torch.finfo(a.dtype).eps
    if a.dtype is torch.float64:
        finite = (a > _lowest(a)) & (a <= torch.finfo(a.dtype).max)
        return torch.where(finite, a.abs(), 0.0).amax(list(layer), keepdim=True) * (_ROUNDINGS * eps)
    return a.amax(list(axes), keepdim=True).abs() * eps


def _winning(a: Tensor, axes: Sequence[int], layer: Sequence[int]) -> Tensor:
    """Says which elements along some axes are the largest but for rounding; a place outside never is."""
    return (a >= a.amax(list(axes), keepdim=True) - _rounding(a, axes, layer)) & (a > _lowest(a))


def _even(chosen: Tensor, axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Even shares of what is chosen along some axes."""
    return chosen.to(dtype) / chosen.sum(list(axes), keepdim=True).clamp(min=1)


def _ends(a: Tensor, r: Tensor, axes: Sequence[int], layer: Sequence[int]) -> Tensor:
    """What each element gets of the largest along some axes: the winners at the input and those at the reference share it.

    With the later ones ahead by g at the input, and the earlier ones by h at the reference, they change places at ``h / (g + h)``
    of the way. What is a tie is not ahead at all.
    """
    top, start = a.amax(list(axes), keepdim=True), r.amax(list(axes), keepdim=True)
    won, began = _winning(a, axes, layer), _winning(r, axes, layer)
    last, first = _even(won, axes, a.dtype), _even(began, axes, a.dtype)
    gained = (first * torch.where(began & ~won, top - a, 0.0)).sum(list(axes), keepdim=True)
    ahead = (last * torch.where(won & ~began, start - r, 0.0)).sum(list(axes), keepdim=True)
    share = torch.where(ahead == 0, 1.0, gained / torch.where(ahead == 0, 1.0, gained + ahead))
    return last * share + first * (1.0 - share)


def _whole_path(a: Tensor, r: Tensor, axes: Sequence[int], layer: Sequence[int]) -> Tensor:
    """Every element of a window gets the part of the straight path on which it is the largest.

    Element i is ahead of j where ``q + t (p - q) > 0``, with the gaps p at the input and q at the reference: from, or up to, the
    time ``q / (q - p)``. Its part is what all j leave between 0 and 1; elements that are one on the whole path share theirs.
    """
    (axis,) = axes
    top, start = a.amax(axis, keepdim=True), r.amax(axis, keepdim=True)
    a, r = torch.where(_winning(a, axes, layer), top, a), torch.where(_winning(r, axes, layer), start, r)
    outside = a <= _lowest(a)
    parts = []
    for i in range(a.shape[axis]):
        here, there = a.select(axis, i), r.select(axis, i)
        low, high, alike = torch.zeros_like(here), torch.ones_like(here), torch.ones_like(here)
        for j in (j for j in range(a.shape[axis]) if j != i):
            p, q = here - a.select(axis, j), (there - r.select(axis, j)).expand_as(low)
            time = (q / torch.where(p == q, 1.0, q - p)).clamp(0.0, 1.0)
            low = torch.where(p > q, torch.maximum(low, time), low)
            high = torch.where(p < q, torch.minimum(high, time), high)
            high = torch.where((p == q) & (q < 0), 0.0, high)
            alike = alike + ((p == 0) & (q == 0)).to(alike.dtype)
        parts.append(torch.where(outside.select(axis, i), 0.0, (high - low).clamp(min=0.0) / alike))
    return torch.stack(parts, axis)
