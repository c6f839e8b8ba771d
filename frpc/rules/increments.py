"""Jacobians, and their averages over the straight path from a reference: the rules of gradients, LID and DeepLIFT.

At one input ``y`` with a reference ``r``, every operator has an exact account of its increment,
``z - z_ref = sum_k M_k (a_k - r_k)``: linear operators are their own M, elementwise functions have the secant
``(f(y) - f(r)) / (y - r)``, a product has ``(b + b_r)/2`` on a and ``(a + a_r)/2`` on b. Each M is the operator's Jacobian,
averaged over the straight path from r to y (L 19 to 21, in the limit of many points), so that without a reference (r = y) the
same formulas are the Jacobian itself.

A :class:`Path` says which average is asked for: at the input alone, exact, or of n points ``r + (k/n) (y - r)`` as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from frpc.affine import TABLE, Affine, Call, Operand, Rule
from frpc.errors import RuleDeclinedError
from frpc.maps import BatchedMatMul, Compose, Gate, LinearMap, LinearOp, MatMul, Scale, Select, Total, scaled
from frpc.rules.arithmetic import from_end, refuse_batch
from frpc.rules.elementwise import expm1_over
from frpc.rules.norms import weighed_sum
from frpc.rules.pooling import max_pool2d

__all__ = ["INCREMENTS", "Path", "increment_rule"]

aten = torch.ops.aten

Pooling = Literal["ends", "path"]


@dataclass(frozen=True)
class Path:
    """Which average of the Jacobian a rule takes.

    Attributes:
        steps: number of points, or None for the exact average.
        pooling: of max pools, ``ends``: between the winner at the input and the winner at the reference; ``path``: over all
            winners on the way. They differ where a third element wins in between; both add up.
    """

    steps: int | None = None
    pooling: Pooling = "ends"

    def points(self, call: Call, name: str) -> list[Tensor]:
        """The operand at every point the average is taken over; the input alone where there is no reference."""
        here = call.args[name]
        if call.reference is None or self.steps is None:
            return [here]
        there = call.reference.args[name]
        change = torch.where(here == there, 0.0, here - there)  # minus infinity, which marks what a softmax leaves out, stays
        return [there + change * (k / self.steps) for k in range(1, self.steps + 1)]

    def middle(self, call: Call, name: str) -> Any:
        """The average of an operand over the path: ``(a + r) / 2`` exactly, ``r + (n + 1)/(2n) (a - r)`` over n points."""
        here = call.args[name]
        if call.reference is None or not isinstance(here, Tensor):
            return here
        there = call.reference.args[name]
        weight = 0.5 if self.steps is None else (self.steps + 1) / (2 * self.steps)
        return (here + there) * 0.5 if self.steps is None else there + (here - there) * weight


Increment = Callable[[Call, Path], Affine]


# Functions of one number --------------------------------------------------------------------------------------------------


def derivative(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """``f'(a)`` of an elementwise function, by PyTorch's own formula."""
    made: Any = torch.func.vjp(function, a)
    value, transpose = made
    slope: Tensor = transpose(torch.ones_like(value))[0]
    return slope


def _secant(function: Callable[[Tensor], Tensor], a: Tensor, r: Tensor, change: Tensor) -> Tensor:
    """``(f(a) - f(r)) / (a - r)``; the derivative in the middle where a and r are so close that the difference has no digits."""
    d = a - r
    near = d.abs() <= math.sqrt(torch.finfo(a.dtype).eps) * torch.maximum(a.abs(), r.abs())
    slope = derivative(function, 0.5 * (a + r))
    exact = torch.where(near, slope, change / torch.where(near, 1.0, d))
    return torch.where(torch.isfinite(d), exact, 0.0)  # what a mask set to minus infinity stays there


def _elementwise(call: Call, path: Path) -> Affine:
    name = str(call.op._schema.arguments[0].name)
    return _of_one(call, path, name, call.args[name].shape)


def _of_one(call: Call, path: Path, name: str, operand: Sequence[Any]) -> Affine:
    """A function of the elements of one operand, which may be stretched to the result's shape."""
    a = call.args[name]

    def function(u: Tensor) -> Tensor:
        out = call.op(**{**call.args, name: u})
        value: Tensor = out[0] if isinstance(out, tuple | list) else out
        return value

    if call.reference is not None and path.steps is None:
        slope = _secant(function, a, call.reference.args[name], call.value - call.reference.value)
    else:
        slopes = [derivative(function, point) for point in path.points(call, name)]
        slope = sum(slopes[1:], slopes[0]) / len(slopes)
    return Affine({name: scaled(slope, operand, call.value.shape)})


def _relu(call: Call, path: Path) -> Affine:
    """``[a > 0]``; of the path from r the part above 0, ``(a+ + r+) / (|a| + |r|)``."""
    a: Tensor = call.args["self"]
    if call.reference is None:
        return Affine({"self": Gate(call.value)})
    if path.steps is not None:
        above = [(point > 0).to(a.dtype) for point in path.points(call, "self")]
        return Affine({"self": Scale(sum(above[1:], above[0]) / len(above), a.shape)})
    r: Tensor = call.reference.args["self"]
    return Affine({"self": Scale(_above(call.value, a, call.reference.value, r), a.shape)})


def _above(positive: Tensor, a: Tensor, r_positive: Tensor, r: Tensor) -> Tensor:
    """The part of the way from r to a that lies above 0; no digits are lost where both are near."""
    tiny = torch.finfo(a.dtype).tiny
    return (positive + r_positive) / (a.abs() + (r.abs() + tiny))


def _exponential(call: Call, path: Path) -> Affine:
    """``base ** p`` of a constant base, and ``a ** p`` with a constant exponent: functions of one number each."""
    carried = [str(name) for name in call.carried]
    if len(carried) != 1:
        raise RuleDeclinedError("base and exponent both come from the input: write it as exp(p log a)")
    return _of_one(call, path, carried[0], call.args[carried[0]].shape)


def _sign(call: Call, path: Path) -> Affine:
    """``sgn`` of real numbers as ``sign``: PyTorch's derivative of sgn, made for complex ones, fixes the batch size."""
    return _elementwise(replace(call, op=aten.sign.default), path)


def _copied(call: Call, path: Path) -> Affine:
    """The source; of what it overwrites nothing is left."""
    return Affine({"src": scaled(1, call.args["src"].shape, call.value.shape)} if call.carries("src") else {})


# Products and quotients ---------------------------------------------------------------------------------------------------


def _mul(call: Call, path: Path) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    for name, other in (("self", "other"), ("other", "self")):
        if call.carries(name):
            terms[name] = scaled(path.middle(call, other), call.args[name].shape, call.value.shape)
    return Affine(terms)


def _div(call: Call, path: Path) -> Affine:
    """``1/b`` on a, ``-a/b^2`` on b; exactly ``(1/b + 1/b_r)/2`` and ``-(a + a_r)/2 / (b b_r)``."""
    terms: dict[Operand, LinearMap] = {}
    b, there = call.args["other"], call.reference
    if call.carries("self"):
        inverse = 1.0 / b if there is None or not isinstance(b, Tensor) else 0.5 * (1.0 / b + 1.0 / there.args["other"])
        terms["self"] = scaled(inverse, call.args["self"].shape, call.value.shape)
    if call.carries("other"):
        square = b * b if there is None else b * there.args["other"]
        middle = call.args["self"] if there is None else Path().middle(call, "self")
        terms["other"] = scaled(-middle / square, b.shape, call.value.shape)
    return Affine(terms)


def _matrix_product(first: str, second: str, added: str = "") -> Increment:
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


def _linear(call: Call, path: Path) -> Affine:
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


def _variance(call: Call, path: Path) -> Affine:
    """A quadratic form: twice the deviations in the middle of the path, over n - correction, summed."""
    a = path.middle(call, "self")
    dims = from_end(call.args["dim"], call.args["self"].dim())
    refuse_batch(call.args["self"], dims)
    correction = call.args["correction"]
    count = math.prod(call.args["self"].shape[d] for d in dims)
    coefficient = 2.0 * (a - a.mean(dims, keepdim=True)) / (count - (1 if correction is None else correction))
    return Affine({"self": weighed_sum(call, coefficient, dims, call.args["keepdim"])})


# Softmax ------------------------------------------------------------------------------------------------------------------


class SoftmaxMap(LinearMap):
    """``u -> k (u - <k, u> / sum k)`` along one dimension, its own transpose; with k a softmax, the Jacobian of that softmax."""

    def __init__(self, weights: Tensor, dim: int) -> None:
        self.operand = self.result = weights.shape
        self.weights, self.dim = weights, dim
        self.total = weights.sum(dim, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)  # 0 where all is masked

    def push(self, u: Tensor) -> Tensor:
        return self.weights * (u - (self.weights * u).sum(self.dim, keepdim=True) / self.total)

    def pull(self, v: Tensor) -> Tensor:
        return self.push(v)


def _weights(call: Call, path: Path, name: str, dims: list[int]) -> list[Tensor]:
    """The softmax at each point of a path; exactly, the logarithmic means ``k = (s - t) / (log s - log t)`` of its two ends.

    ``ds_i = k_i (da_i - dL)``, L the logarithm of the sum. As the s sum to 1, ``dL = sum k_j da_j / sum k_j``: complete, bounded,
    and s itself where both ends are one.
    """

    def softmax(a: Tensor) -> Tensor:
        e = torch.exp(a - a.amax(dims, keepdim=True).clamp(min=torch.finfo(a.dtype).min))
        return e / e.sum(dims, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)

    if call.reference is None or path.steps is not None:
        return [softmax(point) for point in path.points(call, name)]
    a, r = call.args[name], call.reference.args[name]
    change = (a - a.logsumexp(dims, keepdim=True)) - (r - r.logsumexp(dims, keepdim=True))
    size = torch.where(torch.isfinite(change), change.abs(), 0.0)  # what is left out has no softmax at either end
    return [torch.maximum(softmax(a), softmax(r)) * expm1_over(-size)]


def _averaged(maps: Sequence[LinearMap]) -> LinearMap:
    return maps[0] if len(maps) == 1 else Total([Compose(m, Scale(1.0 / len(maps), m.result)) for m in maps])


def _softmax(call: Call, path: Path) -> Affine:
    name, dim = str(call.op._schema.arguments[0].name), from_end(call.args["dim"], call.value.dim())
    refuse_batch(call.args[name], dim)
    weights = [call.value] if call.reference is None else _weights(call, path, name, dim)
    return Affine({name: _averaged([SoftmaxMap(k, dim[0]) for k in weights])})


def _log_softmax(call: Call, path: Path) -> Affine:
    a, dim = call.args["self"], from_end(call.args["dim"], call.value.dim())
    refuse_batch(a, dim)
    parts = [k / k.sum(dim, keepdim=True) for k in _weights(call, path, "self", dim)]
    weights = sum(parts[1:], parts[0]) / len(parts)
    return Affine({"self": LinearOp(lambda u: u - (weights * u).sum(dim, keepdim=True), a.shape, a.shape)})


def _logsumexp(call: Call, path: Path) -> Affine:
    a, dims = call.args["self"], from_end(call.args["dim"], call.args["self"].dim())
    refuse_batch(a, dims)
    parts = [k / k.sum(dims, keepdim=True) for k in _weights(call, path, "self", dims)]
    return Affine({"self": weighed_sum(call, sum(parts[1:], parts[0]) / len(parts), dims, call.args["keepdim"])})


# Winners ------------------------------------------------------------------------------------------------------------------


def _larger(call: Call, path: Path) -> Affine:
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
            ahead.append(_above(here.clamp(min=0), here, there.clamp(min=0), there))
        else:
            ahead.append((there + (here - there) * (k / path.steps) > 0).to(here.dtype))
    share = sum(ahead[1:], ahead[0]) / len(ahead)
    terms: dict[Operand, LinearMap] = {}
    taken = share if names[0] == "self" else 1.0 - share  # of a minimum, the one that is behind
    for name, part in ((names[0], taken), (names[1], 1.0 - taken)):
        if call.carries(name):
            terms[name] = scaled(part, call.args[name].shape, call.value.shape)
    return Affine(terms)


def _extreme(call: Call, path: Path) -> Affine:
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


def _ordered(call: Call, path: Path) -> Affine:
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
    return Affine({"self": _averaged(parts)})


def _max_pool(call: Call, path: Path) -> Affine:
    """The winner; on the way from a reference, the winners at both ends or at every point."""
    a: Tensor = call.args["self"]
    if call.reference is None:
        return _selection(call, call)
    if path.steps is not None:
        parts = []
        for point in path.points(call, "self"):
            args = {**call.args, "self": point}
            parts.append(_selection(call, Call(call.op, args, call.op(**args), call.carried)).terms["self"])
        return Affine({"self": _averaged(parts)})
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


# The table ----------------------------------------------------------------------------------------------------------------


INCREMENTS: dict[Any, tuple[Increment, tuple[str, ...], str]] = {
    aten.relu.default: (_relu, ("self",), "(a+ + r+) / (|a| + |r|)"),
    aten.mul.Tensor: (_mul, ("self", "other"), "(b + b_r)/2 on a, (a + a_r)/2 on b"),
    aten.div.Tensor: (_div, ("self", "other"), "(1/b + 1/b_r)/2 on a, -(a + a_r)/2 / (b b_r) on b"),
    aten.mm.default: (_matrix_product("self", "mat2"), ("self", "mat2"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.bmm.default: (_matrix_product("self", "mat2"), ("self", "mat2"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.matmul.default: (_matrix_product("self", "other"), ("self", "other"), "(B + B_r)/2 on A, (A + A_r)/2 on B"),
    aten.mv.default: (_matrix_product("self", "vec"), ("self", "vec"), "(b + b_r)/2 on A, (A + A_r)/2 on b"),
    aten.addmm.default: (_matrix_product("mat1", "mat2", "self"), ("self", "mat1", "mat2"), "beta C + the product as in mm"),
    aten.baddbmm.default: (
        _matrix_product("batch1", "batch2", "self"),
        ("self", "batch1", "batch2"),
        "beta C + the product as in bmm",
    ),
    aten.linear.default: (_linear, ("input", "weight", "bias"), "W on a; both carried: as mm"),
    aten.var.correction: (_variance, ("self",), "(dev(a) + dev(r)) / (n - correction), summed"),
    aten.maximum.default: (_larger, ("self", "other"), "the part of the path on which each is ahead"),
    aten.minimum.default: (_larger, ("self", "other"), "the part of the path on which each is behind"),
    aten.fmax.default: (_larger, ("self", "other"), "the part of the path on which each is ahead"),
    aten.fmin.default: (_larger, ("self", "other"), "the part of the path on which each is behind"),
    aten.pow.Tensor_Tensor: (_exponential, ("self", "exponent"), "secant"),
    aten.pow.Scalar: (_exponential, ("exponent",), "secant"),
    aten.sgn.default: (_sign, ("self",), "(f(a) - f(r)) / (a - r)"),
    aten.copy.default: (_copied, ("self", "src"), "the source"),
    aten._softmax.default: (_softmax, ("self",), "k (v - <k, v> / sum k), k = (s - s_r) / log(s / s_r)"),
    aten._safe_softmax.default: (_softmax, ("self",), "k (v - <k, v> / sum k), k = (s - s_r) / log(s / s_r)"),
    aten._log_softmax.default: (_log_softmax, ("self",), "v - k <1, v> / sum k, k as for softmax"),
    aten.logsumexp.default: (_logsumexp, ("self",), "k / sum k, k as for softmax"),
    **dict.fromkeys(
        (aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default),
        (_extreme, ("self",), "the elements taken at the ends of the path"),
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
        (_ordered, ("self",), "the elements taken at the points of the path"),
    ),
    aten.max_pool2d_with_indices.default: (_max_pool, ("self",), "the winners on the path"),
    aten.max_pool3d_with_indices.default: (_max_pool, ("self",), "the winners at its ends"),
    aten.adaptive_max_pool2d.default: (_max_pool, ("self",), "the winners at its ends"),
    aten.adaptive_max_pool3d.default: (_max_pool, ("self",), "the winners at its ends"),
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
    if standard.elementwise:
        return Rule(op, _named(_elementwise, path, standard), standard.carries[:1], "(f(a) - f(r)) / (a - r)", "L 19-21")
    return Rule(op, _linear_part(standard), standard.carries, standard.formula, standard.source) if standard.linear else None


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
