"""What a lowering pass says about a place it left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

__all__ = ["Pass", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """Something faster that was not done.

    Attributes:
        what: the improvement.
        where: node or module.
        why: the reason.
    """

    what: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} not used at {self.where}: {self.why}"


Pass = Callable[[fx.GraphModule], list[Refusal]]
