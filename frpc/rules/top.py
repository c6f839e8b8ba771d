"""Where relevance starts: the multiplier of the output, before anything is pulled back.

A *top* turns a target into the multiplier ``G`` of the logits. The relevance of logit i is then ``G_i (z_i - z_ref,i)``, with a
reference of 0 in rule sets that have none. For a target class c the seed ``w`` is 1 at c and 0 elsewhere; every formula is
linear in w or goes through ``P_w = <w, softmax(z)>``, so any other functional works too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from frpc.errors import OptionError, nearest

__all__ = [
    "TOPS",
    "Contrastive",
    "Logit",
    "Probability",
    "SoftmaxGradient",
    "SoftmaxIntegrated",
    "SoftmaxTaylor",
    "Top",
    "as_top",
]


@dataclass(frozen=True)
class Top:
    """Base of all tops.

    Attributes:
        formula: relevance of the logits, in text.
        source: paper and equation.
    """

    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        """Returns the multiplier of the logits.

        Shapes: seed ``[*K, B, *O]``, output ``[B, *O]``, reference like the output or with a batch of 1; returns the seed's.
        Classes are along dimension 1 of the output, or along the last one if it has three dimensions (tokens).
        """
        raise TypeError(f"{type(self).__name__} says nothing of the output")


def _classes(output: Tensor) -> int:
    """The dimension of the classes, counted from the end: ``[B, C]``, ``[B, T, C]``, ``[B, C, H, W]``."""
    return 1 - output.dim() if output.dim() > 3 else -1


def _increment(output: Tensor, reference: Tensor | None) -> Tensor:
    return output if reference is None else output - reference


def _per_unit(relevance: Tensor, output: Tensor) -> Tensor:
    """``R / z``: the multiplier that gives a certain relevance.

    The divisor is kept away from 0 (sgn 0 = +1) by a millionth of the largest logit, in float64 by 1e-12 of it.
    """
    share = 1e-12 if output.dtype == torch.float64 else 1e-6
    small = share * output.abs().amax(_classes(output), keepdim=True) + torch.finfo(output.dtype).tiny
    return relevance / (output + torch.where(output >= 0, small, -small))


def _slope(seed: Tensor, logits: Tensor) -> Tensor:
    """``dP_w/dz_i = P_i (w_i - P_w)``."""
    dim = _classes(logits)
    p = torch.softmax(logits, dim)
    return p * (seed - (seed * p).sum(dim, keepdim=True))


@dataclass(frozen=True)
class Logit(Top):
    """The score itself: ``R_i = w_i z_i``, of increments ``w_i dz_i``.

    Source: S 24; LID paper, table 2.
    """

    formula: ClassVar[str] = "w z"
    source: ClassVar[str] = "S 24; L table 2"

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        return seed


@dataclass(frozen=True)
class Probability(Top):
    """The class's probability, all of it on its own logit: ``R_i = w_i P_i``. The map is the logit's, scaled to sum to P.

    Source: the start that LRP libraries take for a classifier that ends in a softmax.
    """

    formula: ClassVar[str] = "w P"
    source: ClassVar[str] = "LRP practice"

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        p = torch.softmax(output, _classes(output))
        return _per_unit(seed * p, _increment(output, reference))


@dataclass(frozen=True)
class Contrastive(Top):
    """The target against all others: ``R_c = z_c``, ``R_i = -z_c / (n - 1)`` for the n - 1 other classes; sums to 0.

    Source: contrastive LRP, S 25.
    """

    formula: ClassVar[str] = "z_c on c, -z_c/(n-1) on the others"
    source: ClassVar[str] = "S 25"

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        dim = _classes(output)
        increment = _increment(output, reference)
        score = (seed * increment).sum(dim, keepdim=True)
        others = seed.sum(dim, keepdim=True) - seed
        return _per_unit(seed * score - others * score / (output.shape[dim] - 1), increment)


@dataclass(frozen=True)
class SoftmaxGradient(Top):
    """SG: the gradient of the probability as relevance, ``R_i = dP_c/dz_i``; close to 0 if the model is confident.

    Source: SGLRP, S 26; L 10.
    """

    formula: ClassVar[str] = "dP/dz"
    source: ClassVar[str] = "S 26; L 10"

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        return _per_unit(_slope(seed, output), _increment(output, reference))


@dataclass(frozen=True)
class SoftmaxTaylor(Top):
    """ST: ``R_i = dP_c/dz_i dz_i``, the first-order approximation of the probability.

    Source: LID paper, section 3.1.
    """

    formula: ClassVar[str] = "dP/dz dz"
    source: ClassVar[str] = "L 3.1"

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        return _slope(seed, output)


@dataclass(frozen=True)
class SoftmaxIntegrated(Top):
    """SIG: the slope averaged over the path from the reference logits, times dz; sums to ``P_c(z) - P_c(z_ref)``.

    Args:
        steps: points ``z_ref + k/n dz``, k = 1..n, as in the paper.

    Exact when: ``steps`` is large; the error falls as 1/steps.

    Source: LID paper, section 3.3, algorithm 1.
    """

    steps: int = 10
    formula: ClassVar[str] = "mean dP/dz over z_ref -> z, times dz"
    source: ClassVar[str] = "L 3.3, 24"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps={self.steps}: the path needs at least one point.")

    def __call__(self, seed: Tensor, output: Tensor, reference: Tensor | None) -> Tensor:
        start = torch.zeros_like(output) if reference is None else reference
        increment = output - start
        total: Any = 0.0
        for k in range(1, self.steps + 1):
            total = total + _slope(seed, start + increment * (k / self.steps))
        return total / self.steps


TOPS: dict[str, Top] = {
    "logit": Logit(),
    "probability": Probability(),
    "contrastive": Contrastive(),
    "softmax_gradient": SoftmaxGradient(),
    "softmax_taylor": SoftmaxTaylor(),
    "softmax_integrated": SoftmaxIntegrated(),
}


def as_top(name: str | Top) -> Top:
    """Returns the top of that name.

    Raises:
        OptionError: for another name; gives the nearest.
    """
    if isinstance(name, Top):
        return name
    if name not in TOPS:
        raise OptionError(f"seed={name!r} is unknown; {nearest(name, list(TOPS))}, or give a tensor like the output.")
    return TOPS[name]
