"""The serving examples under load: requests come at random times, whether or not earlier ones are answered.

Each example runs in a process of its own. Delays count from the time a request was due, so that a service which falls behind
cannot hide it by slowing its clients down.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from bench.machine import machine, make_table, open_console, write_record

__all__ = ["run"]

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PORT = 8731
START_SECONDS = 600


def run(net: str, weights: Path, rates: Sequence[float], seconds: float, threads: int, file: Path | None) -> int:
    """Measures both services at every rate; returns the exit code."""
    console, where = open_console(), machine(threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model.onnx"
        _export(net, weights, exported)
        commands = {
            "PyTorch": ["serve.py", "--model", net, "--weights", str(weights.resolve())],
            "ONNX Runtime": ["serve_onnx.py", str(exported)],
        }
        for name, command in commands.items():
            with _server([*command, "--threads", str(threads), "--port", str(PORT)], threads):
                asyncio.run(_load(2.0, 3.0))  # warms up
                results += [{"service": name, "rate": rate, **asyncio.run(_load(rate, seconds))} for rate in rates]
    table = make_table(
        "service", "requests/s", "answered", "refused", "p50 ms", "p95 ms", "p99 ms", "largest ms", "samples a batch"
    )
    for found in results:
        delays = [f"{found[name]:.0f}" for name in ("p50", "p95", "p99", "largest")]
        counts = (f"{found['rate']:g}", str(found["answered"]), str(found["refused"]))
        table.add_row(found["service"], *counts, *delays, f"{found['samples a batch']:.2f}")
    console.print(table)
    write_record(console, file, "serving", {"net": net, "seconds": seconds}, where, results)
    return 0


def _export(net: str, weights: Path, out: Path) -> None:
    arguments = ["export", "--model", net, "--weights", str(weights), "--to", "onnx", "--targets", "top", "--out", str(out)]
    subprocess.run([sys.executable, "-c", "from frpc.cli import main; main()", *arguments], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _server(command: Sequence[str], threads: int) -> Iterator[None]:
    """A service that runs until the block ends."""
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *command], cwd=EXAMPLES, env=settings)
    try:
        until = time.monotonic() + START_SECONDS
        while not _healthy():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def _healthy() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200
    except httpx.TransportError:
        return False


def _photo(seed: int) -> bytes:
    """A smooth random picture of 400 x 300 as JPEG: decoding it costs what a photo's costs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


async def _load(rate: float, seconds: float) -> dict[str, Any]:
    """Sends requests at exponentially distributed distances; delays in milliseconds."""
    chance = random.Random(0)
    photos = [_photo(seed) for seed in range(8)]
    delays: list[float] = []
    refused = 0

    async def ask(client: httpx.AsyncClient, content: bytes, due: float) -> None:
        nonlocal refused
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        answer = await client.post("/explain?format=png", content=content)
        if answer.status_code == 503:
            refused += 1
        else:
            answer.raise_for_status()
            delays.append(1e3 * (time.monotonic() - due))

    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{PORT}", timeout=120, limits=httpx.Limits(max_connections=500)
    ) as client:
        before = (await client.get("/health")).json()
        due, asked = time.monotonic(), []
        end = due + seconds
        while (due := due + chance.expovariate(rate)) < end:
            asked.append(asyncio.create_task(ask(client, photos[len(asked) % len(photos)], due)))
        await asyncio.gather(*asked)
        after = (await client.get("/health")).json()
    p50, p95, p99 = np.quantile(delays, [0.5, 0.95, 0.99])
    batches = after["batches"] - before["batches"]
    return {
        "answered": len(delays), "refused": refused, "p50": float(p50), "p95": float(p95), "p99": float(p99),
        "largest": max(delays), "samples a batch": (after["samples"] - before["samples"]) / batches,
    }  # fmt: skip
