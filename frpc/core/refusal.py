"""A record of something that was not done, mostly an optimization, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

__all__ = ["Pass", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """Something that was not done.

    Attributes:
        what: what was not done, e.g. an optimization.
        where: node or module.
        why: the reason.
    """

    what: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} not used at {self.where}: {self.why}"


Pass = Callable[[fx.GraphModule], list[Refusal]]
