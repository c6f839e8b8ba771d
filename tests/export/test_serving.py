"""The serving examples: batches, formats, overload; and ONNX Runtime alone, in a process that never imports PyTorch."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import frpc
from frpc.export import onnx
from frpc.integrations.images import Recipe
from places import EXAMPLES

pytestmark = pytest.mark.export


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import serving

    return serving


def photo(seed: int = 0, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def fake(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two classes whose scores tell the sample; the map is the input."""
    score = x.mean((1, 2, 3))
    return np.stack([score, -score], 1), x


def read(content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    except OSError as error:
        raise ValueError("no picture") from error


async def posted(app: Any, contents: list[bytes], form: str = "float32") -> list[Any]:
    """Sends requests at the same time, to an application that runs."""
    httpx = pytest.importorskip("httpx")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test") as client,
    ):
        return await asyncio.gather(*(client.post(f"/explain?format={form}", content=content) for content in contents))


def test_requests_that_wait_are_answered_together(serving: ModuleType) -> None:
    """The first is taken at once; the others wait for it, and each gets its own answer, in batches of three at most."""
    sizes: list[int] = []
    started, go = threading.Event(), threading.Event()

    def slow(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(x))
        started.set()
        assert go.wait(20)
        return fake(x)

    async def ask() -> list[Any]:
        batcher = serving.Batcher(slow, largest=3, wait=0.0)
        task = asyncio.create_task(batcher.run())
        samples = [np.full((3, 2, 2), value, np.float32) for value in range(8)]
        questions = [asyncio.create_task(batcher.ask(samples[0]))]
        await asyncio.to_thread(started.wait, 20)
        questions += [asyncio.create_task(batcher.ask(sample)) for sample in samples[1:]]
        await asyncio.sleep(0)  # all of them are in the queue
        go.set()
        found = await asyncio.gather(*questions)
        task.cancel()
        return found

    found = asyncio.run(ask())
    assert [float(output[0]) for output, _ in found] == list(range(8))
    assert all((relevance == value).all() for value, (_, relevance) in enumerate(found))
    assert sizes == [1, 3, 3, 1]


def test_what_would_wait_too_long_is_refused(serving: ModuleType) -> None:
    """With one in work and two in the queue, the others are refused at once."""
    go = threading.Event()

    def slow(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        go.wait(20)
        return fake(x)

    async def ask() -> list[Any]:
        batcher = serving.Batcher(slow, largest=1, wait=0.0, queue=2)
        task = asyncio.create_task(batcher.run())
        questions = [asyncio.create_task(batcher.ask(np.zeros((3, 2, 2), np.float32)))]
        await asyncio.sleep(0.05)
        questions += [asyncio.create_task(batcher.ask(np.zeros((3, 2, 2), np.float32))) for _ in range(4)]
        await asyncio.sleep(0.05)
        go.set()
        found = await asyncio.gather(*questions, return_exceptions=True)
        task.cancel()
        return found

    found = asyncio.run(ask())
    assert [type(f).__name__ for f in found] == ["tuple", "tuple", "tuple", "OverloadedError", "OverloadedError"]


def test_a_batch_that_fails_stops_nothing(serving: ModuleType) -> None:
    def answer(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if x.max() > 1:
            raise RuntimeError("out of memory")
        return fake(x)

    async def ask() -> list[Any]:
        batcher = serving.Batcher(answer, wait=0.0)
        task = asyncio.create_task(batcher.run())
        found = []
        for value in (2.0, 1.0):
            found += await asyncio.gather(batcher.ask(np.full((3, 2, 2), value, np.float32)), return_exceptions=True)
        task.cancel()
        return found

    failed, answered = asyncio.run(ask())
    assert isinstance(failed, RuntimeError)
    assert float(answered[0][0]) == 1


def test_formats(serving: ModuleType) -> None:
    contents = [photo()]
    raw, stored, drawn = (
        asyncio.run(posted(serving.service(fake, read, ["bright", "dark"]), contents, form))[0]
        for form in ("float32", "npy", "png")
    )
    expected = read(contents[0])
    assert raw.status_code == stored.status_code == drawn.status_code == 200
    shape = tuple(map(int, raw.headers["X-Shape"].split(",")))
    assert (np.frombuffer(raw.content, "<f4").reshape(shape) == expected).all()
    assert (np.load(io.BytesIO(stored.content)) == expected).all()
    assert Image.open(io.BytesIO(drawn.content)).size == (50, 40)
    assert raw.headers["X-Class"] == "0"
    assert raw.headers["X-Class-Name"] == "bright"
    assert np.isclose(float(raw.headers["X-Score"]), expected.mean(dtype=np.float64), rtol=1e-6)


def test_colours_of_a_map(serving: ModuleType) -> None:
    """Red above, blue below, white at nothing."""
    relevance = np.zeros((3, 1, 3), np.float32)
    relevance[:, 0, 0], relevance[:, 0, 1] = 1, -1
    red, blue, white = np.asarray(Image.open(io.BytesIO(serving.png(relevance))))[0].tolist()
    assert red[0] > red[2] and blue[2] > blue[0] and white == [255, 255, 255]


def test_bad_requests(serving: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LARGEST_PICTURE", 30_000)
    app = serving.service(fake, read)
    bad, large = asyncio.run(posted(app, [b"no picture", b"\0" * 30_001]))
    assert (bad.status_code, bad.json()["detail"]) == (400, "no picture")
    assert (large.status_code, large.json()["detail"]) == (413, "The picture has 30001 bytes; 30000 are taken.")
    assert asyncio.run(posted(app, [photo()], "gif"))[0].status_code == 422


@pytest.fixture(scope="module")
def explainer() -> frpc.Explainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 5)).eval()
    return frpc.compile(model, (torch.randn(1, 3, 32, 32),))


def adds_up(found: list[Any]) -> None:
    """Each map sums to the score beside it."""
    for one in found:
        relevance = np.load(io.BytesIO(one.content)).astype(np.float64)
        assert relevance.shape == (3, 32, 32)
        assert abs(relevance.sum() - float(one.headers["X-Score"])) <= 1e-6 * np.abs(relevance).sum()


def test_the_pytorch_service(serving: ModuleType, explainer: frpc.Explainer) -> None:
    import serve

    app = serving.service(serve.answer_of(explainer), serve.reader_of(Recipe(resize=36, crop=32)))
    found = asyncio.run(posted(app, [photo(seed) for seed in range(5)], "npy"))
    adds_up(found)
    x = torch.from_numpy(np.stack([serve.reader_of(Recipe(resize=36, crop=32))(photo(seed)) for seed in range(5)]))
    assert [int(one.headers["X-Class"]) for one in found] == explainer.predict(x).argmax(1).tolist()


ALONE = """
import asyncio, io, json, sys
from pathlib import Path
import httpx, numpy as np
import serve_onnx
from serving import service

session = serve_onnx.session_of(Path(sys.argv[1]), 1)
app = service(serve_onnx.answer_of(session), serve_onnx.reader_of(32))

async def ask():
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/explain?format=npy", content=Path(sys.argv[2]).read_bytes())

found = asyncio.run(ask())
relevance = np.load(io.BytesIO(found.content)).astype(np.float64)
error = abs(relevance.sum() - float(found.headers["X-Score"])) / np.abs(relevance).sum()
loaded = [name for name in ("torch", "torchvision", "frpc") if name in sys.modules]
print(json.dumps({"status": found.status_code, "shape": relevance.shape, "error": error, "loaded": loaded}))
"""


def test_onnx_runtime_alone(serving: ModuleType, explainer: frpc.Explainer, tmp_path: Path) -> None:
    """Class and map from ONNX Runtime, and neither torch nor frpc is loaded in that process."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    onnx(explainer, tmp_path / "a.onnx", targets="top")
    (tmp_path / "photo.png").write_bytes(photo())
    command = [sys.executable, "-c", ALONE, str(tmp_path / "a.onnx"), str(tmp_path / "photo.png")]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    import json

    said = json.loads(done.stdout)
    assert (said["status"], said["shape"], said["loaded"]) == (200, [3, 32, 32], [])
    assert said["error"] <= 1e-6


def test_both_services_read_pictures_alike(serving: ModuleType) -> None:
    """As torchvision does: shorter side to 256/224 of the crop, centre, mean and deviation of ImageNet."""
    pytest.importorskip("onnxruntime")
    import serve
    import serve_onnx

    readers: list[Callable[[bytes], np.ndarray]] = [serve.reader_of(Recipe(resize=37, crop=32)), serve_onnx.reader_of(32)]
    one, other = (reader(photo(3, "JPEG")) for reader in readers)
    assert np.abs(one - other).max() <= 1e-5
    for reader in readers:
        with pytest.raises(ValueError, match="Pillow"):
            reader(b"no picture")
