"""Products of many factors where some are 0, and logarithms of sums far out: finite, and the right multipliers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from case import aten
from cases_places import PLACES, reduced, shared_product, shared_products
from frpc.core.graph import bind
from frpc.rules.table import TABLE, Call
from rule_twins import agrees, rebuilt, rule_at

F64 = torch.float64
ZEROS = torch.tensor(
    [[2.0, -3.0, 0.5, 4.0], [2.0, 0.0, 0.5, 4.0], [0.0, -3.0, -0.0, 4.0], [1e-300, 1e300, 1e-300, 2.0]], dtype=F64
)


def sums_so_far(a: Tensor) -> Tensor:
    return torch.stack([shared_product(a[:, : i + 1], ZEROS[:, : i + 1]) for i in range(4)], 1)


@pytest.mark.parametrize(
    ("op", "held"),
    [(aten.prod.dim_int, lambda a: shared_product(a, ZEROS)), (aten.cumprod.default, sums_so_far)],
    ids=["prod", "cumprod"],
)
def test_a_factor_of_zero_leaves_the_others_their_product(op: torch._ops.OpOverload, held: Callable[[Tensor], Tensor]) -> None:
    affine, result = rule_at(op, ZEROS, 1)
    assert agrees(rebuilt(affine, {"self": ZEROS}), result, 1e-14)
    for u in (torch.ones_like(ZEROS), torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)):
        found, expected = affine.terms["self"].push(u)[:3], held(u)[:3]
        assert bool(torch.isfinite(found).all())
        assert agrees(found, expected, 1e-14)


def test_products_written_to_one_place_with_zeros() -> None:
    a, b = ZEROS[:3], ZEROS[:3].flip(1)
    arguments = bind(aten.scatter_reduce.two, (a, 1, PLACES.expand(3, 4), b, "prod"), {})
    result = reduced(a, b, "prod", True)
    affine = TABLE.rules[aten.scatter_reduce.two](Call(aten.scatter_reduce.two, arguments, result, frozenset({"self", "src"})))
    one = torch.ones_like(a)
    found = affine.terms["self"].push(one) + affine.terms["src"].push(one)
    assert agrees(found, shared_products(one, one, a, b, own=True), 1e-14)
