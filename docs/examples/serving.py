"""A web service for explained pictures, whatever computes them: requests that wait together are answered in one batch.

`POST /explain` takes the bytes of a picture and gives its map; the class and its score are in the headers. Nothing here knows of
PyTorch: `serve.py` answers with an explainer, `serve_onnx.py` with ONNX Runtime alone.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Answer = Callable[[Array], tuple[Array, Array]]
"""Takes inputs ``[B, 3, H, W]``; gives outputs ``[B, C]`` and the maps of the largest ones ``[B, 3, H, W]``."""
LARGEST_PICTURE = 20 * 10**6  # bytes


class OverloadedError(Exception):
    """More requests wait than the service promises to answer in time."""


@dataclass
class Waiting:
    """One request in the queue."""

    x: Array
    answer: asyncio.Future[tuple[Array, Array]]


class Batcher:
    """Answers requests in batches: as many as wait, up to ``largest``, and none waits longer than ``wait`` seconds for others.

    Args:
        answer: what computes a batch; runs in a thread of its own, one batch after another.
        largest: samples a batch.
        wait: seconds that the first request of a batch waits for others.
        queue: requests that may wait; one more is refused at once, since it would only make all others late.
    """

    def __init__(self, answer: Answer, largest: int = 8, wait: float = 0.002, queue: int = 32) -> None:
        self.answer, self.largest, self.wait = answer, largest, wait
        self.waiting: asyncio.Queue[Waiting] = asyncio.Queue(queue)
        self.thread = ThreadPoolExecutor(1, "answers")
        self.sizes: list[int] = []

    async def ask(self, x: Array) -> tuple[Array, Array]:
        """Answers one sample ``[3, H, W]``.

        Raises:
            OverloadedError: if the queue is full.
        """
        future: asyncio.Future[tuple[Array, Array]] = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait(Waiting(x, future))
        except asyncio.QueueFull as full:
            raise OverloadedError from full
        return await future

    async def run(self) -> None:
        """Answers until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            self.sizes.append(len(batch))
            try:
                found = await loop.run_in_executor(self.thread, self.answer, np.stack([one.x for one in batch]))
            except Exception as error:  # the requests of this batch fail, the service goes on
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            for one, output, relevance in zip(batch, *found, strict=True):
                if not one.answer.done():  # its client may have gone
                    one.answer.set_result((output, relevance))

    async def _collect(self) -> list[Waiting]:
        batch = [await self.waiting.get()]
        until = time.monotonic() + self.wait
        while len(batch) < self.largest:
            left = until - time.monotonic()
            try:
                batch.append(self.waiting.get_nowait() if left <= 0 else await asyncio.wait_for(self.waiting.get(), left))
            except (TimeoutError, asyncio.QueueEmpty):
                break
        return batch


def service(answer: Answer, read: Callable[[bytes], Array], names: list[str] | None = None, **batching: Any) -> FastAPI:
    """Returns the web application.

    Args:
        answer: see :data:`Answer`.
        read: turns the bytes of a picture into an input ``[3, H, W]``; raises ValueError for what is no picture.
        names: of the classes.
        batching: options of :class:`Batcher`.
    """
    batcher = Batcher(answer, **batching)
    readers = ThreadPoolExecutor(2, "pictures")

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="Explained pictures", lifespan=running)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"ok": True, "batches": len(batcher.sizes), "samples": sum(batcher.sizes)}

    @app.post("/explain")
    async def explain(
        request: Request, form: Annotated[Literal["png", "npy", "float32"], Query(alias="format")] = "png"
    ) -> Response:
        content = await request.body()
        if len(content) > LARGEST_PICTURE:
            raise HTTPException(413, f"The picture has {len(content)} bytes; {LARGEST_PICTURE} are taken.")
        try:
            x = await asyncio.get_running_loop().run_in_executor(readers, read, content)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        try:
            output, relevance = await batcher.ask(x)
        except OverloadedError as error:
            raise HTTPException(503, "Too many requests wait.", {"Retry-After": "1"}) from error
        return _response(output, relevance, form, names)

    return app


def _response(output: Array, relevance: Array, form: str, names: list[str] | None) -> Response:
    top = int(output.argmax())
    headers = {"X-Class": str(top), "X-Score": repr(float(output[top])), "X-Shape": ",".join(map(str, relevance.shape))}
    if names is not None:
        headers["X-Class-Name"] = names[top].encode("ascii", "replace").decode()
    if form == "png":
        return Response(png(relevance), media_type="image/png", headers=headers)
    if form == "npy":
        file = io.BytesIO()
        np.save(file, relevance)
        return Response(file.getvalue(), media_type="application/octet-stream", headers=headers)
    return Response(relevance.astype("<f4").tobytes(), media_type="application/octet-stream", headers=headers)


def png(relevance: Array) -> bytes:
    """A map ``[3, H, W]`` as a picture: red raised the score, blue lowered it, white did neither."""
    cells = relevance.sum(0)
    limit = max(float(np.quantile(np.abs(cells), 0.995)), np.finfo(np.float32).tiny)
    strength = np.clip(cells / limit, -1, 1)[..., None]
    red, blue = np.array([178, 24, 43]), np.array([33, 102, 172])
    colours = 255 + np.abs(strength) * (np.where(strength > 0, red, blue) - 255)
    file = io.BytesIO()
    Image.fromarray(colours.round().astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()
