"""Fourier transforms, complex numbers as pairs, and the length and the angle of a pair.

A canonical graph holds complex numbers only inside a transform: what goes in is put together from its parts by ``complex``, what
comes out is taken apart by ``view_as_real`` (:mod:`frpc.canonicalize.complex.pairs`). All of these are linear maps on pairs of
real numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frpc.core.traits import always
from frpc.maps import LinearMap, scaled
from frpc.maps.spectral import AsReal, Fourier, FromPart, HalfFourier, RealFourier
from frpc.rules.functions.arithmetic import from_end, refuse_batch
from frpc.rules.functions.quotients import over
from frpc.rules.table import Affine, Call, Operand, rule

aten = torch.ops.aten
_LINEAR: dict[str, Any] = {"source": "method §2: linear, on pairs", "linear": True, "complex": True, "in_file": "constants"}


@rule(aten.complex.default, carries=("real", "imag"), formula="a as real part, b as imaginary part", **_LINEAR)
def joined(call: Call, real: Tensor, imag: Tensor) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    for part, name in enumerate(("real", "imag")):
        if call.carries(name):
            terms[name] = FromPart(part, call.args[name].shape)
    if len(terms) == 2:
        return Affine(terms)
    nothing = torch.zeros_like(real)
    return Affine(terms, aten.complex(nothing, imag) if "real" in terms else aten.complex(real, nothing))


@rule(aten.view_as_real.default, formula="(re a, im a)", **_LINEAR)
def parts(call: Call, a: Tensor) -> Affine:
    return Affine({"self": AsReal(a.shape)})


@rule(aten._fft_c2c.default, formula="F a", **_LINEAR)
def fft(call: Call, a: Tensor, dim: Sequence[int], norm: int, forward: bool) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    return Affine({"self": Fourier(dims, norm, forward, a.shape, call.value.shape)})


@rule(aten._fft_r2c.default, formula="F a", **_LINEAR)
def rfft(call: Call, a: Tensor, dim: Sequence[int], norm: int, onesided: bool) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    return Affine({"self": RealFourier(dims, norm, onesided, a.shape, call.value.shape)})


@rule(aten._fft_c2r.default, formula="F^-1 a, real", **_LINEAR)
def irfft(call: Call, a: Tensor, dim: Sequence[int], norm: int, size: int) -> Affine:
    dims = from_end(dim, a.dim())
    refuse_batch(a, dims)
    return Affine({"self": HalfFourier(dims, norm, a.shape, call.value.shape)})


@rule(
    aten.hypot.default,
    carries=("self", "other"),
    formula="a/|z| on a, b/|z| on b, |z| the length of (a, b); 0 at 0",
    source="method §2: norms",
    pointwise=True,
    gate=True,
    nonnegative=always,
    in_file="constants",
)
def length(call: Call, a: Tensor, b: Tensor) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    constant: Tensor | None = None
    for name, part in (("self", a), ("other", b)):
        share = over(part, call.value)  # Euler: |z| = a d|z|/da + b d|z|/db
        if call.carries(name):
            terms[name] = scaled(share, part.shape, call.value.shape)
        else:
            constant = share * part
    return Affine(terms, constant)


@rule(
    aten.atan2.default,
    carries=("self", "other"),
    formula="b/|z|^2 on a, -a/|z|^2 on b, |z| the length of (a, b); c = the angle",
    source="method §2: along the way to 0 an angle stays, so that M z = 0",
    pointwise=True,
    in_file="constants",
)
def angle(call: Call, a: Tensor, b: Tensor) -> Affine:
    terms: dict[Operand, LinearMap] = {}
    constant = call.value
    for name, part, slope in (("self", a, turn(a, b)[0]), ("other", b, turn(a, b)[1])):
        if call.carries(name):
            terms[name] = scaled(slope, part.shape, call.value.shape)
            constant = constant - slope * part
    return Affine(terms, constant)


def turn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of ``atan2(a, b)``, ``b / |z|^2`` and ``-a / |z|^2``; 0 at 0, as PyTorch has it for complex numbers."""
    size = torch.hypot(a, b)
    return over(over(b, size), size), -over(over(a, size), size)
