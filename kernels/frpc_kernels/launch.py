"""One launch of a Triton kernel: what it is given, how it may be tiled, and how it runs on a GPU or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

__all__ = ["FLOATS", "PRECISIONS", "Launch", "cannot_compute", "cdiv", "image", "per_sample", "strides", "tuned"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("tf32x3", "tf32")  # of products in float32: three products of halves, about as exact as float32, or one
_REACH = 2**31  # offsets inside one sample are 32-bit numbers


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, before a tiling is chosen.

    Attributes:
        kernel: the kernel.
        tuned: the same one, which tries the configurations on first use for each size and keeps the fastest.
        grid: how many programs run, given the arguments and the tiling by name.
        arguments: every argument by name, except what a configuration sets.
        configs: the tilings.
    """

    kernel: Any
    tuned: Any
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    arguments: dict[str, Any]
    configs: Sequence[triton.Config]

    @property
    def interpreted(self) -> bool:
        """Whether kernels of this process run in Triton's interpreter."""
        return isinstance(self.kernel, InterpretedFunction)

    def run(self, config: triton.Config | None = None) -> None:
        """Runs the kernel, with one configuration or with the fastest; the interpreter takes the first.

        Raises:
            RuntimeError: if the tensors are not on a CUDA device and there is no interpreter.
        """
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if self.interpreted:
            chosen = config or self.configs[0]
            self.kernel[self.grid](**self.arguments, **chosen.kwargs)
            return
        if device.type != "cuda":
            raise RuntimeError(
                f"the Triton kernel {self.kernel.__name__} was given tensors on {device.type}; it runs on CUDA devices. Move the "
                'model and its inputs there, or compile with backend="aten".'
            )
        with torch.cuda.device(device):
            if config is None:
                self.tuned[self.grid](**self.arguments)
            else:
                self.kernel[self.grid](**self.arguments, **config.all_kwargs())


def tuned(kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> Any:
    """The kernel as Triton's autotuner runs it: configurations are timed once for every value of the arguments in ``key``."""
    return triton.autotune(configs=list(configs), key=list(key))(kernel)


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def image(x: Tensor) -> tuple[int, int, int, int]:
    """The sizes ``(B, C, H, W)`` of a tensor of two to four dimensions; missing ones are 1."""
    sizes = [*x.shape]
    return (*sizes, *[1] * (4 - len(sizes))) if len(sizes) < 4 else tuple(sizes)


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """The strides of a tensor of two to four dimensions along ``(B, C, H, W)``; those of missing dimensions are 0."""
    steps = [*x.stride()]
    return (*steps, *[0] * (4 - len(steps))) if len(steps) < 4 else tuple(steps)  # type: ignore[return-value]


def per_sample(
    kernel: Any,
    tuner: Any,
    out: Tensor,
    configs: Sequence[triton.Config],
    arguments: dict[str, Any],
    steps: Mapping[str, Tensor],
) -> Launch:
    """A launch over single elements of ``out``, counted inside each sample, so that places inside a sample fit 32 bits.

    Args:
        arguments: what the kernel takes besides ``count`` and strides.
        steps: ``"letter axes"`` -> the tensor whose strides are the arguments ``letter_axis``.
    """
    batch = int(out.shape[0])
    count = out.numel() // batch
    for letters, x in steps.items():
        letter, axes = letters.split()
        arguments |= {f"{letter}_{axis}": step for axis, step in zip(axes, x.stride(), strict=True)}
    arguments |= {"count": count}
    return Launch(kernel, tuner, lambda meta: (batch * cdiv(count, meta["BLOCK"]),), arguments, configs)


def cannot_compute(*tensors: Tensor | None, rank: Sequence[int]) -> str | None:
    """Says why kernels of products or of single values cannot take these tensors, or None: type, rank, size of one sample."""
    given = [x for x in tensors if x is not None]
    first = given[0]
    for x in given:
        if x.dtype not in FLOATS:
            return f"{str(x.dtype).removeprefix('torch.')}: the kernel computes in float32, float16 and bfloat16"
        if x.dtype != first.dtype:
            return f"operands of different types, {first.dtype} and {x.dtype}".replace("torch.", "")
        if x.device != first.device:
            return f"operands on different devices, {first.device} and {x.device}"
    if first.dim() not in rank:
        return f"{first.dim()} dimensions: the kernel takes {' to '.join(str(r) for r in sorted({min(rank), max(rank)}))}"
    sample = 1
    for size in first.shape[1:]:
        sample *= int(size)
    if sample >= _REACH:
        return f"a sample of {sample} elements: offsets inside a sample are 32-bit numbers"
    return None
