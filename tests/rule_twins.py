"""Relevance of one operator computed without rules, and the affine form that its rule gives for one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from frpc.core.graph import bind
from frpc.rules.table import TABLE, Affine, Call
from reference import relevance_maps

__all__ = ["TWINS", "agrees", "from_frozen", "from_piece", "randn_like", "rebuilt", "rule_at"]


def randn_like(x: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def agrees(found: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    """Relative L1; where nothing is expected nothing may be found."""
    return found.shape == expected.shape and bool((found - expected).abs().sum() <= bound * expected.abs().sum())


# Affine forms -----------------------------------------------------------------------------------------------------------


def rebuilt(affine: Affine, operands: dict[str | tuple[str, int], Tensor]) -> Tensor:
    """`sum_k M_k a_k + c`."""
    terms = [affine.terms[name].push(a) for name, a in operands.items()]
    total = sum(terms[1:], terms[0])
    return total if affine.constant is None else total + affine.constant


def rule_at(op: torch._ops.OpOverload, a: Tensor, *arguments: object, **named: object) -> tuple[Affine, Tensor]:
    """The rule's affine form of one call, and the call's result."""
    out = op(a, *arguments, **named)
    first = op._schema.arguments[0].name
    call = Call(op, bind(op, (a, *arguments), named), out, frozenset({first}))
    return TABLE.rules[op](call), call.value


# Twins ------------------------------------------------------------------------------------------------------------------


def from_reference(module: nn.Module, inputs: tuple[Tensor, ...], seed: Tensor) -> Tensor:
    """The thesis's recursion, dense: `sum_o seed_o V_o` of each sample."""
    maps = relevance_maps(module, inputs).maps.flatten(1, -2)  # [B, O, N]
    return torch.einsum("bo,bon->bn", seed.flatten(1), maps)


def from_jacobian(module: nn.Module, inputs: tuple[Tensor, ...], seed: Tensor) -> Tensor:
    """`x * J^T seed + <f(0), seed> / N`, which is the map wherever `f(x) = J x + f(0)`."""
    with torch.no_grad():
        at_zero = module(*(torch.zeros_like(x) for x in inputs))
    found, expected = from_piece(module, inputs, seed), from_piece(module, inputs, seed, at_zero)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11), "f is not J x + f(0)"
    return expected


def from_piece(module: nn.Module, inputs: tuple[Tensor, ...], seed: Tensor, constant: Tensor | None = None) -> Tensor:
    """`x * J^T seed + <c, seed> / N`, where `c = f(x) - J x` is the constant of this piece if none is given."""
    output, gradients = torch.autograd.functional.vjp(module, inputs, seed)
    local = torch.cat([(x * g).flatten(1) for x, g in zip(inputs, gradients, strict=True)], 1)
    share = (output * seed).flatten(1).sum(1) - local.sum(1) if constant is None else (constant * seed).flatten(1).sum(1)
    return local + share[:, None] / local.shape[1]


def from_quotient(module: nn.Module, inputs: tuple[Tensor, ...], seed: Tensor) -> Tensor:
    """Elementwise: `seed (f(x) - f(0)) + <f(0), seed> / N`, with f(0) = 0 where there is none."""
    (x,) = inputs
    with torch.no_grad():
        at_zero = module(torch.zeros_like(x)).nan_to_num(0.0, 0.0, 0.0)
        local = (seed * (module(x) - at_zero)).flatten(1)
    return local + (seed * at_zero).flatten(1).mean(1, keepdim=True)


def from_frozen(held: Callable[..., Tensor], module: nn.Module, inputs: tuple[Tensor, ...], seed: Tensor) -> Tensor:
    """The Jacobian's map of the function with its coefficients held: `x * J^T seed + <g(0), seed> / N`."""
    with torch.no_grad():
        assert agrees(held(*inputs, *inputs), module(*inputs), 1e-12), "with nothing changed, the held function is the function"
    return from_jacobian(Function(lambda *x: held(*x, *inputs)), inputs, seed)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


TWINS = {"reference": from_reference, "jacobian": from_jacobian, "piecewise": from_piece, "quotient": from_quotient}
