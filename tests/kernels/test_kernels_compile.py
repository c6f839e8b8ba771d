"""Triton kernels compiled for GPUs that are not here: no spills, shared memory that fits, matrix products on tensor cores."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from frpc_kernels import conv_relevance, conv_transposed_gate, gate, norm_gate, pool_select, pool_windows, window_conv  # noqa: E402
from frpc_kernels.launch import PRECISIONS, Launch  # noqa: E402

pytestmark = pytest.mark.compile_only

SHARED = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a program may use (CUDA C programming guide, table of features)
PRODUCT = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
ONE = ([1, 1], [1, 1], [1, 1])


def image(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def convolution(dtype: torch.dtype, precision: str = "tf32") -> Launch:
    v, weight, out = image(dtype, 4, 64, 28, 28), image(dtype, 128, 64, 3, 3), image(dtype, 4, 128, 28, 28)
    return conv_relevance.plan_conv_relevance(v, weight, weight[:, 0, 0, 0], out, out, *ONE, 1, 0.5, precision)


def transposed(dtype: torch.dtype, precision: str = "tf32") -> Launch:
    x, weight, g = image(dtype, 4, 64, 28, 28), image(dtype, 128, 64, 3, 3), image(dtype, 4, 128, 28, 28)
    bits = image(torch.int32, 4, 2, 28, 28)
    return conv_transposed_gate.plan_conv_transposed_gate(g, weight, x, bits, x, x, *ONE, 1, precision)


def strided(dtype: torch.dtype, precision: str = "tf32") -> Launch:
    x, weight, g = image(dtype, 4, 64, 28, 28), image(dtype, 128, 64, 3, 3), image(dtype, 4, 128, 14, 14)
    bits = image(torch.int32, 4, 2, 28, 28)
    return conv_transposed_gate.plan_conv_transposed_gate(g, weight, x, bits, None, x, [2, 2], [1, 1], [1, 1], 1, precision)


def windows(dtype: torch.dtype, precision: str = "tf32") -> Launch:
    u = torch.empty(1, 16, 16, 5, 5, 64, dtype=dtype, device="meta").permute(0, 5, 1, 2, 3, 4)
    out = torch.empty(1, 16, 16, 7, 7, 128, dtype=dtype, device="meta").permute(0, 5, 1, 2, 3, 4)
    return window_conv.plan_window_conv(u, image(dtype, 128, 64, 3, 3), out, *ONE, [1, 1], 1, precision)


def relu(dtype: torch.dtype) -> Launch:
    z = image(dtype, 4, 64, 28, 28)
    return gate.plan_relu_gate(z, z, image(torch.int32, 4, 2, 28, 28))


def gated(dtype: torch.dtype) -> Launch:
    z = image(dtype, 4, 64, 28, 28)
    return gate.plan_gated(z, image(torch.int32, 4, 2, 28, 28), z)


def gelu(dtype: torch.dtype) -> Launch:
    z = image(dtype, 4, 64, 28, 28)
    return gate.plan_smooth_gate(z, z, z, "gelu")


def select(dtype: torch.dtype) -> Launch:
    x, y = image(dtype, 4, 64, 28, 28), image(dtype, 4, 64, 14, 14)
    return pool_select.plan_pool_select(x, y, image(torch.int32, 4, 64, 14, 14), [3, 3], [2, 2], [1, 1], [1, 1])


def scatter(dtype: torch.dtype) -> Launch:
    x, y, winner = image(dtype, 4, 64, 28, 28), image(dtype, 4, 64, 14, 14), image(torch.int32, 4, 64, 14, 14)
    bits = image(torch.int32, 4, 2, 28, 28)
    return pool_select.plan_pool_scatter(y, winner, bits, x, [3, 3], [2, 2], [1, 1], [1, 1])


def won(dtype: torch.dtype) -> Launch:
    u = torch.empty(1, 16, 16, 5, 5, 64, dtype=dtype, device="meta").permute(0, 5, 1, 2, 3, 4)
    out = torch.empty(1, 8, 8, 6, 6, 64, dtype=dtype, device="meta").permute(0, 5, 1, 2, 3, 4)
    winner = image(torch.int64, 1, 64, 8, 8)
    return pool_windows.plan_pool_windows(u, winner, out, 16, [1, 1], [2, 2], [0, 0], [0, 0])


def norm(dtype: torch.dtype) -> Launch:
    x, gamma = torch.empty(4, 196, 768, dtype=dtype, device="meta"), torch.empty(768, dtype=dtype, device="meta")
    return norm_gate.plan_norm_gate(x, gamma, gamma, x, x[..., :1].contiguous(), 1e-6, True)


def norm_back(dtype: torch.dtype) -> Launch:
    x, gamma = torch.empty(4, 196, 768, dtype=dtype, device="meta"), torch.empty(768, dtype=dtype, device="meta")
    return norm_gate.plan_norm_pull(x, gamma, x[..., :1].contiguous(), x, True)


PRODUCTS = (convolution, transposed, strided, windows)
OTHERS = (relu, gated, gelu, select, scatter, won, norm, norm_back)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def source(launch: Launch, config: Any) -> ASTSource:
    """What Triton would compile for this launch: 1 is a constant, multiples of 16 and pointers are marked."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = {**launch.arguments, **config.kwargs}
    for place, parameter in enumerate(launch.kernel.params):
        value, at = given[parameter.name], (place,)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[at] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[at] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def check(launch: Launch, config: Any, chip: int, tmp_path: Path, product: bool) -> str:
    """Compiles a kernel, looks at what it takes of the chip, and returns its assembly."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
    built = triton.compile(source(launch, config), target=GPUTarget("cuda", chip, 32), options=options)
    where = f"{launch.kernel.__name__}, {config}, sm_{chip}"
    assert built.metadata.shared <= SHARED[chip], f"{where}: {built.metadata.shared} bytes of shared memory"
    if product:
        assert PRODUCT.search(built.asm["ptx"]), f"{where}: no tensor-core instruction"
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    stacks = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert stacks, f"{where}: cuobjdump says nothing of registers: {usage}"
    assert all(pair == ("0", "0") for pair in stacks), f"{where}: registers spill to memory: {usage}"
    return str(built.asm["ptx"])


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("make", PRODUCTS)
def test_products_use_tensor_cores(make: Callable[..., Launch], chip: int, tmp_path: Path) -> None:
    """Splits are rounded to nearest, as test_kernel_precision.py has it; the NaN that splitting an infinity gives is dropped."""
    launch = make(torch.float32, "tf32x3")
    assembly = check(launch, launch.configs[-1], chip, tmp_path, product=True)
    assert "cvt.rna.tf32.f32" in assembly
    assert re.search(r"setp\.(nan|num)\.f32", assembly)


def test_one_product_takes_operands_as_they_are(tmp_path: Path) -> None:
    launch = convolution(torch.float32, "tf32")
    assert "cvt.rna.tf32.f32" not in check(launch, launch.configs[-1], 90, tmp_path, product=True)


@pytest.mark.parametrize("make", OTHERS)
def test_kernels_compile_without_spills(make: Callable[..., Launch], tmp_path: Path) -> None:
    launch = make(torch.bfloat16)
    check(launch, launch.configs[-1], 90, tmp_path, product=False)


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("make", [*PRODUCTS, *OTHERS])
def test_every_configuration_compiles(make: Callable[..., Launch], dtype: torch.dtype, chip: int, tmp_path: Path) -> None:
    product = make in PRODUCTS
    kinds = [(p,) for p in PRECISIONS] if product and dtype == torch.float32 else [()]
    for kind in kinds:
        launch = make(dtype, *kind)
        for config in launch.configs:
            check(launch, config, chip, tmp_path, product)
