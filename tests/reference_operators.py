"""Operators on values that carry their maps: dense, float64, one column per input cell; models are run in `reference.py`.

This is the slow twin of the compiler, written from the thesis and sharing no code with it. Every neuron of every
layer carries its whole map over the N input cells through one and the same recursion (T 3.8),

    V_i = sum_j w_ij V_j + b_i / N,

and algorithm 1 of the thesis is taken at its word: a layer without its bias is applied to the N columns one after
the other. Operators outside the thesis follow `z = M a + c  ->  V_z = M V_a + c / N`, which conserves for the same
reason (T 3.12). Nothing here is fast, and nothing here knows a closed form that the compiler could get wrong too:
secants are divided differences in arithmetic of many digits, pools are explicit lists of positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

Cells = Literal["elements", "pixels"]
Index = Sequence[Sequence[int]]  # one list of input positions for every output position, along one dimension


@dataclass(frozen=True)
class Carried:
    """A tensor of neurons and, for each of them, its relevance map (T 3.9 to 3.12).

    Shapes: value [*S], maps [*S, N], share [N].
    share is where the unit of a constant goes: 1/N to every cell (T 3.7), or all of it to a column of its own.
    gate says that the value is a sigmoid's: in a product with a carried value it is a coefficient (method, products).
    """

    value: Tensor
    maps: Tensor
    share: Tensor
    gate: bool = False

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The N columns, each shaped like the value."""
        return self.maps.unbind(-1)

    def conservation(self) -> float:
        """The worst `|sum V - y| / sum|V|` over the neurons (T 3.12); 0 where map and value are both nothing."""
        error = (self.maps.sum(-1) - self.value).abs()
        size = self.maps.abs().sum(-1)
        return float(torch.where(error == 0, 0.0, error / size).max())


def sources(inputs: Sequence[Tensor], cells: Cells = "elements", ledger: bool = False) -> list[Carried]:
    """The maps of the input itself: each element lies in one cell, so V = x there and 0 elsewhere.

    A cell is an element of an input [1, ...] or, with the colour channels merged as in the thesis, a pixel of
    [1, C, H, W]. With `ledger` one more column takes every constant instead of 1/N of it going to each cell.
    """
    sizes = [x[0].numel() if cells == "elements" else x[0, 0].numel() for x in inputs]
    total = sum(sizes)
    share = F.one_hot(torch.tensor(total)).double() if ledger else torch.full((total,), 1 / total, dtype=torch.float64)
    carried = []
    for x, start in zip(inputs, itertools.accumulate(sizes, initial=0), strict=False):
        value = x.detach().double().clone()
        like = value[0] if cells == "elements" else value[0, 0]
        cell = (torch.arange(like.numel()).view(like.shape) + start).expand_as(value)
        carried.append(Carried(value, value[..., None] * F.one_hot(cell, len(share)), share))
    return carried


# The recursion --------------------------------------------------------------------------------------------------------


def affine(a: Carried, matrix: Callable[[Tensor], Tensor], constant: Tensor | float = 0.0) -> Carried:
    """z = M a + c  ->  V_z = M V_a + c/N, one column after the other (T 3.8; algorithm 1, lines 3 to 5)."""
    maps = torch.stack([matrix(column) for column in a.columns], -1)
    return add(Carried(matrix(a.value), maps, a.share), constant)


def fixed(x: Tensor | float | Carried, share: Tensor) -> Carried:
    """A constant carries its value on every cell, so that its map sums to it (T 3.7)."""
    if isinstance(x, Carried):
        return x
    value = torch.as_tensor(x, dtype=torch.float64)
    return Carried(value, value[..., None] * share, share)


def share_of(*operands: Any) -> Tensor:
    """The share of the first operand that carries maps."""
    return next(x.share for x in operands if isinstance(x, Carried))


def linear(a: Carried, weight: Tensor, bias: Tensor | None = None) -> Carried:
    """V_i = sum_j w_ij V_j + b_i/N (T 3.8; for the source it reads V_i = w_i * x + b_i/N, T 3.5)."""
    return affine(a, lambda v: v @ weight.T, 0.0 if bias is None else bias)


def per_channel(x: Tensor | None, dims: int) -> Tensor | float:
    """A vector [C] aligned with dimension 1 of [B, C, *spatial]."""
    return 0.0 if x is None else x.view(-1, *[1] * dims)


def conv(
    a: Carried,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Carried:
    """V_out = V_in * K for each cell (T 4.10, 4.11, algorithm 1), in one, two or three dimensions."""
    dims = weight.ndim - 2
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return affine(a, lambda v: run(v, weight, None, stride, padding, dilation, groups), per_channel(bias, dims))


def conv_transpose(
    a: Carried,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Carried:
    """A transposed convolution is linear in what it carries, exactly like T 4.10."""
    dims = weight.ndim - 2
    run = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    options = (stride, padding, output_padding, groups, dilation)
    return affine(a, lambda v: run(v, weight, None, *options), per_channel(bias, dims))


def batch_norm(
    a: Carried,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Carried:
    """M = gamma / sqrt(var + eps) per channel, c = beta - mean * M, in evaluation mode."""
    assert not training, "batch statistics are no constants"
    dims = a.value.ndim - 2
    gain = (1.0 if weight is None else weight) / (running_var + eps).sqrt()
    shift = (0.0 if bias is None else bias) - running_mean * gain
    return affine(a, lambda v: v * per_channel(gain, dims), per_channel(shift, dims))


def add(a: Any, b: Any, alpha: float = 1.0) -> Carried:
    """V = V_a + alpha V_b; a constant operand goes to every cell alike."""
    share = share_of(a, b)
    a, b = fixed(a, share), fixed(b, share)
    return Carried(a.value + alpha * b.value, a.maps + alpha * b.maps, share)


def sub(a: Any, b: Any, alpha: float = 1.0) -> Carried:
    """V = V_a - alpha V_b."""
    return add(a, b, alpha=-alpha)


def scale(a: Carried, factor: Tensor | float) -> Carried:
    """V = k V_a for a constant k."""
    factor = torch.as_tensor(factor, dtype=torch.float64)
    return Carried(a.value * factor, a.maps * factor[..., None], a.share)


def mul(a: Any, b: Any) -> Carried:
    """A product of two carried values gives each half of itself, V = b/2 V_a + a/2 V_b; of one and a gate, V = gate V_a."""
    if isinstance(a, Carried) and isinstance(b, Carried):
        if a.gate != b.gate:
            return scale(b, a.value) if a.gate else scale(a, b.value)
        return add(scale(a, b.value / 2), scale(b, a.value / 2))
    return scale(a, b) if isinstance(a, Carried) else scale(b, a)


def div(a: Any, b: Any) -> Carried:
    """V = V_a / b: the numerator is carried, the denominator is a coefficient at this input."""
    if not isinstance(a, Carried):
        raise NotImplementedError("a constant over a carried value: 1/z has no value at 0 to draw a secant from")
    return scale(a, 1 / torch.as_tensor(b.value if isinstance(b, Carried) else b, dtype=torch.float64))


def cat(tensors: Sequence[Any], dim: int = 0) -> Carried:
    """The maps are laid side by side like the values."""
    share = share_of(*tensors)
    parts = [fixed(x, share) for x in tensors]
    columns = zip(*(x.columns for x in parts), strict=True)
    return Carried(torch.cat([x.value for x in parts], dim), torch.stack([torch.cat(c, dim) for c in columns], -1), share)


def view(a: Carried, move: Callable[[Tensor], Any]) -> Any:
    """Reshape, permute, slice, ...: the neurons move, each with its map. Maps alias wherever values do."""
    value, maps = move(a.value), torch.vmap(move, in_dims=-1, out_dims=-1)(a.maps)
    if isinstance(value, Tensor):
        return Carried(value, maps, a.share)
    return tuple(Carried(v, m, a.share) for v, m in zip(value, maps, strict=True))


def pad(a: Carried, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Carried:
    """Copies are linear; a constant border is a constant."""
    if mode != "constant":
        return affine(a, lambda v: F.pad(v, list(widths), mode))
    border = F.pad(torch.zeros_like(a.value), list(widths), value=value or 0.0)
    return affine(a, lambda v: F.pad(v, list(widths)), border)


# Activations ----------------------------------------------------------------------------------------------------------


def _gelu(z: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return z / 2 * mpmath.erfc(-z / mpmath.sqrt(2))
    return z / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)))


def _selu(z: Any) -> Any:
    alpha, gain = mpmath.mpf("1.6732632423543772848170429916717"), mpmath.mpf("1.0507009873554804934193349852946")
    return gain * (z if z > 0 else alpha * mpmath.expm1(z))


def _softplus(z: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return z if beta * z > threshold else mpmath.log1p(mpmath.exp(beta * z)) / beta


def _clamp(z: Any, min: float | None = None, max: float | None = None) -> Any:
    z = z if min is None or z > min else mpmath.mpf(min)
    return z if max is None or z < max else mpmath.mpf(max)


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


def _hardtanh(z: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _clamp(z, min_val, max_val)


def _softshrink(z: Any, lambd: float = 0.5) -> Any:
    return z - lambd if z > lambd else z + lambd if z < -lambd else mpmath.mpf(0)


# By PyTorch's function names, with PyTorch's parameters in PyTorch's order; the definitions are those of its manual.
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda z: max(z, mpmath.mpf(0)),
    "relu6": lambda z: _clamp(z, 0, 6),
    "leaky_relu": lambda z, negative_slope=0.01: z if z > 0 else negative_slope * z,
    "threshold": lambda z, threshold, value: z if z > threshold else mpmath.mpf(value),
    "elu": lambda z, alpha=1.0: z if z > 0 else alpha * mpmath.expm1(z),
    "celu": lambda z, alpha=1.0: z if z > 0 else alpha * mpmath.expm1(z / alpha),
    "selu": _selu,
    "gelu": _gelu,
    "silu": lambda z: z * _sigmoid(z),
    "mish": lambda z: z * mpmath.tanh(_softplus(z, threshold=math.inf)),
    "hardswish": lambda z: z * _clamp(z + 3, 0, 6) / 6,
    "hardsigmoid": lambda z: _clamp(z + 3, 0, 6) / 6,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "softplus": _softplus,
    "softsign": lambda z: z / (1 + abs(z)),
    "tanh": mpmath.tanh,
    "sigmoid": _sigmoid,
    "logsigmoid": lambda z: -_softplus(-z, threshold=math.inf),
    "tanhshrink": lambda z: z - mpmath.tanh(z),
    "hardshrink": lambda z, lambd=0.5: z if abs(z) > lambd else mpmath.mpf(0),
    "softshrink": _softshrink,
    "exp": mpmath.exp,
    "expm1": mpmath.expm1,
    "log1p": mpmath.log1p,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "atan": mpmath.atan,
    "erf": mpmath.erf,
    "abs": abs,
    "square": lambda z: z * z,
    "pow": lambda z, exponent: z**exponent,
}


def torch_function(name: str) -> Callable[..., Tensor]:
    """PyTorch's own function of that name."""
    return getattr(torch, name, None) or getattr(F, name)


def slope_at_zero(name: str, *options: Any, **named: Any) -> float:
    """f'(0): the limit of the secants from both sides; where they differ, what PyTorch takes (0 for ReLU, as T 3.6)."""
    f = partial(ACTIVATIONS[name], **named)
    with mpmath.workdps(120):
        h = mpmath.mpf("1e-40")
        left, right = (float((f(s * h, *options) - f(mpmath.mpf(0), *options)) / (s * h)) for s in (-1, 1))
    if math.isclose(left, right, rel_tol=1e-14, abs_tol=1e-30):
        return (left + right) / 2 if abs(right) > 1e-30 else 0.0
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.inference_mode(False), torch.enable_grad():
        return float(torch.autograd.grad(torch_function(name)(zero, *options, **named), zero)[0])


def secant(name: str, z: float, *options: Any, **named: Any) -> float:
    """`(f(z) - f(0)) / z` with enough digits to survive the subtraction, however small z is; f'(0) at z = 0."""
    if z == 0:
        return slope_at_zero(name, *options, **named)
    f = partial(ACTIVATIONS[name], **named)
    with mpmath.workdps(40 + max(0, -math.frexp(z)[1])):
        exact = mpmath.mpf(z)
        return float((f(exact, *options) - f(mpmath.mpf(0), *options)) / exact)


def elementwise(a: Carried, name: str, *options: Any, **named: Any) -> Carried:
    """V_f = secant * V + f(0)/N. For ReLU it is V * |sgn(out)|, out = max(z, 0) (T 3.5, 3.6)."""

    def f(z: float) -> float:
        with mpmath.workdps(40):
            return float(ACTIVATIONS[name](mpmath.mpf(z), *options, **named))

    neurons = a.value.flatten().tolist()
    value = a.value.new_tensor([f(z) for z in neurons]).view_as(a.value)
    gain = a.value.new_tensor([secant(name, z, *options, **named) for z in neurons]).view_as(a.value)
    at_zero = fixed(f(0.0), a.share)
    return Carried(value, a.maps * gain[..., None] + at_zero.maps, a.share, gate=name in ("sigmoid", "hardsigmoid"))


def prelu(a: Carried, weight: Tensor) -> Carried:
    """The slope of each side of 0, per channel."""
    slope = weight if weight.numel() == 1 else per_channel(weight, a.value.ndim - 2)
    return scale(a, torch.where(a.value > 0, torch.ones_like(a.value), slope))


# Pooling: explicit lists of positions ---------------------------------------------------------------------------------


def spread(option: Any, dims: int) -> tuple[Any, ...]:
    """An option given once or once per dimension."""
    return tuple(option) if isinstance(option, (tuple, list)) else (option,) * dims


def window_positions(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Index:
    """For every output the positions it looks at, those in the padding included (T 4.6, 4.7 for the count).

    With ceil_mode a window has to start inside the input or its left padding, else PyTorch drops it.
    """
    steps = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return [[o * stride - padding + k * dilation for k in range(kernel)] for o in range(count)]


def adaptive_positions(size: int, count: int | None) -> Index:
    """Output o of n looks at the positions from floor(o size/n) to ceil((o+1) size/n)."""
    n = size if count is None else count
    return [list(range(o * size // n, -((-(o + 1) * size) // n))) for o in range(n)]


def windows(per_dim: Sequence[Index], sizes: Sequence[int]) -> Iterator[tuple[list[int], tuple[Sequence[int], ...]]]:
    """Each window over several dimensions: flat indices of its positions inside the input, and its raw positions."""
    for window in itertools.product(*per_dim):
        inside = [taps for taps in itertools.product(*window) if all(0 <= t < n for t, n in zip(taps, sizes, strict=True))]
        flat = [sum(t * math.prod(sizes[d + 1 :]) for d, t in enumerate(taps)) for taps in inside]
        yield flat, window


def pool_max(a: Carried, per_dim: Sequence[Index]) -> Carried:
    """The winner's map, the first one on ties."""
    dims = len(per_dim)
    value, maps = a.value.flatten(-dims), a.maps.flatten(-dims - 1, -2)
    values, chosen = [], []
    for flat, _ in windows(per_dim, a.value.shape[-dims:]):
        first = torch.from_numpy(value[..., flat].numpy().argmax(-1))  # numpy documents the first of equals
        winner = torch.tensor(flat)[first][..., None]
        values.append(value.gather(-1, winner))
        chosen.append(maps.gather(-2, winner[..., None].expand(*winner.shape, maps.shape[-1])))
    shape = [len(index) for index in per_dim]
    return Carried(torch.cat(values, -1).unflatten(-1, shape), torch.cat(chosen, -2).unflatten(-2, shape), a.share)


def pool_mean(a: Carried, per_dim: Sequence[Index], divisor: Callable[[tuple[Sequence[int], ...], int], int]) -> Carried:
    """The pool as a matrix of a fully connected layer (as T 4.9): 1/divisor at each position inside the input."""
    dims = len(per_dim)
    rows = []
    for flat, window in windows(per_dim, a.value.shape[-dims:]):
        row = torch.zeros(math.prod(a.value.shape[-dims:]), dtype=torch.float64)
        row[flat] = 1.0 / divisor(window, len(flat))
        rows.append(row)
    matrix, shape = torch.stack(rows), [len(index) for index in per_dim]
    return affine(a, lambda v: (v.flatten(-dims) @ matrix.T).unflatten(-1, shape))


def max_pool(
    dims: int,
    a: Carried,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Carried:
    """Max pooling over `dims` dimensions."""
    options = [spread(x, dims) for x in (kernel_size, stride or kernel_size, padding, dilation)]
    return pool_max(a, [window_positions(n, *o, ceil_mode) for n, *o in zip(a.value.shape[-dims:], *options, strict=True)])


def avg_pool(
    dims: int,
    a: Carried,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Carried:
    """Average pooling over `dims` dimensions; positions beyond the right padding are never counted."""
    sizes, pads = a.value.shape[-dims:], spread(padding, dims)
    options = zip(sizes, spread(kernel_size, dims), spread(stride or kernel_size, dims), pads, strict=True)

    def divisor(window: tuple[Sequence[int], ...], inside: int) -> int:
        padded = math.prod(sum(t < n + p for t in taps) for taps, n, p in zip(window, sizes, pads, strict=True))
        return divisor_override or (padded if count_include_pad else inside)

    return pool_mean(a, [window_positions(n, k, s, p, 1, ceil_mode) for n, k, s, p in options], divisor)


def adaptive_max_pool(dims: int, a: Carried, output_size: Any, return_indices: bool = False) -> Carried:
    """Max pooling to a given size."""
    return pool_max(a, [adaptive_positions(*o) for o in zip(a.value.shape[-dims:], spread(output_size, dims), strict=True)])


def adaptive_avg_pool(dims: int, a: Carried, output_size: Any) -> Carried:
    """Average pooling to a given size."""
    index = [adaptive_positions(*o) for o in zip(a.value.shape[-dims:], spread(output_size, dims), strict=True)]
    return pool_mean(a, index, lambda window, inside: inside)


def amax(a: Carried, dim: int, keepdim: bool = False) -> Carried:
    """The largest along one dimension, the first one on ties."""
    last = view(a, lambda v: v.movedim(dim, -1))
    best = pool_max(last, [[list(range(last.value.shape[-1]))]])
    return view(best, lambda v: v.movedim(-1, dim) if keepdim else v.squeeze(-1))
