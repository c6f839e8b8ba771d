"""Thousands of damaged and forged program files: each is refused or read, none crashes, hangs or runs anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import frpc
from places import TESTS

MUTANTS = TESTS / "mutants.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound files of all kinds: weights stored and by reference, bounds, several references, layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    x = torch.linspace(-1, 1, 144, dtype=torch.float64).reshape(2, 2, 6, 6)
    made = tmp_path_factory.mktemp("sound")
    plain = frpc.compile(model, (x,))
    plain.at("1", x, target=1)
    plain.save(made / "stored.frpc")
    plain.save(made / "reference.frpc", weights="reference")
    frpc.compile(model, (x,), rule=frpc.rules.ZBox(low=-torch.ones(2, 1, 1), high=1.0)).save(made / "box.frpc", columns=False)
    two = frpc.rules.LID(reference=torch.stack([torch.zeros(2, 6, 6), torch.ones(2, 6, 6)]).double())
    frpc.compile(model, (x,), rule=two).save(made / "two.frpc", columns=False)
    save_file(model.state_dict(), made / "state.safetensors")
    return made


def read(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A process may take ten times as long as it needs; one that hangs is ended, and fails the test."""
    command = [sys.executable, str(MUTANTS), str(folder), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(report: dict[str, Any], count: int) -> None:
    assert report["wrong"] == []
    assert report["seen"] == {}, "code ran, or something else was touched"
    outcomes = report["outcomes"]
    assert outcomes["refused"] + outcomes.get("read", 0) == count
    assert report["different"] > 0.8 * count, "mutants repeat each other"
    assert outcomes["refused"] > 0.5 * count, "mutants are no mutants"
    assert outcomes["it contains"] > 0.25 * count, "mutants do not come past the checksum"


def test_mutants_are_refused_or_read_and_run_nothing(folder: Path) -> None:
    check(read(folder, 300, 0), 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_mutants(folder: Path, seed: int) -> None:
    check(read(folder, 2000, seed), 2000)
