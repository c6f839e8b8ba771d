"""The parts of ``python -m bench gpu``, those that say most a second first."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

from bench.gpu.driver import FILE, Part

__all__ = ["PARTS"]


def _check(name: str, what: str, limit: float, *words: str, needs: tuple[str, ...] = ()) -> Part:
    command = ("-m", "bench.gpu.checks", name.split("-")[0], FILE, *words)
    return Part(name, what, command, limit, lambda: _not_installed(*needs))


def _tests(name: str, what: str, limit: float, *words: str, program: str = "") -> Part:
    command = ("-m", "bench.gpu.tests", FILE, *words)
    return Part(name, what, command, limit, lambda: _not_installed("pytest", program=program))


def _not_installed(*modules: str, program: str = "") -> str | None:
    """Names the first module or program that is not there."""
    if program and shutil.which(program) is None:
        return f"{program} is not installed; it comes with the CUDA toolkit"
    return next((f"{module} is not installed" for module in modules if find_spec(module) is None), None)


KERNELS, REPLAYED = (
    "tests/kernels/test_kernels_gpu.py",
    "tests/optimize/test_backends.py::test_replayed_programs_give_what_they_give",
)
PARTS = (
    _check("first", "a small net on every backend, beside float64 on the CPU", 60),
    _tests("kernel-tests", "kernels beside their references, programs beside ATen", 150,
           KERNELS, "tests/kernels/test_kernel_precision.py", REPLAYED, "-m", "not slow"),
    _check("graphs", "CUDA graphs: one program on two streams, from two threads, inside another recording", 60),
    _check("net-resnet50", "ResNet-50 beside autograd and Captum", 75, "resnet50"),
    _check("maps", "every neuron of VGG-16's conv5_3", 60),
    _check("net-vit_b_16", "ViT-B/16 beside autograd and Captum", 90, "vit_b_16"),
    _check("bf16", "ResNet-50 in bfloat16 and TF32, beside float64", 75),
    _check("kernels", "kernels beside ATen, as fractions of what the GPU reaches", 130, needs=("triton",)),
    _check("net-bert", "BERT beside autograd and Captum", 90, "bert", needs=("transformers",)),
    _check("net-vgg16", "VGG-16 beside autograd and Captum", 75, "vgg16"),
    _tests("sanitizer", "kernels touch nothing out of bounds", 120, KERNELS, "-k", "out_of_bounds", program="compute-sanitizer"),
)  # fmt: skip
