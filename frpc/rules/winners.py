"""Winners on the way from a reference: the larger of two values, extremes, elements by their order, max pools.

The winner at the input and the winner at the reference share what changed in the proportion of the path on which each is ahead;
with points on the path, or over the whole of it, every winner on the way gets its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frpc.affine import TABLE, Affine, Call, Operand, Rule
from frpc.errors import RuleDeclinedError
from frpc.maps import Compose, LinearMap, Scale, Select, Total, scaled
from frpc.rules.paths import Path, averaged, part_above
from frpc.rules.pooling import max_pool2d

__all__ = ["extreme", "larger", "max_pool", "ordered"]

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
            ahead.append(part_above(here.clamp(min=0), here, there.clamp(min=0), there))
        else:
            ahead.append((there + (here - there) * (k / path.steps) > 0).to(here.dtype))
    share = sum(ahead[1:], ahead[0]) / len(ahead)
    terms: dict[Operand, LinearMap] = {}
    taken = share if names[0] == "self" else 1.0 - share  # of a minimum, the one that is behind
    for name, part in ((names[0], taken), (names[1], 1.0 - taken)):
        if call.carries(name):
            terms[name] = scaled(part, call.args[name].shape, call.value.shape)
    return Affine(terms)


def extreme(call: Call, path: Path) -> Affine:
    """The largest or smallest element along dimensions, or of every beginning of one: as a max pool."""
    standard = TABLE.get(call.op)
    assert standard is not None
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
    standard = TABLE.get(call.op)
    assert standard is not None
    if call.reference is None:
        return Affine(standard(call).terms)
    if path.steps is None:
        raise RuleDeclinedError("which elements it takes changes on the way from the reference: give steps, LID(steps=10)")
    return _at_points(call, path, standard)


def _at_points(call: Call, path: Path, standard: Rule) -> Affine:
    """The average of an operator's maps over the points of a path."""
    parts = []
    for point in path.points(call, "self"):
        args = {**call.args, "self": point}
        parts.append(standard(Call(call.op, args, call.op(**args), call.carried)).terms["self"])
    return Affine({"self": averaged(parts)})


def max_pool(call: Call, path: Path) -> Affine:
    """The winner; on the way from a reference, the winners at both ends or at every point."""
    a: Tensor = call.args["self"]
    if call.reference is None:
        return _selection(call, call)
    if path.steps is not None:
        parts = []
        for point in path.points(call, "self"):
            args = {**call.args, "self": point}
            parts.append(_selection(call, Call(call.op, args, call.op(**args), call.carried)).terms["self"])
        return Affine({"self": averaged(parts)})
    if path.pooling == "path":
        return _whole_path(call)
    r: Tensor = call.reference.args["self"]
    start = call.reference.out[1]
    gained = call.value - _picked(a, start)  # >= 0: how far the later winner is ahead at the input
    ahead = call.reference.value - _picked(r, call.out[1])  # >= 0: how far the earlier one was ahead at the reference
    share = gained / (gained + ahead + torch.finfo(a.dtype).tiny)
    return Affine({"self": Ends(call, share, start.expand_as(call.out[1]))})


class Ends(Total):
    """``share`` of the later winner and the rest of the earlier one."""

    def __init__(self, call: Call, share: Tensor, start: Tensor) -> None:
        a: Tensor = call.args["self"]
        standard = _selection(call, call).terms["self"]
        assert isinstance(standard, Select)
        first = Select(start, a.shape, _native(call, start), standard.window)
        super().__init__([Compose(standard, Scale(share, standard.result)), Compose(first, Scale(1.0 - share, first.result))])
        self.share, self.last, self.first = share, standard, first

    def pull(self, v: Tensor) -> Tensor:
        later = v * self.share
        return self.last.pull(later) + self.first.pull(v - later)


def _native(call: Call, indices: Tensor) -> Callable[[Tensor], Tensor] | None:
    """PyTorch's own transpose of a selection by these places, which need not be winners."""
    if call.op is not aten.max_pool2d_with_indices.default:
        return None
    a, (kernel, stride, padding, dilation) = call.args["self"], _geometry(call)
    ceil_mode = call.args["ceil_mode"]
    return lambda v: aten.max_pool2d_with_indices_backward(v, a, kernel, stride, padding, dilation, ceil_mode, indices)


def _selection(call: Call, at: Call) -> Affine:
    """The selection of the winners at some point."""
    if call.op is aten.max_pool2d_with_indices.default:
        return max_pool2d(at, *at.args.values())
    return Affine({"self": Select(at.out[1], at.args["self"].shape)})


def _picked(values: Tensor, indices: Tensor) -> Tensor:
    """``values[indices]`` over the flattened spatial axes; either may have a batch of 1. Channels are innermost, as in memory."""
    batch = indices if indices.shape[0] != 1 else values

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1, -2).expand([batch.shape[0], math.prod(x.shape[2:]), x.shape[1]])

    picked = rows(values).gather(1, rows(indices))
    return picked.unflatten(1, list(indices.shape[2:])).movedim(-1, 1)


def _whole_path(call: Call) -> Affine:
    """Every element of a window gets the part of the straight path on which it is the largest.

    Element i is ahead of j where ``q + t (p - q) > 0``, with the gaps p at the input and q at the reference: from, or up to, the
    time ``q / (q - p)``. Its part is what all j leave between 0 and 1.
    """
    assert call.reference is not None
    if call.op is not aten.max_pool2d_with_indices.default:
        raise RuleDeclinedError('pooling="path" covers max_pool2d; pooling="ends" covers every max pool')
    a, r = call.args["self"], call.reference.args["self"]
    here, there, places = _windows(call, a), _windows(call, r), _places(call, a)  # [B, C, taps, h', w']
    taps = here.shape[2]
    parts: list[LinearMap] = []
    for i in range(taps):
        low, high = torch.zeros_like(here[:, :, 0]), torch.ones_like(here[:, :, 0])
        for j in (j for j in range(taps) if j != i):
            p, q = here[:, :, i] - here[:, :, j], (there[:, :, i] - there[:, :, j]).expand_as(low)
            rising, never = p > q, (p == q) & ((q < 0) | ((q == 0) & (j < i)))
            time = (q / torch.where(p == q, 1.0, q - p)).clamp(0.0, 1.0)
            low = torch.where(rising, torch.maximum(low, time), low)
            high = torch.where(p < q, torch.minimum(high, time), high)
            high = torch.where(never | torch.isneginf(here[:, :, i]), 0.0, high)
        part = (high - low).clamp(min=0.0)
        select = Select(places[:, :, i].expand(part.shape), a.shape)
        parts.append(Compose(select, Scale(part, select.result)))
    return Affine({"self": Total(parts)})


def _windows(call: Call, x: Tensor) -> Tensor:
    """The elements of every window, ``[B, C, taps, h', w']``; minus infinity in the padding."""
    kernel, stride, padding, dilation = _geometry(call)
    size = call.value.shape[-2:]
    reach = [(int(m) - 1) * s + d * (k - 1) + 1 for m, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    far = [max(0, n - int(x.shape[2 + axis]) - padding[axis]) for axis, n in enumerate(reach)]
    framed = aten.constant_pad_nd(x, [padding[1], far[1], padding[0], far[0]], -math.inf)
    cut = [
        framed[:, :, i * dilation[0] :, j * dilation[1] :][:, :, :: stride[0], :: stride[1]][:, :, : int(size[0]), : int(size[1])]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(cut, 2)


def _places(call: Call, x: Tensor) -> Tensor:
    """Where those elements lie in the flattened image, ``[1, 1, taps, h', w']``; the padding's place is 0."""
    kernel, stride, padding, dilation = _geometry(call)
    lines = []
    for axis in (0, 1):
        first = torch.arange(int(call.value.shape[2 + axis]), device=x.device) * stride[axis] - padding[axis]
        lines.append(first[None] + torch.arange(kernel[axis], device=x.device)[:, None] * dilation[axis])  # [k, h']
    rows, columns = lines
    inside = ((rows >= 0) & (rows < x.shape[2]))[:, None, :, None] & ((columns >= 0) & (columns < x.shape[3]))[None, :, None]
    flat = rows[:, None, :, None] * int(x.shape[3]) + columns[None, :, None]
    return torch.where(inside, flat, 0).flatten(0, 1)[None, None]


def _geometry(call: Call) -> tuple[list[int], list[int], list[int], list[int]]:
    def pair(name: str, otherwise: Sequence[int] = ()) -> list[int]:
        given = call.args[name] if call.args[name] not in ((), [], None) else otherwise
        values = [given] if isinstance(given, int) else list(given)
        return values * 2 if len(values) == 1 else values

    kernel = pair("kernel_size")
    return kernel, pair("stride", kernel), pair("padding"), pair("dilation")
