"""Rule sets of derivatives: gradients and what changes their transposed pass, increments from a reference (LID, DeepLIFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from frpc.errors import OptionError
from frpc.rules.increments.increments import increment_rule
from frpc.rules.increments.paths import Path, Pooling
from frpc.rules.lrp.rectified import deconvnet_relu, guided_relu, rectified_relu, rectifying_rule
from frpc.rules.references import Reference, ReferenceLike, as_reference
from frpc.rules.sets.ruleset import Account, RuleSet, Site
from frpc.rules.table import Rule

aten = torch.ops.aten

__all__ = ["LID", "Deconvnet", "DeepLift", "Gradient", "GuidedBackprop", "LIDTaylor", "LRPTaylor", "RectifiedGradient"]


# Gradients ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient(RuleSet):
    """The Jacobian: ``x * dy/dx``, or only ``dy/dx``. Nothing is conserved; the difference to y is returned as ``bias``.

    Args:
        times_input: multiply the gradient by the input.

    Exact when: always; the gradient is PyTorch's own, by the chain rule over the operators of the graph.

    Source: Simonyan et al. 2014; Shrikumar et al. 2016 (input times gradient); S 2.1.2.1.
    """

    times_input: bool = True

    @property
    def account(self) -> Account:
        gives: Literal["relevance", "multiplier"] = "relevance" if self.times_input else "multiplier"
        return Account(gives=gives, spelled_out=True, gradients=True, conserves="nothing")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's Jacobian."""
        return increment_rule(site.op, Path())


@dataclass(frozen=True)
class GuidedBackprop(Gradient):
    """Gradients, of which every ReLU (ReLU6, a ``clamp`` from 0) passes only the positive part; without ReLUs, the gradient.

    Transposed direction only.

    Source: Springenberg et al. 2015; S 2.1.2.2.
    """

    times_input: bool = False

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, at ReLUs the guided one."""
        return rectifying_rule(site.op, guided_relu, "v [z > 0] [v > 0]", "Springenberg et al. 2015") or super().rule_for(site)


@dataclass(frozen=True)
class Deconvnet(Gradient):
    """Gradients, but every ReLU rectifies the pulled value itself. Transposed direction only.

    Source: Zeiler & Fergus 2014; S 9-11.
    """

    times_input: bool = False

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, or at ReLUs the rectification of the pulled value."""
        return rectifying_rule(site.op, deconvnet_relu, "v [v > 0]", "Zeiler & Fergus 2014; S 9-11") or super().rule_for(site)


@dataclass(frozen=True)
class RectifiedGradient(Gradient):
    """Gradients that pass a ReLU only where activation times gradient is among the largest of the layer.

    Args:
        q: the part of each layer that is held back, 0.98 in the paper.

    Raises:
        OptionError: for a q outside [0, 1).

    Source: Kim et al. 2019.
    """

    q: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.q < 1:
            raise OptionError(f"q={self.q}: the fraction to set to 0 must be in [0, 1).")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the Jacobian, at ReLUs the one with a threshold."""
        return rectifying_rule(site.op, rectified_relu(self.q), "v [z v > quantile]", "Kim et al. 2019") or super().rule_for(site)


# Increments ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LID(RuleSet):
    """Layer-wise increment decomposition: ``R(Y) = (Y - Y_ref) * G``, G the Jacobians averaged from the reference to the input.

    Args:
        reference: what the input is compared with: ``"zero"``, ``"blur"``, a tensor like one sample, or several, to be averaged.
        steps: None for the exact average (a secant for functions of one number, halves for products), or the paper's n points.
        pooling: how max pools average, see :class:`~frpc.rules.increments.paths.Path`.

    Shapes: reference ``[1, ...]`` or ``[R, ...]`` like the input.

    Exact when: ``steps=None``: relevance sums to ``f(x) - f(x_ref)`` at every layer.

    Raises:
        OptionError: for a reference that is none, or less than one step.

    Source: LID paper, eqs. 15, 19-23 (LID-IG); beyond it for products, norms, softmax and attention.
    """

    reference: ReferenceLike | Reference = "zero"
    steps: int | None = None
    pooling: Pooling = "ends"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise OptionError(f"steps={self.steps}: give at least one point, or None for the exact average.")
        object.__setattr__(self, "reference", as_reference(self.reference))

    @property
    def account(self) -> Account:
        assert isinstance(self.reference, Reference)
        return Account(
            reference=self.reference, from_reference=True, spelled_out=True, conserves="f(x) - f(x_ref), at every layer"
        )

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's averaged Jacobian."""
        return increment_rule(site.op, Path(self.steps, self.pooling))


@dataclass(frozen=True)
class DeepLift(LID):
    """DeepLIFT with the rescale rule: the multiplier of a function of one number is ``dz / dy``.

    The same as :class:`LID` with the exact average; max pools give to the winners at both ends.

    Source: Shrikumar et al. 2017, rescale rule; L 6, 7.
    """


@dataclass(frozen=True)
class LIDTaylor(LID):
    """``R(Y) = (Y - Y_ref) * G`` with the Jacobians at the input alone: gradient times increment.

    Exact when: the net is linear from the reference to the input.

    Source: LID paper, eqs. 15-17.
    """

    @property
    def account(self) -> Account:
        assert isinstance(self.reference, Reference)
        return Account(reference=self.reference, spelled_out=True, conserves="f(x) - f(x_ref) to first order")

    def rule_for(self, site: Site) -> Rule | None:
        """Returns the operator's Jacobian at the input."""
        return increment_rule(site.op, Path())


@dataclass(frozen=True)
class LRPTaylor(Gradient):
    """``R(Y) = Y * G`` with the Jacobians at the input: LID-Taylor without increments, the same as input times gradient.

    Source: LID paper, eq. 18.
    """
