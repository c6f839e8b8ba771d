"""`frpc doctor`: what is installed, what it runs on, and whether it works here."""

from __future__ import annotations

import importlib.util
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from frpc.cli.session import INTERNAL, JsonOption, ThreadsOption, session

__all__ = ["doctor"]

REQUIRED = ("frpc", "torch", "numpy", "safetensors", "matplotlib", "pillow", "typer", "rich")
OPTIONAL = {  # name on the package index: import name
    "torchvision": "torchvision",
    "triton": "triton",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "captum": "captum",
}
LIMITS = {"float32": 1e-6, "float64": 1e-12}


def doctor(threads: ThreadsOption = None, as_json: JsonOption = False) -> None:
    """Print versions, devices and optional packages, and check that a small net's account balances."""
    with session(as_json, threads) as current:
        result = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in REQUIRED},
            "optional": {name: _version(name) if importlib.util.find_spec(module) else None
                         for name, module in OPTIONAL.items()},
            "devices": _devices(),
            "self_check": _self_check(),
        }  # fmt: skip
        _print(current.console, result)
        current.finish(result)
        if not result["self_check"]["ok"]:  # type: ignore[index]
            raise typer.Exit(INTERNAL)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    names = [f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return names


def _self_check() -> dict[str, Any]:
    """Compiles a small net in both precisions and measures ``|sum V - y| / sum|V|``."""
    import torch
    from torch import nn

    import frpc

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    errors = {}
    for name in LIMITS:
        dtype = getattr(torch, name)
        x = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)
        output, relevance = frpc.compile(net.to(dtype), (x,))(x, target=3)
        relevance = relevance.double().flatten(1)
        gap = (relevance.sum(1) - output[:, 3].double()).abs()
        errors[name] = float((gap / relevance.abs().sum(1)).max())
    ok = all(errors[name] <= limit for name, limit in LIMITS.items())
    return {"ok": ok, "errors": errors, "seconds": time.perf_counter() - start}


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("python", f"{result['python']}, {result['platform']}")
    for name, found in (result["packages"] | result["optional"]).items():
        table.add_row(name, found or ("not installed (optional)" if name in OPTIONAL else "no package metadata"))
    for device in result["devices"]:
        table.add_row("device", device)
    check = result["self_check"]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in check["errors"].items())
    verdict = "balanced" if check["ok"] else "NOT BALANCED"
    table.add_row("self-check", f"{verdict}: |sum V - y| / sum|V| = {errors}, in {check['seconds']:.1f} s")
    console.print(table)
