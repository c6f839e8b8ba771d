"""Methods that change the input and look at the output: occlusion, RISE, meaningful perturbation.

All variants of all samples run as batches of forward passes. Meaningful perturbation learns its mask: the mask's gradient follows
by the chain rule from the compiled gradient with respect to the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frpc.attribution.passes import MEMORY_LIMIT, Asked, Score, ask, start_of
from frpc.attribution.scales import picture_size, resized
from frpc.driver.targets import Target
from frpc.errors import OptionError
from frpc.explainer.explainer import Explainer
from frpc.rules.references import Reference, ReferenceLike

__all__ = ["Perturbed", "meaningful_perturbation", "occlusion", "rise", "rise_masks"]
Size = int | tuple[int, int]


@dataclass(frozen=True, eq=False)
class Perturbed:
    """What perturbations tell; unpacks as ``output, relevance``.

    Attributes:
        output: the model's output at the input, ``[B, ...]``.
        relevance: of the pixels, ``[B, H, W]``, or ``[B, K, H, W]`` for K targets.
        score: the number that was watched, undisturbed, ``[B]`` or ``[B, K]``.
        scores: the same of every variant; see each method.
    """

    output: Tensor
    relevance: Tensor
    score: Tensor
    scores: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.relevance))


def occlusion(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    window: Size = 16,
    stride: Size = 8,
    seed: Tensor | None = None,
    reference: ReferenceLike | Reference = "zero",
    of: Score = "probability",
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Perturbed:
    """``R(u) = mean of f(x) - f(x without window w)`` over the windows w that cover pixel u.

    Args:
        explainer: a model, or an explainer with any rules: only its forward pass is used.
        x, target, seed: as for calling an explainer.
        window, stride: rows and columns, or one number for both. The last window lies flush with the border.
        reference: what windows are filled with: ``"zero"``, ``"blur"`` or one tensor like a sample.
        of: what is watched, the class's ``"probability"`` or its ``"logit"``.
        internal_batch_size, memory_limit: variants that run at one time; by default as many as so many bytes hold.
        progress: show a progress bar.

    Shapes: ``x [B, C, H, W]``; scores ``[B, h, w]`` or ``[B, K, h, w]``, one for each place of the window.

    Raises:
        OptionError: for a window larger than the picture, or a stride that leaves pixels out.
        ShapeError: if x is no batch of pictures.

    Source: Zeiler & Fergus 2014; S 2.1.1.
    """
    size = picture_size(x)
    asked = ask(explainer, x, target, seed, of, gradients=False)
    x, filling = asked.x, start_of(x, reference).expand_as(x)
    rows, columns = (
        _coverage(n, w, s).to(x) for n, w, s in zip(size, _pair(window, "window"), _pair(stride, "stride"), strict=True)
    )
    count = len(rows) * len(columns)

    def hidden(variants: Tensor, samples: Tensor) -> Tensor:
        covered = rows[variants // len(columns)][:, :, None] * columns[variants % len(columns)][:, None, :]
        return torch.where(covered.unsqueeze(1) > 0, filling[samples], x[samples])

    output, score = _undisturbed(asked)
    batch = asked.batch_size(count, internal_batch_size, memory_limit, pulls=False)
    scores = asked.scores(count, hidden, batch, "occlusion" if progress else "").unflatten(-1, (len(rows), len(columns)))
    drops = torch.einsum("...ij,ih,jw->...hw", score[..., None, None] - scores, rows, columns)
    return Perturbed(output, drops / (rows.sum(0)[:, None] * columns.sum(0)), score, scores)


def _pair(size: Size, name: str) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise OptionError(f"{name}={size}: give at least one row and one column.")
    return rows, columns


def _coverage(size: int, window: int, stride: int) -> Tensor:
    """Which pixels along one axis each place of a window covers, 0 or 1, ``[places, size]``."""
    if window > size:
        raise OptionError(f"window={window} is larger than the picture, {size} pixels.")
    if stride > window:
        raise OptionError(f"stride={stride} leaves out pixels between windows of {window}; give at most {window}.")
    starts = torch.tensor(sorted({*range(0, size - window, stride), size - window}))
    offsets = torch.arange(size) - starts[:, None]
    return (offsets >= 0) & (offsets < window)


def _undisturbed(asked: Asked) -> tuple[Tensor, Tensor]:
    output = asked.explainer.predict(asked.x)
    return output, asked.score(output, torch.arange(len(asked.x), device=asked.x.device))


def rise(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    masks: int = 4000,
    grid: Size = 7,
    keep: float = 0.5,
    seed: Tensor | None = None,
    reference: ReferenceLike | Reference = "zero",
    of: Score = "probability",
    random_seed: int = 0,
    internal_batch_size: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Perturbed:
    """``R = 1/(keep n) sum of f(x * M + x_ref * (1 - M)) M`` over n random masks M.

    Args:
        explainer, x, target, seed, of, internal_batch_size, memory_limit, progress: as for :func:`occlusion`.
        masks: how many.
        grid: cells of a mask before it is enlarged, rows and columns.
        keep: how probable it is that a cell stays.
        reference: what is seen where a mask is 0.
        random_seed: of the masks, which all samples share.

    Shapes: ``x [B, C, H, W]``; scores ``[B, n]`` or ``[B, K, n]``.

    Raises:
        OptionError: for no masks, or a probability that is none.
        ShapeError: if x is no batch of pictures.

    Source: Petsiuk et al. 2018, eq. 6; S 2.1.1.
    """
    size = picture_size(x)
    asked = ask(explainer, x, target, seed, of, gradients=False)
    x, filling = asked.x, start_of(x, reference).expand_as(x)
    cells, shifts = _draw(masks, _pair(grid, "grid"), keep, size, random_seed)
    seen: list[Tensor] = []

    def term(variants: Tensor, samples: Tensor) -> Tensor:
        chosen = variants.cpu()
        mask = _enlarge(cells[chosen], shifts[chosen], size).to(x).unsqueeze(1)
        seen.append(asked.score(asked.explainer.predict(torch.lerp(filling[samples], x[samples], mask)), samples))
        return seen[-1][..., None, None] * (mask if asked.columns else mask[:, 0])

    batch = asked.batch_size(masks, internal_batch_size, memory_limit, pulls=False)
    total = asked.sums(masks, term, batch, "RISE" if progress else "")
    output, score = _undisturbed(asked)
    scores = torch.cat(seen).unflatten(0, (masks, len(x))).movedim(0, -1)
    return Perturbed(output, total / (keep * masks), score, scores)


def rise_masks(count: int, size: tuple[int, int], grid: Size = 7, keep: float = 0.5, random_seed: int = 0) -> Tensor:
    """RISE's masks: grids of 0 and 1, enlarged bilinearly beyond the picture and cut at a random place, ``[count, H, W]``."""
    return _enlarge(*_draw(count, _pair(grid, "grid"), keep, size, random_seed), size)


def _draw(count: int, grid: tuple[int, int], keep: float, size: tuple[int, int], random_seed: int) -> tuple[Tensor, Tensor]:
    """Grids ``[n, *grid]`` and where to cut ``[n, 2]``: small, whatever the picture's size."""
    if count < 1 or not 0 < keep <= 1:
        raise OptionError(f"masks={count}, keep={keep}: give at least one mask, and a probability above 0, at most 1.")
    generator = torch.Generator().manual_seed(random_seed)
    cells = (torch.rand([count, *grid], generator=generator) < keep).float()
    shifts = [torch.randint(-(-n // g), [count], generator=generator) for n, g in zip(size, grid, strict=True)]
    return cells, torch.stack(shifts, 1)


def _enlarge(cells: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    grid = cells.shape[-2:]
    rows, columns = (-(-n // g) * (g + 1) for n, g in zip(size, grid, strict=True))  # one cell more than the picture needs
    large = resized(cells, (rows, columns))
    which = torch.arange(len(cells))[:, None, None]
    down, across = (shifts[:, axis, None] + torch.arange(size[axis]) for axis in (0, 1))
    return large[which, down[:, :, None], across[:, None, :]]


def meaningful_perturbation(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None = None,
    *,
    seed: Tensor | None = None,
    mask: Size | None = None,
    reference: ReferenceLike | Reference = "blur",
    of: Score = "probability",
    steps: int = 300,
    rate: float = 0.1,
    l1: float = 0.08,
    tv: float = 1e-2,
    power: float = 3.0,
    jitter: int = 4,
    random_seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = False,
) -> Perturbed:
    """``R = 1 - m*``, ``m* = argmin of l1 mean |1 - m| + tv sum |grad m|^power + f(x m + x_ref (1 - m))``, m in [0, 1].

    Args:
        explainer: a model, or an explainer compiled with gradient rules; for probabilities with ``seed="softmax_taylor"``, or it
            is compiled once more.
        x, target, seed: as for calling an explainer, one target a sample.
        mask: rows and columns of the mask, enlarged bilinearly to the picture; an eighth of the picture by default.
        reference: what is seen where the mask is 0: ``"blur"``, ``"zero"``, or a tensor (a colour, noise).
        of: what is to fall, the class's ``"probability"`` or its ``"logit"``.
        steps, rate: of Adam, beginning with all hidden: a model that is sure of the whole picture has no slope to follow.
        l1, tv, power: weights of the penalties (the paper's 1e-4 for each of 28 x 28 cells), and the power of differences.
        jitter: pixels by which the picture is rolled at random, at most, against artifacts.
        random_seed: of these moves.
        memory_limit, progress: as for :func:`occlusion`.

    Shapes: ``x [B, C, H, W]``; scores ``[B, steps]``, seen on the way.

    Raises:
        OptionError: for K targets a sample, rules that are no gradients, or less than one step.
        ShapeError: if x is no batch of pictures.

    Source: Fong & Vedaldi 2017, eqs. 2, 3 and 5, for the deletion of evidence; S 1, 2. Their blur grows with the mask; here the
    picture fades into one blurred copy.
    """
    size = picture_size(x)
    asked = ask(explainer, x, target, seed, of, gradients=True)
    if asked.columns or steps < 1:
        raise OptionError("This method learns one mask per sample: give one target per sample, and at least one step.")
    x, filling = asked.x, start_of(x, reference).expand_as(x)
    cells = tuple(max(1, n // 8) for n in size) if mask is None else _pair(mask, "mask")
    up, across = (_enlarger(c, n).to(x) for c, n in zip(cells, size, strict=True))
    m = x.new_zeros([len(x), *cells])
    adam = torch.optim.Adam([m], lr=rate)
    generator = torch.Generator().manual_seed(random_seed)
    batch = asked.batch_size(1, None, memory_limit, pulls=True)
    scores = []
    for _ in _steps(steps, "meaningful perturbation" if progress else ""):
        move = tuple(torch.randint(-jitter, jitter + 1, [2], generator=generator).tolist())
        score, slope = _slope(asked, filling, up @ m @ across.T, move, batch)
        m.grad = up.T @ slope @ across - l1 / m[0].numel() + tv * _variation_slope(m, power)  # in [0, 1], |1 - m| = 1 - m
        adam.step()
        m.clamp_(0, 1)
        scores.append(score)
    output, undisturbed = _undisturbed(asked)
    return Perturbed(output, 1 - up @ m @ across.T, undisturbed, torch.stack(scores, 1))


def _steps(steps: int, title: str) -> Any:
    if not title:
        return range(steps)
    from rich.progress import track

    return track(range(steps), title, transient=True)


def _enlarger(cells: int, size: int) -> Tensor:
    """Bilinear resizing along one axis as a matrix ``[size, cells]``: its transpose pulls gradients back."""
    return F.interpolate(torch.eye(cells, dtype=torch.float64)[None], size=size, mode="linear", align_corners=False)[0].T


def _slope(asked: Asked, filling: Tensor, mask: Tensor, move: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    """``f`` and ``df/dm`` at a mask ``[B, H, W]``: ``df/dm = sum over channels of (x - x_ref) df/dz``, z the moved mixture."""
    scores, slopes = [], []
    for _, samples in asked.batches(1, batch):
        x, begin = asked.x[samples], filling[samples]
        mixed = torch.lerp(begin, x, mask[samples].unsqueeze(1)).roll(move, (2, 3))
        output, gradient = asked.explainer(mixed, seed=asked.functional[samples])
        scores.append(asked.score(output, samples))
        slopes.append((gradient.roll([-n for n in move], (2, 3)) * (x - begin)).sum(1))
    return torch.cat(scores), torch.cat(slopes)


def _variation_slope(m: Tensor, power: float) -> Tensor:
    """Gradient of ``sum |m[i+1] - m[i]|^power`` over both axes."""
    total = torch.zeros_like(m)
    for axis in (1, 2):
        steps = m.diff(dim=axis)
        pull = power * steps.abs() ** (power - 1) * steps.sign()
        edge = torch.zeros_like(m.narrow(axis, 0, 1))
        total -= torch.cat([pull, edge], axis) - torch.cat([edge, pull], axis)
    return total
