"""Reference inputs: what a model is compared with where increments are explained.

A reference stands for "nothing is there": zeros, a blurred copy of the input, the mean of the data, or inputs of your own. What
does not depend on the input is propagated once, when the program is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frpc.errors import OptionError, ShapeError

__all__ = ["Blur", "Reference", "ReferenceLike", "as_reference", "data_mean"]

Kind = Literal["zero", "blur", "given"]
ReferenceLike = Tensor | Sequence[Tensor] | str


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur over the spatial axes, the border repeated.

    Units: ``sigma`` in pixels.
    """

    sigma: float = 10.0

    def __call__(self, x: Tensor) -> Tensor:
        """Blurs ``[B, C, *spatial]``."""
        for axis in range(2, x.dim()):
            x = self._along(x, axis)
        return x

    def _along(self, x: Tensor, axis: int) -> Tensor:
        """A matrix product along one axis: ordinary at any size, the kernel wider than the image included."""
        size = int(x.shape[axis])
        places = torch.arange(size, dtype=x.dtype, device=x.device)
        reach = math.ceil(3 * self.sigma)
        offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
        weights = torch.softmax(-0.5 * (offsets / self.sigma) ** 2, 0)
        read = (places[:, None] + offsets).clamp(0, size - 1).long()  # [size, 2 reach + 1]
        matrix = x.new_zeros([size, size]).scatter_add(1, read, weights.expand(size, -1))
        return (x.transpose(axis, -1) @ matrix.t()).transpose(axis, -1)


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference input or several.

    Attributes:
        kind: ``zero``, ``blur``, or ``given``.
        given: the tensors, each ``[1, ...]`` like one sample, for ``given``.
        blur: how, for ``blur``.
    """

    kind: Kind = "zero"
    given: tuple[Tensor, ...] = ()
    blur: Blur = Blur()

    @property
    def count(self) -> int:
        """How many reference inputs there are; maps are averaged over them."""
        return max(1, len(self.given))

    @property
    def name(self) -> str:
        return self.kind if self.kind != "given" else f"{self.count} given" if self.count > 1 else "given"

    def tensors(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str) -> list[Tensor]:
        """Returns what is known before any input is: ``[1, *shape]`` each; none for ``blur``, which depends on the input.

        Raises:
            ShapeError: if a given reference does not look like one sample of the input.
        """
        if self.kind == "blur":
            return []
        if self.kind == "zero":
            return [torch.zeros([1, *shape], dtype=dtype, device=device)]
        for tensor in self.given:
            if list(tensor.shape[1:]) != list(shape):
                raise ShapeError(
                    f"The reference has shape {list(tensor.shape[1:])} per sample, but input {name!r} has {list(shape)}. Give "
                    "one like a sample of the input, or several as a list or as a batch."
                )
        return [tensor.detach().to(dtype=dtype, device=device) for tensor in self.given]


def as_reference(reference: ReferenceLike | Reference) -> Reference:
    """Reads a reference as a caller gives it: ``"zero"``, ``"blur"``, one tensor (a batch counts as several), or several.

    Raises:
        OptionError: for an unknown word, or something that is not a tensor.
    """
    if isinstance(reference, Reference):
        return reference
    if isinstance(reference, str):
        if reference in ("zero", "blur"):
            return Reference("zero" if reference == "zero" else "blur")
        raise OptionError(
            f"reference={reference!r} is unknown; choose zero or blur, or give tensors "
            "(frpc.data_mean(batches) computes the mean of the data)."
        )
    tensors = [reference] if isinstance(reference, Tensor) else list(reference)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise OptionError('reference= takes "zero", "blur", a tensor shaped like the input, or a list of them.')
    samples = [sample for tensor in tensors for sample in tensor.split(1)]
    return Reference("given", tuple(samples))


def data_mean(batches: Iterable[Tensor]) -> Tensor:
    """Returns the mean sample of some data, ``[1, ...]``: a reference that says "an average input".

    Shapes: each batch ``[B, ...]``; sums are taken in float64.

    Raises:
        OptionError: if there are no samples.
    """
    total: Tensor | None = None
    count, dtype = 0, torch.float32
    for batch in batches:
        dtype = batch.dtype
        share = batch.detach().double().sum(0, keepdim=True)
        total = share if total is None else total + share
        count += int(batch.shape[0])
    if total is None or count == 0:
        raise OptionError("The data's mean needs at least one sample.")
    return (total / count).to(dtype)
