"""A Hugging Face pipeline that returns, beside each label, the map of its score.

    python docs/examples/hf_pipeline.py                                    a tiny untrained model, no network
    python docs/examples/hf_pipeline.py --model FOLDER --image PHOTO       a model from a folder, e.g. of ``save_pretrained``

``pipeline("image-classification", ..., pipeline_class=ExplainedImageClassification)`` takes and batches what the library's own
pipeline does. Each answer has two more entries: ``logit``, and ``relevance``, a tensor like the model's ``pixel_values`` that
sums to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ImageClassificationPipeline, ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

import frpc

__all__ = ["ExplainedImageClassification", "tiny_pipeline"]


class ExplainedImageClassification(ImageClassificationPipeline):
    """The library's pipeline with a map for each of the ``top_k`` labels.

    The model is compiled at the first picture of a size; ``method=`` is a name of :func:`frpc.rules.sets.methods`.
    """

    def __init__(self, *args: Any, method: str = "frp", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explainer = frpc.compile(self.model, method=method, output="logits")

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before, between, after = super()._sanitize_parameters(**kwargs)
        return before, {**between, "top_k": kwargs.get("top_k", 5)}, after

    def _forward(self, model_inputs: dict[str, Tensor], top_k: int = 5) -> dict[str, Tensor]:
        """The logits, and one transposed pass for all of the strongest labels: ``relevance [B, K, 3, H, W]``."""
        pixels = model_inputs["pixel_values"]
        best = self.explainer.predict(pixel_values=pixels).topk(min(top_k, self.model.config.num_labels)).indices
        logits, relevance = self.explainer(pixel_values=pixels, target=best)
        return {"logits": logits, "best": best, "relevance": relevance}

    def postprocess(self, model_outputs: dict[str, Tensor], **kwargs: Any) -> list[dict[str, Any]]:
        """Adds to each label its logit and its map."""
        logits = model_outputs["logits"][0]
        maps = dict(zip(model_outputs["best"][0].tolist(), model_outputs["relevance"][0], strict=True))
        answers = super().postprocess(model_outputs, **kwargs)
        for answer in answers:
            index = self.model.config.label2id[answer["label"]]
            answer |= {"logit": float(logits[index]), "relevance": maps[index]}
        return answers


def tiny_pipeline(**options: Any) -> ExplainedImageClassification:
    """A pipeline around an untrained vision transformer of 32 x 32 pixels."""
    torch.manual_seed(0)
    names = ["ant", "bee", "cat", "dog", "eel", "fox"]
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    return pipeline(
        "image-classification",
        model=ViTForImageClassification(config).eval(),
        image_processor=ViTImageProcessor(size={"height": 32, "width": 32}),
        pipeline_class=ExplainedImageClassification,
        **options,
    )


def main() -> None:
    """Explains one picture and prints what adds up to what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a model and its image processor")
    parser.add_argument("--image", type=Path, help="a picture; noise if left out")
    parser.add_argument("--out", type=Path, help="a PNG for the map of the first label")
    given = parser.parse_args()
    if given.model is None:
        classify = tiny_pipeline()
    else:
        classify = pipeline("image-classification", model=str(given.model), pipeline_class=ExplainedImageClassification)
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    image = Image.fromarray(noise) if given.image is None else Image.open(given.image).convert("RGB")
    answers = classify(image, top_k=3)
    for answer in answers:
        total = float(answer["relevance"].sum())
        print(f"{answer['label']:<12} score {answer['score']:.3f}  logit {answer['logit']:+.5f}  map sums to {total:+.5f}")
    if given.out is not None:
        frpc.heatmap.save(frpc.heatmap.overlay(image, answers[0]["relevance"], title=answers[0]["label"]), given.out)


if __name__ == "__main__":
    main()
