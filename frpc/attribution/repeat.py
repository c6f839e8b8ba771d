"""Methods that repeat the transposed pass: integrated gradients, SmoothGrad, expected gradients.

Each is an average of gradients at points around the input or on the way to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from frpc.attribution.passes import MEMORY_LIMIT, Asked, Make, Score, ask, start_of
from frpc.driver.targets import Target
from frpc.errors import OptionError
from frpc.explainer.explainer import Explainer
from frpc.rules.references import Reference, ReferenceLike, as_reference

__all__ = ["Repeated", "expected_gradients", "integrated_gradients", "smoothgrad"]


@dataclass(frozen=True, eq=False)
class Repeated:
    """An average of gradients; unpacks as ``output, relevance``.

    Attributes:
        output: the model's output at the input, ``[B, ...]``.
        relevance: like the input, or ``[B, K, ...]`` for K targets.
        delta: what completeness lacks, ``sum R - (f(x) - f(x_ref))``, ``[B]`` or ``[B, K]``; None where nothing is promised.
        passes: transposed passes for each sample.
        internal_batch_size: how many points ran at one time.
    """

    output: Tensor
    relevance: Tensor
    delta: Tensor | None
    passes: int
    internal_batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.relevance))


def integrated_gradients(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    reference: ReferenceLike | Reference = "zero",
    steps: int = 50,
    quadrature: str = "gausslegendre",
    of: Score | None = None,
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Repeated:
    """``R = (x - x_ref) * integral of df/dx(x_ref + a (x - x_ref)) over a in [0, 1]``.

    Args:
        explainer: a model, or an explainer compiled with gradient rules.
        x, target, seed: as for calling an explainer.
        reference: where the path begins: ``"zero"``, ``"blur"`` or one tensor like a sample.
        steps: points on the path.
        quadrature: ``"gausslegendre"``, ``"midpoint"``, ``"trapezoid"``, or the paper's ``"right"``.
        of: ``"logit"``, or ``"probability"`` for the softmax of it; what the explainer starts from by default.
        internal_batch_size: points that run at one time; by default as many as ``memory_limit`` bytes hold.
        memory_limit: see there.
        progress: show a progress bar.

    Shapes: ``x [B, ...]``, relevance alike or ``[B, K, ...]``.

    Exact when: the sum is ``f(x) - f(x_ref)`` as steps grow; ``delta`` is what lacks.

    Raises:
        OptionError: for rules that are no gradients, an unknown quadrature, or too few steps.
        ShapeError: for a reference of another shape.

    Source: Sundararajan et al. 2017, eqs. 1 and 3; S 2.1.2.1.
    """
    asked = ask(explainer, x, target, seed, of, gradients=True)
    x = asked.x
    begin = start_of(x, reference)
    way = x - begin
    begin = begin.expand_as(x)
    places, weights = (torch.from_numpy(a).to(x) for a in points(quadrature, steps))

    def term(variants: Tensor, samples: Tensor) -> Tensor:
        along = _beside(places[variants], x) * way[samples]
        gradients = asked.pulled(begin[samples] + along, samples)
        return gradients * _column(asked, _beside(weights[variants], x) * way[samples])

    return _finish(
        asked,
        steps,
        term,
        (1, lambda _, rows: begin[rows]),
        internal_batch_size,
        memory_limit,
        "integrated gradients" if progress else "",
    )


def points(quadrature: str, steps: int) -> tuple[Any, Any]:
    """Places and weights on [0, 1] of a quadrature; weights sum to 1.

    Raises:
        OptionError: for an unknown one, or too few steps.
    """
    least = 2 if quadrature == "trapezoid" else 1
    if steps < least:
        raise OptionError(f"steps={steps}: the {quadrature} rule needs at least {least}.")
    even = np.full(steps, 1 / steps)
    if quadrature == "gausslegendre":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return (places + 1) / 2, weights / 2
    if quadrature == "midpoint":
        return (np.arange(steps) + 0.5) / steps, even
    if quadrature == "right":
        return (np.arange(steps) + 1) / steps, even
    if quadrature == "trapezoid":
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps), weights
    raise OptionError(f"quadrature={quadrature!r} is unknown; choose gausslegendre, midpoint, trapezoid or right.")


def expected_gradients(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    references: Tensor,
    samples: int = 5,
    seed: Tensor | None = None,
    of: Score | None = None,
    random_seed: int = 0,
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Repeated:
    """``R = mean of (x - x') * df/dx(x' + a (x - x'))`` over references x' and places a on the way from each.

    Args:
        explainer, x, target, seed, of, internal_batch_size, memory_limit, progress: as for :func:`integrated_gradients`.
        references: data to compare with.
        samples: places on the way from each reference, one drawn from each of as many equal parts of [0, 1].
        random_seed: of the places.

    Shapes: references ``[R, ...]`` like the samples of x.

    Exact when: the sum is ``f(x) - mean f(x')`` as samples grow.

    Raises:
        OptionError, ShapeError: as for :func:`integrated_gradients`.

    Source: Erion et al. 2021; Lundberg & Lee 2017 (GradientSHAP), with the places stratified.
    """
    asked = ask(explainer, x, target, seed, of, gradients=True)
    if samples < 1:
        raise OptionError(f"samples={samples}: give at least one for each reference.")
    x = asked.x
    others = torch.cat(as_reference(references).tensors(x.shape[1:], x.dtype, x.device, "x"))
    count = len(others) * samples
    generator = torch.Generator().manual_seed(random_seed)
    shift = torch.rand([count, len(x)], generator=generator, dtype=torch.float64)
    places = ((torch.arange(count) % samples)[:, None] + shift).div(samples).to(x)  # [R * samples, B]

    def term(variants: Tensor, rows: Tensor) -> Tensor:
        other = others[variants // samples]
        way = x[rows] - other
        gradients = asked.pulled(other + _beside(places[variants, rows], x) * way, rows)
        return gradients * _column(asked, way / count)

    return _finish(
        asked,
        count,
        term,
        (len(others), lambda which, _: others[which]),
        internal_batch_size,
        memory_limit,
        "expected gradients" if progress else "",
    )


def smoothgrad(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    samples: int = 25,
    stdev: float = 0.15,
    moment: Literal["mean", "square", "variance"] = "mean",
    of: Score | None = None,
    random_seed: int = 0,
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Repeated:
    """``R = mean of df/dx(x + n)`` over Gaussian noise n; nothing is conserved.

    Args:
        explainer, x, target, seed, of, internal_batch_size, memory_limit, progress: as for :func:`integrated_gradients`;
            with guided backpropagation or another rule set of that kind, its maps are averaged.
        samples: noisy copies.
        stdev: of the noise, as a part of each sample's range ``max - min``.
        moment: ``"mean"``; ``"square"``, the mean of squares; ``"variance"``, of the gradients.
        random_seed: of the noise, which does not depend on how copies are batched.

    Raises:
        OptionError: for another moment, less than one sample, or a negative deviation.

    Source: Smilkov et al. 2017; Hooker et al. 2019 (squares); Adebayo et al. 2018 (variance).
    """
    asked = ask(explainer, x, target, seed, of, gradients=True)
    if moment not in ("mean", "square", "variance"):
        raise OptionError(f"moment={moment!r} is unknown; choose mean, square or variance.")
    if samples < 1 or stdev < 0:
        raise OptionError(f"samples={samples}, stdev={stdev}: give at least one sample and a deviation of at least 0.")
    x = asked.x
    sigma = stdev * (x.flatten(1).amax(1) - x.flatten(1).amin(1))
    generator = torch.Generator().manual_seed(random_seed)

    def noisy(rows: Tensor) -> Tensor:
        noise = [torch.randn(x.shape[1:], generator=generator, dtype=torch.float64) for _ in rows]
        return x[rows] + _beside(sigma[rows], x) * torch.stack(noise).to(x)

    def term(_: Tensor, rows: Tensor) -> Tensor:
        gradients = asked.pulled(noisy(rows), rows) / samples
        return torch.cat([gradients, gradients**2 * samples], 1)  # first and second moment

    title = "SmoothGrad" if progress else ""
    found = _finish(asked, samples, term, None, internal_batch_size, memory_limit, title)
    first, second = found.relevance.chunk(2, 1)
    relevance = {"mean": first, "square": second, "variance": second - first**2}[moment]
    return dataclasses.replace(found, relevance=relevance)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """One number for each point, beside points like x."""
    return values.reshape([-1, *[1] * (x.dim() - 1)])


def _column(asked: Asked, factor: Tensor) -> Tensor:
    """A factor like points, beside multipliers that may have K columns."""
    return factor.unsqueeze(1) if asked.columns else factor


def _finish(
    asked: Asked, count: int, term: Make, start: tuple[int, Make] | None, given: int | None, limit: int, title: str
) -> Repeated:
    """Adds up the terms of ``count`` points of each sample; says what completeness lacks, seen from where paths start."""
    size = asked.batch_size(count, given, limit, pulls=True)
    total = asked.sums(count, term, size, title)
    samples = torch.arange(len(asked.x), device=asked.x.device)
    output = asked.explainer.predict(asked.x)
    delta = None
    if start is not None:
        increment = asked.score(output, samples) - asked.scores(*start, size).mean(-1)
        delta = total.flatten(2 if asked.columns else 1).sum(-1) - increment
    return Repeated(output, total, delta, count, size)
