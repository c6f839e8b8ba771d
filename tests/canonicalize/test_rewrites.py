"""Rewrites: each pass changes what it should and nothing that only looks alike, and what is computed stays the same.

A pass that is listed nowhere, or has no near misses, fails :func:`test_every_pass_has_near_misses`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import rewrites_canonical
import rewrites_programs
from rewrites import Rewrite, agree, check_random_graphs, rewritten, written

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
torch.library.define("near::_assert_scalar_like", "(Tensor x) -> Tensor")
torch.library.impl("near::_assert_scalar_like", "CompositeExplicitAutograd", lambda x: x * 2)

ALL: tuple[Rewrite, ...] = (*rewrites_canonical.REWRITES, *rewrites_programs.REWRITES)
FIRES = [pytest.param(r, line, id=f"{r.name}: {line.what}") for r in ALL for line in r.fires]
NEAR = [pytest.param(r, line, id=f"{r.name}: {line.what}") for r in ALL for line in r.near]


@pytest.mark.parametrize(("rewrite", "line"), FIRES)
def test_what_is_rewritten(rewrite: Rewrite, line: Any) -> None:
    before, shapes = written(line, rewrite.dtype)
    after, changed = rewritten(rewrite.run, before)
    assert changed
    assert agree(rewrite, before, after, shapes, not line.fixed) > 0


@pytest.mark.parametrize(("rewrite", "line"), NEAR)
def test_what_only_looks_alike(rewrite: Rewrite, line: Any) -> None:
    _, changed = rewritten(rewrite.run, written(line, rewrite.dtype)[0])
    assert not changed


def test_every_pass_has_near_misses() -> None:
    listed = Counter(r.run for r in ALL for _ in r.near)
    missing = [p.__name__ for p in {*rewrites_canonical.EVERY, *rewrites_programs.EVERY} if not listed[p]]
    assert missing == [], "passes without near misses in tests/rewrites_*.py"


DRAWN = [pytest.param(r, id=r.name) for r in ALL if r.drawn and r.fires]


@pytest.mark.parametrize("rewrite", DRAWN)
def test_random_graphs_keep_their_function(rewrite: Rewrite) -> None:
    check_random_graphs(rewrite, 5)


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", DRAWN)
def test_many_random_graphs_keep_their_function(rewrite: Rewrite) -> None:
    check_random_graphs(rewrite, 300)
