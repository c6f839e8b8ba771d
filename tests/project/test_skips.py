"""Skipped tests are listed with their reasons, and what a clean environment has to run may not be among them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import skips
from places import TESTS


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("no CUDA device", "GPU"),
        ("could not import 'ray': No module named 'ray'", "Ray"),
        ("could not import 'lightning': No module named 'lightning'", "Lightning"),
        ("the others run with -m slow", "slow"),
        ("needs ../shared/data/mnist beside the repository", "shared data"),
        ("MNIST is not at /a/shared/data/mnist", "shared data"),
        ("could not import 'captum': No module named 'captum'", None),
        ("could not import 'onnxruntime'", None),
        ("the file is not at /a/b", None),
        ("could not import 'rayon'", None),
    ],
)
def test_kinds_are_told_by_their_reasons(reason: str, kind: str | None) -> None:
    assert skips.kind_of(reason) == kind


SOME = """
import pytest
pytest.importorskip("{module}")
def test_one(): pass
"""
MORE = """
import pytest
def test_two(): pytest.skip("{reason}")
@pytest.mark.skipif(True, reason="no CUDA device")
def test_three(): pass
@pytest.mark.xfail(reason="known", strict=True)
def test_four(): assert False
def test_five(): pass
"""


@pytest.mark.parametrize(
    ("module", "reason", "status", "workers"),
    [
        ("ray", "the others run with -m slow", 0, "0"),
        pytest.param("ray", "the others run with -m slow", 0, "2", marks=pytest.mark.slow),
        ("no_such_module", "the others run with -m slow", 1, "0"),
        ("no_such_module", "the others run with -m slow", 1, "2"),
        pytest.param("ray", "not today", 1, "0", marks=pytest.mark.slow),
        ("ray", "not today", 1, "2"),
    ],
)
def test_a_skip_that_is_not_allowed_fails_the_run(
    module: str, reason: str, status: int, workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole file, or of a test; in one process, or in workers."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of the run around this one
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_some.py").write_text(SOME.format(module=module))
    (tmp_path / "test_more.py").write_text(MORE.format(reason=reason))
    plugins = [part for name in ("no:cacheprovider", "xdist", "skips") for part in ("-p", name)]
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", *plugins, "-n", workers]
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS}\n")
    (tmp_path / "ray").mkdir()  # whether it is installed here or not
    (tmp_path / "ray" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\")")
    done = subprocess.run([*command, "--strict-skips"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "skipped, GPU: 1 x no CUDA device" in done.stdout and "known" not in done.stdout
    named = "test_some.py" if module != "ray" else "test_more.py::test_two"
    assert (f"may not be skipped: {named}" in done.stdout) == bool(status)
    if status and workers == "0":
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert again.returncode == 0  # only where it is asked for
