"""Serves an exported classifier with its explanations from ONNX Runtime: no PyTorch, no frpc in the process.

frpc export --model squeezenet1_0 --weights weights.safetensors --to onnx --targets top --out model.onnx
python docs/examples/serve_onnx.py model.onnx
curl --data-binary @photo.jpg 'localhost:8000/explain?format=png' -D - -o map.png
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from PIL import Image, UnidentifiedImageError
from serving import Answer, Array, service

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
RESIZE = 256 / 224  # the shorter side over the crop's


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Opens the file; its metadata says what it answers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["frpc"])
    if about["question"]["targets"] != "top":
        raise SystemExit(f"{path} asks which class to explain; export it with --targets top.")
    return session


def answer_of(session: onnxruntime.InferenceSession) -> Answer:
    """The output of each sample, and the map of its largest number, in one pass."""
    name = session.get_inputs()[0].name

    def answer(x: Array) -> tuple[Array, Array]:
        output, relevance, _ = session.run(None, {name: x})
        return output, relevance

    return answer


def reader_of(side: int) -> Callable[[bytes], Array]:
    """Turns a picture's bytes into an input: shorter side resized, centre cut, normalised."""

    def read(content: bytes) -> Array:
        try:
            with Image.open(io.BytesIO(content)) as picture:
                image = picture.convert("RGB")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"no picture that Pillow reads: {error}") from error
        scale = round(side * RESIZE) / min(image.size)
        image = image.resize(
            (max(side, int(image.width * scale)), max(side, int(image.height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (round((length - side) / 2) for length in image.size)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves an exported classifier from ONNX Runtime.")
    parser.add_argument("file", type=Path, help="an ONNX file written with --targets top")
    parser.add_argument("--names", type=Path, help="a text file with one class name a line")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    given = parser.parse_args()
    session = session_of(given.file, given.threads)
    names = given.names.read_text(encoding="utf-8").splitlines() if given.names else None
    app = service(answer_of(session), reader_of(session.get_inputs()[0].shape[-1]), names)
    uvicorn.run(app, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
