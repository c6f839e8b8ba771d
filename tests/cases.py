"""One line for each operator in the rule table, and more where its parameters are odd; the tests of the rules run them all.

A case is a function or a module of one or two carried tensors, batch first. Where an operator never survives into a
canonical graph (a copy, an alias), the case names the call itself with `direct`.
"""

from __future__ import annotations

from case import Case
from cases_layers import LAYERS
from cases_places import PLACED
from cases_values import VALUES

__all__ = ["CASES"]

CASES: tuple[Case, ...] = (*VALUES, *PLACED, *LAYERS)
