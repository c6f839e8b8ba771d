"""Elementwise operators and what they ought to compute, one line for each; the tests of secants run them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mpmath
import torch
from torch import Tensor
from torch._ops import OpOverload

from case import aten
from reference_operators import ACTIVATIONS

__all__ = ["CURVES", "Curve"]


@dataclass(frozen=True)
class Curve:
    """An elementwise operator and what it ought to compute.

    Attributes:
        op: the row of the rule table.
        exact: the function in arithmetic of many digits.
        arguments, named: of the operator, after the operand.
        low, high: the function is defined in between, both excluded.
        whole: it has no value at 0 to subtract, so that all of the result is carried.
    """

    op: OpOverload
    exact: Callable[[Any], Any]
    arguments: tuple[Any, ...] = ()
    low: float = -float("inf")
    high: float = float("inf")
    whole: bool = False
    named: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        name = str(self.op).removeprefix("aten.").removesuffix(".default")
        values = [x if not isinstance(x, Tensor) else x.item() for x in (*self.arguments, *self.named.values())]
        return " ".join(map(str, (name, *values)))


def known(name: str, **options: Any) -> Callable[[Any], Any]:
    """A function of `reference_operators.py`."""
    return partial(ACTIVATIONS[name], **options)


SLOPE = torch.tensor([0.25])

# fmt: off
CURVES: tuple[Curve, ...] = (
    Curve(aten.relu.default, known("relu")),
    Curve(aten.prelu.default, known("leaky_relu", negative_slope=0.25), (SLOPE,)),
    Curve(aten._prelu_kernel.default, known("leaky_relu", negative_slope=0.25), (SLOPE,)),
    Curve(aten.log_sigmoid_forward.default, known("logsigmoid")),
    Curve(aten.relu6.default, known("relu6")),
    Curve(aten.hardtanh.default, known("hardtanh")),
    Curve(aten.hardtanh.default, known("hardtanh", min_val=0.25, max_val=2.0), (0.25, 2.0)),
    Curve(aten.clamp.default, known("clamp", min=-0.5, max=0.75), (-0.5, 0.75)),
    Curve(aten.clamp.default, known("clamp", min=0.0), (0.0,)),
    Curve(aten.clamp.default, known("clamp", max=0.0), (None, 0.0)),
    Curve(aten.clamp.default, known("clamp", min=-4.0, max=-0.5), (-4.0, -0.5)),
    Curve(aten.clamp_min.default, known("clamp", min=0.25), (0.25,)),
    Curve(aten.clamp_min.default, known("clamp", min=-0.25), (-0.25,)),
    Curve(aten.clamp_max.default, known("clamp", max=-0.25), (-0.25,)),
    Curve(aten.clamp_max.default, known("clamp", max=0.25), (0.25,)),
    Curve(aten.leaky_relu.default, known("leaky_relu", negative_slope=0.125), (0.125,)),
    Curve(aten.elu.default, known("elu")),
    Curve(aten.elu.default, lambda z: 2 * z if z > 0 else mpmath.expm1(4 * z), (0.5, 2.0, 4.0)),
    Curve(aten.celu.default, known("celu", alpha=0.5), (0.5,)),
    Curve(aten.selu.default, known("selu")),
    Curve(aten.gelu.default, known("gelu")),
    Curve(aten.gelu.default, known("gelu", approximate="tanh"), named={"approximate": "tanh"}),
    Curve(aten.silu.default, known("silu")),
    Curve(aten.mish.default, known("mish")),
    Curve(aten.hardswish.default, known("hardswish")),
    Curve(aten.sigmoid.default, known("sigmoid")),
    Curve(aten.hardsigmoid.default, known("hardsigmoid")),
    Curve(aten.tanh.default, known("tanh")),
    Curve(aten.softplus.default, known("softplus")),
    Curve(aten.softplus.default, known("softplus", beta=0.5, threshold=2.0), (0.5, 2.0)),
    Curve(aten.softplus.default, known("softplus", beta=2.0, threshold=100.0), (2.0, 100.0)),
    Curve(aten.softplus.default, known("softplus", beta=-1.0), (-1.0,)),
    Curve(aten.softplus.default, known("softplus", beta=2.0, threshold=-1.0), (2.0, -1.0)),
    Curve(aten.softshrink.default, known("softshrink")),
    Curve(aten.hardshrink.default, known("hardshrink")),
    Curve(aten.threshold.default, known("threshold", threshold=0.5, value=2.0), (0.5, 2.0)),
    Curve(aten.threshold.default, known("threshold", threshold=-0.5, value=2.0), (-0.5, 2.0)),
    Curve(aten.threshold.default, known("threshold", threshold=0.0, value=0.0), (0.0, 0.0)),
    Curve(aten.exp.default, known("exp")),
    Curve(aten.expm1.default, known("expm1")),
    Curve(aten.log1p.default, known("log1p"), low=-1.0),
    Curve(aten.sin.default, known("sin")),
    Curve(aten.cos.default, known("cos")),
    Curve(aten.tan.default, mpmath.tan),
    Curve(aten.atan.default, known("atan")),
    Curve(aten.erf.default, known("erf")),
    Curve(aten.abs.default, known("abs")),
    Curve(aten.neg.default, lambda z: -z),
    Curve(aten.square.default, known("square")),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**3, (3,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**2, (2.0,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z, (1,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: mpmath.mpf(1), (0,)),
    Curve(aten.pow.Tensor_Scalar, lambda z: z**1.5, (1.5,), low=0.0),
    Curve(aten.pow.Tensor_Scalar, lambda z: 1 / z, (-1,), low=0.0, whole=True),
    Curve(aten.sqrt.default, mpmath.sqrt, low=0.0, whole=True),
    Curve(aten.rsqrt.default, lambda z: 1 / mpmath.sqrt(z), low=0.0, whole=True),
    Curve(aten.reciprocal.default, lambda z: 1 / z, low=0.0, whole=True),
    Curve(aten.reciprocal.default, lambda z: 1 / z, high=0.0, whole=True),
    Curve(aten.log.default, mpmath.log, low=0.0, whole=True),
    Curve(aten.erfc.default, mpmath.erfc),
    Curve(aten.exp2.default, lambda z: mpmath.mpf(2) ** z),
    Curve(aten.sinh.default, mpmath.sinh),
    Curve(aten.cosh.default, mpmath.cosh),
    Curve(aten.asinh.default, mpmath.asinh),
    Curve(aten.atanh.default, mpmath.atanh, low=-1.0, high=1.0),
    Curve(aten.asin.default, mpmath.asin, low=-1.0, high=1.0),
    Curve(aten.acos.default, mpmath.acos, low=-1.0, high=1.0),
    Curve(aten.rad2deg.default, mpmath.degrees),
    Curve(aten.deg2rad.default, mpmath.radians),
    Curve(aten.log2.default, lambda z: mpmath.log(z, 2), low=0.0, whole=True),
    Curve(aten.log10.default, mpmath.log10, low=0.0, whole=True),
    Curve(aten.logit.default, lambda z: mpmath.log(z / (1 - z)), low=0.0, high=1.0, whole=True),
    Curve(aten.acosh.default, mpmath.acosh, low=1.0, whole=True),
    Curve(aten.sinc.default, lambda z: mpmath.sincpi(z)),
    Curve(aten.erfinv.default, mpmath.erfinv, low=-1.0, high=1.0),
    Curve(aten.special_erfcx.default, lambda z: mpmath.exp(z * z) * mpmath.erfc(z), high=20.0),
    Curve(aten.special_log_ndtr.default, lambda z: mpmath.log(mpmath.erfc(-z / mpmath.sqrt(2)) / 2), low=-20.0),
    Curve(aten.i0.default, lambda z: mpmath.besseli(0, z)),
    Curve(aten.special_i0e.default, lambda z: mpmath.exp(-abs(z)) * mpmath.besseli(0, z)),
    Curve(aten.special_i1.default, lambda z: mpmath.besseli(1, z)),
    Curve(aten.special_i1e.default, lambda z: mpmath.exp(-abs(z)) * mpmath.besseli(1, z)),
    Curve(aten.special_entr.default, lambda z: -z * mpmath.log(z), low=0.0, whole=True),
    Curve(aten.lgamma.default, mpmath.loggamma, low=0.0, whole=True),
    Curve(aten.digamma.default, mpmath.digamma, low=0.0, whole=True),
    Curve(aten.mvlgamma.default, lambda z: mpmath.log(mpmath.pi) / 2 + mpmath.loggamma(z) + mpmath.loggamma(z - 0.5), (2,),
          low=0.6, whole=True),
    Curve(aten.special_ndtri.default, lambda z: mpmath.sqrt(2) * mpmath.erfinv(2 * z - 1), low=0.0, high=1.0, whole=True),
    Curve(aten.round.default, mpmath.nint),
    Curve(aten.round.decimals, mpmath.nint, named={"decimals": 0}),
    Curve(aten.trunc.default, lambda z: mpmath.sign(z) * mpmath.floor(abs(z))),
    Curve(aten.frac.default, lambda z: z - mpmath.sign(z) * mpmath.floor(abs(z))),
    Curve(aten.fmod.Scalar, lambda z: z - mpmath.sign(z) * mpmath.floor(abs(z) / 0.75) * 0.75, (0.75,)),
)
# fmt: on
