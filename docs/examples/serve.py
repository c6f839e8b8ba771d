"""Serves a torchvision classifier with its explanations, from PyTorch.

pip install 'frpc[serve]'
python docs/examples/serve.py --model squeezenet1_0 --weights weights.safetensors
curl --data-binary @photo.jpg 'localhost:8000/explain?format=png' -D - -o map.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import uvicorn
from serving import Answer, Array, service

import frpc
from frpc.errors import ImageError


def answer_of(explainer: frpc.Explainer) -> Answer:
    """The class of each sample, and its map: one forward pass to know the class, and one explained pass."""

    def answer(x: Array) -> tuple[Array, Array]:
        with torch.inference_mode():
            inputs = torch.from_numpy(x)
            found = explainer(inputs, target=explainer.predict(inputs).argmax(1))
            assert isinstance(found.relevance, torch.Tensor)
            return found.output.numpy(), found.relevance.numpy()

    return answer


def reader_of(how: frpc.images.Recipe) -> Callable[[bytes], Array]:
    """Turns a picture's bytes into an input."""

    def read(content: bytes) -> Array:
        try:
            return np.asarray(frpc.images.prepare("the picture", how, content).pixels[0])
        except ImageError as error:
            raise ValueError(str(error)) from error

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a torchvision classifier with its explanations.")
    parser.add_argument("--model", required=True, help="torchvision's name, e.g. squeezenet1_0")
    parser.add_argument("--weights", required=True, help="a safetensors file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, how = frpc.pretrained.build_model(given.model), frpc.pretrained.recipe(given.model)
    frpc.pretrained.load_weights(model, given.weights)
    explainer = frpc.compile(model, (torch.zeros(1, 3, how.crop, how.crop),))
    app = service(answer_of(explainer), reader_of(how), frpc.pretrained.class_names(1000))
    uvicorn.run(app, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
