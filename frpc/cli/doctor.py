"""`frpc demo` and `frpc doctor`: ten explained digits, and what is installed, what it runs on, and whether it works here."""

from __future__ import annotations

import importlib.util
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from frpc.cli.session import INTERNAL, JsonOption, ThreadsOption, print_pairs, print_table, session

__all__ = ["demo", "doctor"]

REQUIRED = ("frpc", "torch", "numpy", "safetensors", "matplotlib", "pillow", "typer", "rich", "jinja2", "filelock")
OPTIONAL = {  # name on the package index: import name
    "torchvision": "torchvision",
    "triton": "triton",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "captum": "captum",
}
LIMITS = {"float32": 1e-6, "float64": 1e-12}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet.")] = Path("frpc-demo"),
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain ten handwritten digits with a bundled net. Needs no network."""
    with session(as_json, threads) as current:
        from frpc.assets.digits import run

        result = run(out, current.console)
        _print_demo(current.console, result)
        current.finish(result)


def _print_demo(console: Console, result: dict[str, Any]) -> None:
    net = result["net"]
    console.print(f"{net['model']}, {net['parameters']:,} parameters, {100 * net['test_accuracy']:.2f} % of 10,000 test digits\n")
    rows = []
    for digit in result["digits"]:
        for rank, (name, logit, total) in enumerate(zip(digit["classes"], digit["logits"], digit["sums"], strict=True)):
            role = ("predicted", "runner-up")[rank]
            first = str(digit["label"]) if rank == 0 else ""
            rows.append((first, f"{name} {role}", f"{logit:+.5f}", f"{total:+.5f}"))
    print_table(console, ("digit", "class", "logit", "map sum"), rows, words=("digit", "class"))
    console.print(f"\nlargest |sum V - logit| / sum|V|: {result['conservation_error']:.1e}")
    console.print(f"look at {result['files'][0]}")


def doctor(threads: ThreadsOption = None, as_json: JsonOption = False) -> None:
    """Print versions, devices and optional packages, and check that the map of a small net adds up."""
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
    pairs = [("python", f"{result['python']}, {result['platform']}")]
    for name, found in (result["packages"] | result["optional"]).items():
        pairs.append((name, found or ("not installed (optional)" if name in OPTIONAL else "no package metadata")))
    pairs += [("device", device) for device in result["devices"]]
    check = result["self_check"]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in check["errors"].items())
    verdict = "passed" if check["ok"] else "FAILED"
    pairs.append(("self-check", f"{verdict}: |sum V - y| / sum|V| = {errors}, in {check['seconds']:.1f} s"))
    print_pairs(console, pairs)
