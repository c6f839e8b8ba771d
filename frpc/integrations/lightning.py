"""A Lightning callback that logs maps of fixed samples while a model is trained: where its answers come from, epoch by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from frpc.errors import OptionError, require
from frpc.explainer.compile import compile
from frpc.plots import heatmap
from frpc.plots.outputs import OutputFolder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

__all__ = ["LogRelevance"]

_lightning: Any = require("lightning.pytorch", "lightning", "frpc.lightning")


class LogRelevance(_lightning.Callback):
    """Logs one sheet of maps at the end of every n-th training epoch.

    Loggers that take pictures get them: by ``log_image`` (Weights & Biases and others), or by ``experiment.add_image``
    (TensorBoard). Where none does, sheets are written as ``relevance-epoch0004.png``. The model is compiled again each time,
    because its weights have changed; it stays in training mode, and its gradients and random numbers are not touched.

    Args:
        inputs: samples, ``[n, C, H, W]`` or ``[n, F]``.
        targets: which number of each sample's output: an int, ``[n]`` class indices, or None for the class it gives most to.
        every_n_epochs: how often.
        method: a name of :func:`frpc.rules.sets.methods`.
        module: path of the part of the Lightning module to explain, e.g. ``"net"``; the module itself by default.
        folder: where sheets are written if no logger takes them; ``relevance`` in the trainer's folder by default.
        name: what the picture is called in loggers.

    Raises:
        OptionError: for less than one epoch, or inputs that are not pictures or features.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: int | Tensor | None = None,
        *,
        every_n_epochs: int = 1,
        method: str = "frp",
        module: str = "",
        folder: str | Path | None = None,
        name: str = "relevance",
    ) -> None:
        if every_n_epochs < 1:
            raise OptionError(f"every_n_epochs={every_n_epochs}: give at least 1.")
        if inputs.dim() not in (2, 4) or len(inputs) == 0:
            raise OptionError(f"inputs is {list(inputs.shape)}; a sheet shows pictures [n, C, H, W] or features [n, F].")
        self.inputs, self.targets, self.every_n_epochs = inputs, targets, every_n_epochs
        self.method, self.module, self.name = method, module, name
        self.folder = None if folder is None else Path(folder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs where the epoch's number, counted from 1, is a multiple of ``every_n_epochs``."""
        epoch = trainer.current_epoch
        if trainer.is_global_zero and (epoch + 1) % self.every_n_epochs == 0:
            self._log(trainer, self.sheet(pl_module.get_submodule(self.module), f"epoch {epoch}"), epoch)

    def sheet(self, model: nn.Module, title: str) -> Figure:
        """Explains the samples and draws their maps, all on one scale."""
        like = next(model.parameters())
        x = self.inputs.to(device=like.device, dtype=like.dtype)
        explainer = compile(model, method=self.method)
        output = explainer.predict(x)
        target = output.argmax(1) if self.targets is None else torch.as_tensor(self.targets, device=x.device).expand(len(x))
        relevance = explainer(x, target=target).relevance
        assert isinstance(relevance, Tensor)
        relevance = relevance.float().cpu()
        scores = output.gather(1, target[:, None])[:, 0].tolist()
        titles = [f"{title}, class {c}, {score:+.2f}" for c, score in zip(target.tolist(), scores, strict=True)]
        if x.dim() == 2:
            return heatmap.grid(None, relevance.unsqueeze(1), titles=titles)  # each a row of cells
        pictures = [_between_0_and_1(one) for one in self.inputs.float().cpu()]
        return heatmap.grid(pictures if x.shape[1] in (1, 3) else None, relevance, titles=titles)

    def _log(self, trainer: Trainer, figure: Figure, epoch: int) -> None:
        taken = False
        for logger in trainer.loggers:
            if callable(getattr(logger, "log_image", None)):
                logger.log_image(self.name, [_pixels(figure)], step=trainer.global_step)
            elif callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
                logger.experiment.add_image(self.name, _pixels(figure), trainer.global_step, dataformats="HWC")
            else:
                continue
            taken = True
        if not taken:
            folder = OutputFolder(self.folder or Path(trainer.default_root_dir) / "relevance")
            folder.figure(f"{self.name}-epoch{epoch:04d}.png", figure)


def _between_0_and_1(x: Tensor) -> Tensor:
    """A normalised picture as one that can be shown: its own range becomes 0 to 1."""
    low, high = x.amin(), x.amax()
    return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)


def _pixels(figure: Figure) -> NDArray[Any]:
    """A figure as bytes ``[H, W, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
