"""Model-agnostic baselines, from Captum and shap: nothing is rewritten here, answers come in frpc's form.

Needs the extra ``frpc[baselines]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frpc.attribution.scales import picture_size
from frpc.errors import InputError, OptionError, ShapeError, TargetError, require
from frpc.explainer.explainer import Explainer

__all__ = ["Baseline", "attribute", "feature_ablation", "kernel_shap", "lime", "partition_shap", "segments", "shapley_values"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a library said; unpacks as ``output, relevance``.

    Attributes:
        output: the model's output, ``[B, ...]``.
        relevance: like the input.
        method: the library's name for it.
    """

    output: Tensor
    relevance: Tensor
    method: str

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.output, self.relevance))


def attribute(
    method: str, model: nn.Module, x: Tensor, target: int | Tensor, *, random_seed: int = 0, **options: Any
) -> Baseline:
    """Asks a class of ``captum.attr`` by name.

    Args:
        method: ``"Lime"``, ``"KernelShap"``, ``"ShapleyValueSampling"``, ``"FeatureAblation"``, ...
        model: a module, or an explainer, whose forward pass is asked then.
        x: ``[B, ...]``.
        target: an int or ``[B]``.
        random_seed: torch draws Captum's samples from it; your own random state comes back afterwards.
        options: go to the class's ``attribute`` as they are.

    Raises:
        PackageError: if Captum, or scikit-learn where it fits linear models, is not installed.
        OptionError: for a method that it does not have.
        InputError: if x is not a tensor; TargetError: for a target that is not a class index.
    """
    found = getattr(require("captum.attr", "baselines", "frpc.baselines"), method, None)
    if not isinstance(found, type) or not hasattr(found, "attribute"):
        raise OptionError(f"method={method!r}: captum.attr has no method of that name.")
    if not isinstance(x, Tensor):
        raise InputError(f"x is {type(x).__name__}, not a tensor.")
    if method in ("Lime", "KernelShap"):
        require("sklearn", "baselines", f"Captum's {method}")  # which Captum fits its linear models with
    target = target if isinstance(target, int) and not isinstance(target, bool) else _indices(target, len(x))
    forward = model.predict if isinstance(model, Explainer) else model
    with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are providing multiple inputs")  # one model for each is what is meant
        torch.manual_seed(random_seed)
        relevance = found(forward).attribute(x, target=target, **options)
        output = forward(x)
    return Baseline(output, relevance.detach(), method)


def lime(
    model: nn.Module, x: Tensor, target: int | Tensor, *, parts: Tensor | None = None, samples: int = 500, **options: Any
) -> Baseline:
    """LIME: a sparse linear model of what the model says where parts of the input are left out.

    Args:
        model, x, target: as for :func:`attribute`, one sample after another.
        parts: number of the part each element belongs to, like one sample or broadcasting to it; squares of a 7 by 7 grid for
            pictures, every element by itself for other inputs.
        samples: perturbed inputs.
        options: as for :func:`attribute`; ``perturbations_per_eval`` sets how many run at one time.

    Raises:
        As :func:`attribute`.

    Source: Ribeiro et al. 2016; S 2.1.6; Captum's implementation.
    """
    return attribute("Lime", model, x, target, feature_mask=_parts(x, parts), n_samples=samples, **options)


def kernel_shap(
    model: nn.Module, x: Tensor, target: int | Tensor, *, parts: Tensor | None = None, samples: int = 500, **options: Any
) -> Baseline:
    """KernelSHAP: Shapley values of parts of the input, by weighted regression; arguments as for :func:`lime`.

    Source: Lundberg & Lee 2017; Captum's implementation.
    """
    return attribute("KernelShap", model, x, target, feature_mask=_parts(x, parts), n_samples=samples, **options)


def shapley_values(
    model: nn.Module, x: Tensor, target: int | Tensor, *, parts: Tensor | None = None, samples: int = 25, **options: Any
) -> Baseline:
    """Shapley values of parts of the input, by sampled permutations; arguments as for :func:`lime`.

    Exact when: their sum is ``f(x) - f(0)`` for any number of permutations.

    Source: Castro et al. 2009; Captum's implementation.
    """
    return attribute("ShapleyValueSampling", model, x, target, feature_mask=_parts(x, parts), n_samples=samples, **options)


def feature_ablation(
    model: nn.Module, x: Tensor, target: int | Tensor, *, parts: Tensor | None = None, **options: Any
) -> Baseline:
    """What the output loses without each part of the input; arguments as for :func:`lime`.

    Source: Captum's implementation.
    """
    return attribute("FeatureAblation", model, x, target, feature_mask=_parts(x, parts), **options)


def partition_shap(model: nn.Module, x: Tensor, target: int | Tensor, *, samples: int = 500, batch: int = 50) -> Baseline:
    """Owen values of the rectangles of a picture, halved again and again while ``samples`` last.

    Args:
        model, x, target: as for :func:`attribute`; ``x [B, C, H, W]``. What is left out is 0.
        samples: forward passes for each sample, at most.
        batch: how many run at one time.

    Exact when: their sum is ``f(x) - f(0)``.

    Raises:
        PackageError: if shap is not installed. ShapeError: if x is no batch of pictures. TargetError: as for :func:`attribute`.

    Source: Lundberg & Lee 2017; Owen 1977; shap's implementation (PartitionExplainer).
    """
    size = picture_size(x)
    which = _indices(target, len(x))
    shap = require("shap", "baselines", "frpc.baselines.partition_shap")
    forward = model.predict if isinstance(model, Explainer) else model

    def scores(pictures: Any) -> Any:  # shap holds channels last
        with torch.no_grad():
            return forward(torch.as_tensor(pictures).movedim(-1, 1).contiguous().to(x)).cpu().numpy()

    pictures = x.detach().movedim(1, -1).cpu().numpy()
    masker = shap.maskers.Image(pictures[0] * 0, (*size, x.shape[1]))
    found = shap.PartitionExplainer(scores, masker)(pictures, max_evals=samples, batch_size=batch, silent=True)
    values = torch.from_numpy(found.values).to(x).movedim(-2, 1)  # [B, C, H, W, classes]
    relevance = values[torch.arange(len(x)), ..., which]
    with torch.no_grad():
        return Baseline(forward(x), relevance, "PartitionExplainer")


def segments(size: tuple[int, int], grid: tuple[int, int] = (7, 7)) -> Tensor:
    """Numbers the rectangles of a grid over a picture, ``[H, W]``: parts where no superpixels are given."""
    rows, columns = (torch.arange(n) * min(g, n) // n for n, g in zip(size, grid, strict=True))
    return rows[:, None] * (int(columns.max()) + 1) + columns


def _parts(x: Tensor, parts: Tensor | None) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise InputError("x is not a tensor with the batch first.")
    if parts is None:
        sizes = x.shape[1:]
        parts = segments((sizes[1], sizes[2])) if len(sizes) == 3 else torch.arange(sizes.numel()).reshape(sizes)
    try:
        return parts.to(x.device).expand([1, *x.shape[1:]]).contiguous()
    except RuntimeError as error:
        raise ShapeError(f"parts has shape {list(parts.shape)}, but a sample of x has shape {list(x.shape[1:])}.") from error


def _indices(target: int | Tensor, count: int) -> Tensor:
    """One index for each sample."""
    if not isinstance(target, int | Tensor) or isinstance(target, bool):
        raise TargetError(f"target={target!r} is not an index: use an int or a tensor [B].")
    indices = torch.as_tensor(target).cpu()
    if indices.is_floating_point() or list(indices.shape) not in ([], [count]):
        raise TargetError(f"target is {indices.dtype} {list(indices.shape)}; give an int or class indices [{count}].")
    return indices.expand(count)
