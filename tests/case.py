"""One call of an operator that tests make, as a case; and short names for what cases are written with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

__all__ = [
    "K1",
    "K4",
    "KB",
    "KW",
    "Case",
    "D",
    "I",
    "One",
    "S",
    "Shape",
    "Twin",
    "Two",
    "V",
    "aten",
    "both",
    "constant",
    "direct",
    "frozen",
    "of",
]

aten = torch.ops.aten
Shape = tuple[int, ...]
Twin = Literal["reference", "jacobian", "piecewise", "quotient", "frozen"]


class One(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a)


class Two(nn.Module):
    """A function of two tensors, both carried."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op: the row of the rule table it is for.
        note: what is odd about it.
        build: makes the module; parameters are drawn from the seed the caller set.
        shapes: of the operands, batch first. The batch is 3: capture looks at two samples, and what it bakes in must show.
        twin: where the expected map comes from. "reference": `reference.py` knows the function. "jacobian": the function is
            J x + f(0) at its input, so the map is x * J^T seed. "piecewise": it is J x + c, with another c at another input.
            "quotient": elementwise, the map is f(x) - f(0). "frozen": the function with its coefficients held, see `frozen`.
        positive: the function is defined for positive operands only.
        frozen: `g(*x, *at)`, affine in x with coefficients taken at `at`, and equal to the function at x = at.
        arguments: None where the operator stands in the canonical graph; else the call's own, and the rule is asked directly.
    """

    op: OpOverload
    note: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    twin: Twin = "reference"
    positive: bool = False
    arguments: tuple[object, ...] | None = None
    frozen: Callable[..., Tensor] | None = None

    @property
    def id(self) -> str:
        return f"{str(self.op).removeprefix('aten.').removesuffix('.default')} {self.note}".strip()

    def module(self) -> nn.Module:
        """The model in float64 and evaluation mode; batch statistics and affine parameters are no identities."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.build().double().eval()
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_()
                    part.running_var.uniform_(0.5, 2.0)
                    if part.affine:
                        nn.init.normal_(part.weight)
                        nn.init.normal_(part.bias)
        return module if len(self.shapes) > 1 else nn.Sequential(module)

    def inputs(self, batch: int | None = None, seed: int = 1) -> tuple[Tensor, ...]:
        """Operands, all with a batch of `batch` samples in place of the case's own."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [shape if batch is None else (batch, *shape[1:]) for shape in self.shapes]
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        return tuple(x.abs() + 0.1 if self.positive else x for x in drawn)


def frozen(
    op: OpOverload,
    note: str,
    function: Callable[..., Tensor],
    held: Callable[..., Tensor],
    *shapes: Shape,
    positive: bool = False,
) -> Case:
    """A function whose account holds some of its values as coefficients: `held` says which."""
    return Case(op, note, of(function) if len(shapes) == 1 else both(function), shapes, "frozen", positive, frozen=held)


def of(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: One(function)


def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Two(function)


def direct(op: OpOverload, *arguments: object, shape: Shape, twin: Twin = "jacobian") -> Case:
    """A call that the canonical graph spells in another way."""
    return Case(op, "", of(lambda a: op(a, *arguments)), (shape,), twin, arguments=arguments)


def constant(*shape: int) -> Tensor:
    """A fixed tensor, no entry of which is near 0."""
    return 0.3 + torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape) / 4


V, S, I, D = (3, 4), (3, 4, 6), (3, 4, 7, 5), (3, 2, 4, 5, 3)  # noqa: E741 - a vector, a sequence, an image, a volume
K4, K1 = constant(4), constant(4, 1, 1)
KW, KB = constant(6), constant(6) - 1.0
