"""What the products of the kernels lose in float32, emulated on the CPU: operands cut to the ten bits that tensor cores read.

Compiled kernels (test_kernels_compile.py looks into them) hand ``tf32`` its operands as they are, and the tensor core ignores the
last 13 bits; ``tf32x3`` splits ``x = large + small``, ``large`` rounded to nearest, and leaves
out the product of both small parts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
CUT = 13  # of the 23 bits of a mantissa, those that tf32 has not


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) >> CUT << CUT).view(torch.float32)


def nearest(x: Tensor) -> Tensor:
    """To the nearest number of ten bits, ties away from 0: ``cvt.rna.tf32.f32``."""
    return truncated((x.view(torch.int32) + (1 << (CUT - 1))).view(torch.float32))


def tf32(product: Product, a: Tensor, b: Tensor) -> Tensor:
    return product(truncated(a), truncated(b))


def tf32x3(product: Product, a: Tensor, b: Tensor) -> Tensor:
    large = nearest(a), nearest(b)
    small = truncated(a - large[0]), truncated(b - large[1])
    return product(small[0], large[1]) + product(large[0], small[1]) + product(*large)


def vgg_like() -> tuple[Product, Tensor, Tensor]:
    """A 3x3 convolution of 128 channels, sums of 1152 products; VGG-16's have up to 4608."""
    chance = torch.Generator().manual_seed(0)
    v, weight = torch.randn(1, 128, 14, 14, generator=chance), torch.randn(64, 128, 3, 3, generator=chance)
    return lambda a, b: F.conv2d(a, b, padding=1), v, weight


def lost(found: Tensor, product: Product, a: Tensor, b: Tensor) -> float:
    exact = product(a.double(), b.double())
    return float((found.double() - exact).abs().sum() / exact.abs().sum())


def test_rounding() -> None:
    """Ten bits stay: 1 + 2^-10 is a number of tf32, 1 + 2^-11 lies between two, and the rest of a split is exact."""
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, float("inf")])
    down, near = [1.0, 1 + 2**-10, 1.0, -1.0, 1.0, float("inf")], [1.0, 1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 1.0, float("inf")]
    assert truncated(x).tolist() == down
    assert nearest(x).tolist() == near
    y = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert ((y - nearest(y)).abs() <= 2.0**-11 * y.abs()).all()
    assert ((y - truncated(y)).abs() < 2.0**-10 * y.abs()).all()


def test_three_products_are_as_exact_as_float32() -> None:
    """What tf32x3 leaves out is 2^-22 of a product at most, four roundings of float32; float32's own error is of its sums."""
    product, v, weight = vgg_like()
    single = lost(product(v, weight), product, v, weight)
    split = lost(tf32x3(product, v, weight), product, v, weight)
    assert split <= 4 * single


def test_one_product_keeps_ten_bits() -> None:
    """An operand loses up to 2^-10 of itself, half of that on average, and both lose downwards."""
    product, v, weight = vgg_like()
    error = lost(tf32(product, v, weight), product, v, weight)
    assert 2.0**-12 <= error <= 2 * 2.0**-10
    assert error >= 100 * lost(tf32x3(product, v, weight), product, v, weight)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_splitting_keeps_its_exactness_at_every_scale(scale: float) -> None:
    product, v, weight = vgg_like()
    scaled = v * scale
    assert lost(tf32x3(product, scaled, weight), product, scaled, weight) <= 4 * lost(product(v, weight), product, v, weight)
