"""Parts of a program replaced by Triton kernels, on CUDA devices."""
