"""A torchvision classifier as the commands use it: built, filled with weights, with its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from frpc.cli.session import Dtype, Session, prints_to_stderr

if TYPE_CHECKING:
    from torch import Tensor, nn

    from frpc.integrations.images import Recipe

__all__ = ["Classifier", "ModelOption", "load_classifier"]

ModelOption = Annotated[str, typer.Option(help="A torchvision classifier, e.g. squeezenet1_0.")]


@dataclass(frozen=True)
class Classifier:
    """A model in eval mode and how to feed it.

    Attributes:
        name: torchvision's name.
        weights: the file, "DEFAULT", or None for untrained.
        model: the model, in ``dtype``.
        recipe: its preprocessing.
    """

    name: str
    weights: str | None
    model: nn.Module
    recipe: Recipe

    def example(self, dtype: Dtype) -> Tensor:
        """An input of the right shape, ``[1, 3, crop, crop]``, from a fixed seed."""
        import torch

        side = self.recipe.crop
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 3, side, side, generator=generator, dtype=getattr(torch, dtype))


def load_classifier(name: str, weights: str | None, dtype: Dtype, current: Session) -> Classifier:
    """Builds the model and loads its weights.

    Raises:
        ModelNameError, WeightsError: see `frpc.integrations.torchvision`.
    """
    import torch

    from frpc.integrations import torchvision as pretrained

    model = pretrained.build_model(name)
    unused = pretrained.TRAINING_HEADS.get(name, ())
    default = weights == "DEFAULT"
    if default:
        with prints_to_stderr():
            tensors = pretrained.download_weights(name, progress=not current.as_json)
        pretrained.fit_weights(model, tensors, source=f"torchvision's DEFAULT for {name}", unused=unused)
    elif weights is not None:
        pretrained.load_weights(model, weights, unused=unused)
    model = model.to(getattr(torch, dtype))
    return Classifier(name, weights, model, pretrained.recipe(name, default=default))
