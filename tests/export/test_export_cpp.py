"""The C++ example, compiled against the installed libtorch: it gives the explainer's maps."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import frpc
from frpc.export import aoti
from places import EXAMPLES

SOURCE = EXAMPLES / "explain.cpp"
pytestmark = [pytest.mark.export, pytest.mark.slow]


def compiled(folder: Path) -> Path:
    """The example as a program; skips where there is no compiler."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, clang++) is installed")
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    names = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]  # all of it: the package is linked against libtorch
    if torch.version.cuda is not None:
        names += ["-ltorch_cuda", "-lc10_cuda"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    program = folder / "explain"
    command = [compiler, "-std=c++20", "-O1", abi, *headers, str(SOURCE), "-o", str(program), *libraries, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def test_maps_in_cpp(tmp_path: Path) -> None:
    program = compiled(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 5)).eval()
    x = torch.randn(4, 3, 14, 14)
    explainer = frpc.compile(model, (x[:1],))
    aoti(explainer, tmp_path / "model.pt2")
    x.numpy().tofile(tmp_path / "x.bin")
    command = [program, tmp_path / "model.pt2", tmp_path / "x.bin", "4x3x14x14", "3", tmp_path / "map.bin"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.from_numpy(np.fromfile(tmp_path / "map.bin", np.float32)).reshape(x.shape)
    expected = explainer(x, target=3)
    assert float((found - expected.relevance).abs().sum() / expected.relevance.abs().sum()) <= 1e-5
    score, total = (float(part.split()[-1]) for part in done.stdout.split(","))
    assert abs(score - float(expected.output[0, 3])) <= 1e-4 * abs(score)
    assert abs(total - score) <= 1e-4 * float(expected.relevance[0].abs().sum())
