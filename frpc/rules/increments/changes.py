"""Increments of functions of several numbers: of two, of many factors, of what is written to one place.

Of two numbers one changes after the other, in both orders, and the two accounts are averaged: for products and quotients these
are the forms of :mod:`frpc.rules.increments.increments`. A product of n factors is a polynomial on the straight way from the
reference, whose derivatives have an exact average: Gauss and Legendre's, at (n + 1)/2 points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frpc.core.torch_compat import schema_of
from frpc.errors import RuleDeclinedError
from frpc.maps import LinearMap, scaled
from frpc.rules.forms.factors import along, others, others_so_far, so_far
from frpc.rules.forms.norms import weighed_sum
from frpc.rules.forms.places import placed, shares
from frpc.rules.forms.selection import corner
from frpc.rules.increments.paths import Path, derivative, secant
from frpc.rules.table import Affine, Call, Operand

__all__ = ["cumulative_product", "of_two", "product", "reduced"]

aten = torch.ops.aten
MOST_FACTORS = 128


# Two numbers ------------------------------------------------------------------------------------------------------------


def of_two(call: Call, path: Path) -> Affine:
    """A function of the elements of two operands, each of which may be stretched to the result's shape."""
    names = [str(argument.name) for argument in schema_of(call.op).arguments[:2]]
    here = [_stretched(call, call.args[name]) for name in names]
    there = here if call.reference is None else [_stretched(call, call.reference.args[name]) for name in names]

    def function(u: Tensor, v: Tensor) -> Tensor:
        given = {name: x for name, x in zip(names, (u, v), strict=True) if isinstance(call.args[name], Tensor)}
        result: Tensor = call.op(**{**call.args, **given})
        return result

    slopes = _slopes(call, path, function, here, there)
    terms: dict[Operand, LinearMap] = {
        name: scaled(slope, call.args[name].shape, call.value.shape)
        for name, slope in zip(names, slopes, strict=True)
        if call.carries(name)
    }
    return Affine(terms)


def _stretched(call: Call, value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=call.value.dtype, device=call.value.device).expand_as(call.value)


def _slopes(
    call: Call, path: Path, function: Callable[[Tensor, Tensor], Tensor], here: list[Tensor], there: list[Tensor]
) -> list[Tensor]:
    (a, b), (r, s) = here, there
    carried = [call.carries(str(argument.name)) for argument in schema_of(call.op).arguments[:2]]

    def by_first(u: Tensor, v: Tensor) -> Tensor:
        return _number(derivative(lambda x: function(x, v), u)) if carried[0] else torch.zeros_like(u)

    def by_second(u: Tensor, v: Tensor) -> Tensor:
        return _number(derivative(lambda x: function(u, x), v)) if carried[1] else torch.zeros_like(v)

    if call.reference is None or path.steps is not None:
        times = [1.0] if call.reference is None or path.steps is None else [k / path.steps for k in range(1, path.steps + 1)]
        points = [(r + t * (a - r), s + t * (b - s)) for t in times] if call.reference is not None else [(a, b)]
        return [
            sum((by_first(u, v) for u, v in points), torch.zeros_like(a)) / len(points),
            sum((by_second(u, v) for u, v in points), torch.zeros_like(b)) / len(points),
        ]
    one, other = function(a, s), function(r, b)  # where the two ways turn
    start, end = call.reference.value.expand_as(call.value), call.value
    finite = torch.isfinite(one), torch.isfinite(other)
    weight = torch.where(finite[0] & finite[1], 0.5, finite[0].to(a.dtype))  # a way through infinity is not taken
    slopes = []
    if carried[0]:
        first, last = secant(lambda x: function(x, s), a, r, one - start), secant(lambda x: function(x, b), a, r, end - other)
        slopes.append(_mixed(weight, first, last))
    else:
        slopes.append(torch.zeros_like(a))
    if carried[1]:
        last, first = secant(lambda x: function(a, x), b, s, end - one), secant(lambda x: function(r, x), b, s, other - start)
        slopes.append(_mixed(weight, last, first))
    else:
        slopes.append(torch.zeros_like(b))
    return slopes


def _mixed(weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * first) + torch.where(weight == 1, 0.0, (1.0 - weight) * second)


def _number(slope: Tensor) -> Tensor:
    """Of a distance PyTorch's derivative is 0/0 where both numbers are 0."""
    return torch.where(torch.isnan(slope), 0.0, slope)


# Many factors -----------------------------------------------------------------------------------------------------------


def _averaged(call: Call, path: Path, count: int, at: Callable[..., Tensor], *names: str) -> Tensor:
    """The average of coefficients that are polynomials of degree ``count - 1`` on the way from the reference."""
    here = [call.args[name] for name in names]
    if call.reference is None:
        return at(*here)
    there = [call.reference.args[name] for name in names]
    if path.steps is not None:
        nodes = [(k / path.steps, 1.0 / path.steps) for k in range(1, path.steps + 1)]
    elif count > MOST_FACTORS:
        raise RuleDeclinedError(f"there is no exact average for {count} factors: give steps, LID(steps=10)")
    else:
        times, weights = np.polynomial.legendre.leggauss((count + 1) // 2)
        nodes = [(0.5 * (1.0 + float(t)), 0.5 * float(w)) for t, w in zip(times, weights, strict=True)]
    parts = [at(*(r + t * (a - r) for a, r in zip(here, there, strict=True))) * w for t, w in nodes]
    return sum(parts[1:], parts[0])


def product(call: Call, path: Path) -> Affine:
    """The product of the other factors, averaged."""
    dim = along(call, call.args["self"])
    coefficient = _averaged(call, path, call.args["self"].shape[dim], lambda a: others(a, dim), "self")
    return Affine({"self": weighed_sum(call, coefficient, [dim], call.args["keepdim"])})


def cumulative_product(call: Call, path: Path) -> Affine:
    """The products of the other factors so far, averaged."""
    dim = along(call, call.args["self"])
    matrix = _averaged(call, path, call.args["self"].shape[dim], lambda a: others_so_far(a, dim), "self")
    return Affine({"self": so_far(call.args["self"], matrix, dim)})


# What is written to one place -------------------------------------------------------------------------------------------


def reduced(call: Call, path: Path) -> Affine:
    """Sums and means are linear; of extremes, the winners at both ends share as in a max pool; products as above."""
    a, b, how = call.args["self"], call.args["src"], call.args["reduce"]
    count = call.args["index"].shape[call.args["dim"]] + 1
    if how in ("amax", "amin") and call.reference is not None and path.steps is None:
        r, s = call.reference.args["self"].expand_as(a), call.reference.args["src"].expand_as(b)
        last, first = shares(call, a, b), shares(call, r, s)
        gained = _distance(call.value, _value(call, first, a, b))
        ahead = _distance(_at(call, r, s), _value(call, last, r, s))
        share = torch.where(gained + ahead == 0, 1.0, gained / (gained + ahead + torch.finfo(a.dtype).tiny))
        each = share.gather(call.args["dim"], call.args["index"])
        on_a, on_b = share * last[0] + (1.0 - share) * first[0], each * last[1] + (1.0 - each) * first[1]
    else:
        even = call.reference is None
        on_a = _averaged(call, path, count, lambda x, y: shares(call, x, y, even)[0], "self", "src")
        on_b = _averaged(call, path, count, lambda x, y: shares(call, x, y, even)[1], "self", "src")
    return Affine({name: m for name, m in placed(call, on_a, on_b).items() if call.carries(name)})


def _value(call: Call, coefficients: tuple[Tensor, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The elements that are taken; of infinite ones that are not, nothing is left."""
    on_a, on_b = coefficients
    index = call.args["index"]
    kept, written = torch.where(on_a == 0, 0.0, a * on_a), torch.where(on_b == 0, 0.0, corner(b, index.shape) * on_b)
    return kept.scatter_add(call.args["dim"], index, written)


def _distance(z: Tensor, other: Tensor) -> Tensor:
    return torch.where(z == other, 0.0, (z - other).abs())


def _at(call: Call, a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = call.op(**{**call.args, "self": a, "src": b})
    return result
