"""A random model as a file of source text: what stands at its head, the values in it, and what is asked of it."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HEAD", "Program", "Size", "Value"]

Size = int | str  # a number, or "B", the batch, or "3*B"
HEAD = """import torch
import torch.nn as nn
import torch.nn.functional as F


class Pair(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, h):
        out = torch.relu(self.linear(h))
        return out, out.sum(-1)


class Named(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, h, scale=1.0):
        aux = h * 2
        return {"aux": aux, "out": self.linear(h) * scale}


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self, h):
        return h + self.inside(h)

"""


@dataclass
class Value:
    """A variable of ``forward``.

    Attributes:
        name: what it is called.
        sizes: its dimensions.
    """

    name: str
    sizes: tuple[Size, ...]

    @property
    def batch(self) -> int | None:
        """The dimension that is the batch alone, if one is."""
        return self.sizes.index("B") if "B" in self.sizes else None

    def others(self, least: int = 1) -> list[int]:
        """Dimensions without samples, of at least that size."""
        return [d for d, n in enumerate(self.sizes) if isinstance(n, int) and n >= least]

    @property
    def elements(self) -> int:
        """Elements of one sample."""
        count = 1
        for n in self.sizes:
            count *= n if isinstance(n, int) else 1 if n == "B" else int(n.split("*")[0])
        return count


@dataclass
class Program:
    """A model as source text, and what is asked of it.

    Attributes:
        source: the file.
        inputs: the sizes of one sample of each input, by name; "ids" holds whole numbers.
        output: the ``output=`` to explain, where there are several.
        linear: the output is piecewise linear in its floating-point inputs, or in the embeddings of its whole numbers.
        fixed: the batch size the model insists on.
        named: inputs are given by keyword.
        lazy: compiled at the first call.
        example: batch size of the examples.
    """

    source: str
    inputs: dict[str, tuple[int, ...]]
    output: str | int | None
    linear: bool
    fixed: int | None
    named: bool
    lazy: bool
    example: int

    def build(self) -> nn.Module:
        """The model in float64 and evaluation mode; its lines are known to tracebacks."""
        name = f"user_program_{abs(hash(self.source)):x}.py"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"__name__": "user_program"}
        exec(compile(self.source, name, "exec"), scope)
        torch.manual_seed(0)
        model: nn.Module = scope["Net"]().double().eval()
        for part in model.modules():  # statistics of a batch that is not the standard one
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_().mul_(0.3)  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        return model

    def draw(self, batch: int, seed: int) -> dict[str, Tensor]:
        """Inputs of that many samples.

        Where maps are held against slopes no word comes twice in a sample: of two equal words the maximum takes the first,
        and autograd a half of each.
        """
        chance = torch.Generator().manual_seed(seed)

        def words(length: int) -> Tensor:
            if self.linear:
                return torch.rand(batch, 7, generator=chance).argsort(1)[:, :length]
            return torch.randint(0, 7, (batch, length), generator=chance)

        return {
            name: words(*shape) if name == "ids" else torch.randn((batch, *shape), generator=chance, dtype=torch.float64)
            for name, shape in self.inputs.items()
        }
