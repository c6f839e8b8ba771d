"""What a fresh process loads: `frpc --help` answers without PyTorch, and `import frpc` waits with it until it is needed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

import frpc
from frpc.errors import PackageError, require
from places import ROOT

HEAVY = ("torch", "sympy", "numpy", "matplotlib", "torchvision", "transformers", "PIL", "safetensors")
UNNEEDED = (
    "sympy",
    "matplotlib",
    "torchvision",
    "transformers",
    "lightning",
    "captum",
    "sklearn",
    "onnx",
    "ray",
    "pyarrow",
    "PIL",
)
CALL = "import sys; sys.argv = ['frpc', *sys.argv[1:]]\nfrom frpc.cli import main\n"


def python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", code, *arguments]
    return subprocess.run(command, text=True, capture_output=True, env=environment, timeout=120, **options)  # type: ignore[call-overload]


def loaded(code: str, *arguments: str) -> set[str]:
    """The packages that are loaded when a process ends."""
    report = "import atexit, json, sys; atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
    return {name.split(".")[0] for name in json.loads(python(report + code, *arguments).stderr.splitlines()[-1])}


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("explain", "--help"), ("map", "-h")])
def test_help_loads_nothing_heavy(arguments):
    assert loaded(CALL + "main()", *arguments).isdisjoint(HEAVY)


def test_import_frpc_loads_nothing():
    assert loaded("import frpc").isdisjoint((*HEAVY, "rich", "typer"))


def test_first_use_loads_no_package_that_it_does_not_need():
    found = loaded("import frpc; frpc.compile, frpc.check, frpc.rule, frpc.rules, frpc.load, frpc.examine, frpc.methods")
    assert "torch" in found and found.isdisjoint(UNNEEDED)


def test_every_public_name_is_there_and_stays_what_it_is():
    known = frpc._MODULES.keys() | frpc._DEFINED_IN.keys()
    assert known - set(frpc.__all__) == {"maps"} and set(frpc.__all__) <= set(dir(frpc))
    for name in frpc.__all__:
        try:
            found = getattr(frpc, name)
        except PackageError:
            continue  # frpc.lightning without Lightning
        assert vars(frpc)[name] is found is getattr(frpc, name)
    for name, module in frpc._DEFINED_IN.items():
        assert getattr(frpc, name) is getattr(importlib.import_module(module), name)
        taken = [path for path in (ROOT / "frpc" / name, ROOT / "frpc" / f"{name}.py") if path.exists()]
        assert not taken, f"importing {taken} would replace frpc.{name}"
    with pytest.raises(AttributeError, match="module 'frpc' has no attribute 'compil'"):
        frpc.compil  # noqa: B018


def test_one_place_holds_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "frpc.__version__"}
    assert python(CALL + "main()", "--version").stdout == f"frpc {frpc.__version__}\n"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_reader_that_stops_reading_gets_no_traceback(argument):
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", CALL + "main()", argument]
    with os.fdopen(write, "w") as pipe:
        result = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    assert result.returncode == 1 and result.stderr == ""


@pytest.mark.parametrize("module", ["rich.console", "torch"])
def test_an_interrupted_import_gives_no_traceback(module):
    interrupt = (
        "import sys\nclass Interrupt:\n    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\nsys.meta_path.insert(0, Interrupt())\n"
    )
    result = python(interrupt + CALL + "main()", "doctor", "--threads", "1")
    assert result.returncode == 130 and result.stderr == ""


def test_a_missing_package_is_named_with_the_extra_that_installs_it(tmp_path, monkeypatch):
    assert require("json.decoder", "text", "This") is importlib.import_module("json.decoder")
    with pytest.raises(PackageError) as caught:
        require("frpc_has_no_such.part", "ray", "Working on a cluster")
    assert str(caught.value) == (
        "Working on a cluster needs the package frpc_has_no_such, which is not installed.\n  Fix: pip install 'frpc[ray]'"
    )
    (tmp_path / "frpc_broken.py").write_text("import frpc_has_no_such")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PackageError, match=r"frpc_broken, which cannot be imported \(No module named 'frpc_has_no_such'\)"):
        require("frpc_broken", "ray", "This")


def test_every_extra_that_is_asked_for_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = {path: re.findall(r'require\([^,()]+, "(\w+)"', path.read_text()) for path in (ROOT / "frpc").rglob("*.py")}
    asked = {extra for found in calls.values() for extra in found}
    assert asked == {"baselines", "export", "lightning", "parquet", "ray", "text"} and asked <= extras.keys()
    raised = [path.name for path in calls if "raise PackageError" in path.read_text()]
    assert raised == ["errors.py"], "other files call frpc.errors.require"
