"""Hand-written Triton kernels for frpc's hot operations on CUDA devices; frpc runs everywhere without them.

One file a kernel: the formula, the kernel, its launcher as a ``torch.library`` operator, a slow reference beside it, and
``supports()``, which gives a reason where it declines. There are no kernels in this version; :data:`KERNELS` lists them.
"""

KERNELS: tuple[str, ...] = ()
