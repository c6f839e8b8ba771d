"""docs/examples/hf_pipeline.py: the answers of the library's own pipeline, and maps that sum to their logits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from places import EXAMPLES

transformers = pytest.importorskip("transformers")

EXAMPLE = EXAMPLES / "hf_pipeline.py"

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_pipeline", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_are_the_librarys_and_maps_sum_to_logits(example: ModuleType):
    classify = example.tiny_pipeline()
    plain = transformers.pipeline("image-classification", model=classify.model, image_processor=classify.image_processor)
    chance = np.random.default_rng(0)
    images = [Image.fromarray(chance.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)]
    for answers, expected, image in zip(classify(images, top_k=3, batch_size=2), plain(images, top_k=3), images, strict=True):
        assert [a["label"] for a in answers] == [e["label"] for e in expected] and len(answers) == 3
        pixels = classify.image_processor(image, return_tensors="pt")["pixel_values"]
        logits = classify.model(pixels).logits[0]
        for answer, theirs in zip(answers, expected, strict=True):
            assert answer["score"] == pytest.approx(theirs["score"], abs=1e-6)
            assert answer["logit"] == pytest.approx(float(logits[classify.model.config.label2id[answer["label"]]]), abs=1e-5)
            relevance = answer["relevance"].double()
            assert relevance.shape == pixels.shape[1:]
            assert abs(float(relevance.sum()) - answer["logit"]) / float(relevance.abs().sum()) <= 1e-6
    assert len(classify(images[0])) == 5 and isinstance(classify(images[0])[0]["relevance"], torch.Tensor)


@pytest.mark.slow
def test_it_runs_as_a_script(tmp_path: Path):
    said = subprocess.run(
        [sys.executable, EXAMPLE, "--out", tmp_path / "map.png"], capture_output=True, text=True, check=True, timeout=300
    )
    assert said.stdout.count("map sums to") == 3 and (tmp_path / "map.png").stat().st_size > 1000
