"""An ``explain_func`` for Quantus: arrays in, arrays out.

    from frpc.integrations import quantus as ours
    quantus.MaxSensitivity()(model, x_batch, y_batch, explain_func=ours.Explain("lid-ig"), device="cpu")

:func:`explain` compiles at every call. For metrics that explain one model many times use :class:`Explain`, which compiles once,
and again where weights have changed, as metrics of randomisation change them. Quantus itself is not needed.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from frpc.core.snapshot import snapshot
from frpc.errors import OptionError, TargetError
from frpc.explainer.compile import compile
from frpc.explainer.explainer import Explainer
from frpc.integrations.arguments import versions

__all__ = ["Explain", "explain"]


class Explain:
    """Explains batches of arrays with one method; compiled programs are kept as long as the model exists.

    Args:
        method: a name of :func:`frpc.rules.sets.methods`.
        bias: where constants go, for methods that follow them; see :func:`frpc.compile`.
        internal_batch_size: how many samples run at one time; all by default.
    """

    def __init__(self, method: str = "frp", *, bias: str | None = None, internal_batch_size: int | None = None) -> None:
        if internal_batch_size is not None and internal_batch_size < 1:
            raise OptionError(f"internal_batch_size={internal_batch_size}: give at least 1.")
        self.method, self.bias, self.internal_batch_size = method, bias, internal_batch_size
        self._compiled: WeakKeyDictionary[nn.Module, tuple[Any, Explainer]] = WeakKeyDictionary()

    def __call__(
        self, model: nn.Module, inputs: ArrayLike, targets: ArrayLike, device: str | torch.device | None = None
    ) -> NDArray[Any]:
        """Returns one map for each sample, like ``inputs``, in the model's precision.

        Args:
            model: a classifier, ``[B, ...]`` to ``[B, classes]``.
            inputs: ``[B, ...]``.
            targets: ``[B]`` class indices, or one for all.
            device: where to compute; where the model is by default.

        Raises:
            TargetError: for targets of another kind.
            InputError: for inputs that do not fit the model.
        """
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        x = torch.as_tensor(np.asarray(inputs)).to(device=device or like.device, dtype=like.dtype)
        indices = _indices(targets, len(x))
        parts = torch.arange(len(x)).split(self.internal_batch_size or max(len(x), 1))
        return torch.cat([self._explained(model, x[rows], indices[rows]) for rows in parts]).numpy()

    def _explained(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Explains the model as it is now: it is run once, and compiled again if it gives something else than its program."""
        found = self._explainer(model)(x, target=target)
        current = snapshot(model) if any(part.training for part in model.modules()) else model
        if not self._explainer(model).agrees_with(current, (x,), found.output):
            del self._compiled[model]
            found = self._explainer(model)(x, target=target)
        assert isinstance(found.relevance, Tensor)
        return found.relevance.cpu()

    def _explainer(self, model: nn.Module) -> Explainer:
        weights = versions(model)
        kept = self._compiled.get(model)
        if kept is None or kept[0] != weights:
            kept = self._compiled[model] = (weights, compile(model, method=self.method, bias=self.bias))
        return kept[1]


def _indices(targets: ArrayLike, count: int) -> Tensor:
    array = np.asarray(targets)
    if array.dtype.kind not in "iu" or array.shape not in ((), (1,), (count,), (count, 1)):
        raise TargetError(f"targets are {array.dtype} {list(array.shape)}; give class indices [{count}].")
    return torch.as_tensor(array.astype(np.int64)).flatten().expand(count)


def explain(
    model: nn.Module, inputs: ArrayLike, targets: ArrayLike, *, device: str | None = None, **options: Any
) -> NDArray[Any]:
    """Explains one batch; options as for :class:`Explain`, and Quantus passes them from ``explain_func_kwargs``."""
    return Explain(**options)(model, inputs, targets, device)
