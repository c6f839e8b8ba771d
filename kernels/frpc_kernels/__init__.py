"""Hand-written Triton kernels for frpc's hot operations on CUDA devices; frpc runs everywhere without them.

One file a kernel: the formula, the kernel, its launcher as a ``torch.library`` operator of the namespace :data:`NAMESPACE`, a
slow reference beside it, and ``supports()``, which gives a reason where it declines. Importing this package imports no Triton;
importing one of its parts does.
"""

from importlib.util import find_spec

__all__ = ["KERNELS", "NAMESPACE", "why_missing"]

NAMESPACE = "frpc_kernels"
KERNELS: tuple[str, ...] = (
    "gate",
    "conv_relevance",
    "conv_transposed_gate",
    "window_conv",
    "pool_select",
    "pool_windows",
    "norm_gate",
)
"""The files that hold kernels."""


def why_missing() -> str | None:
    """Says why the kernels are not available in this environment, or None if they are."""
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA builds for Linux, or with pip install triton"
    return None
