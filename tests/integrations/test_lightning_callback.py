"""`frpc.integrations.lightning`: maps while a model is trained, in whichever logger takes pictures, else in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import frpc
from frpc.errors import OptionError

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger

from frpc.integrations.lightning import LogRelevance

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: few workers, no validation, deprecated calls


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.net = nn.Sequential(first, nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kept(Logger):
    """Keeps what it is given, the way Weights & Biases takes it, or TensorBoard."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], int]] = []
        self.kind = kind
        if kind == "log_image":
            self.log_image = lambda key, images, step: self.seen.extend((key, image.shape, step) for image in images)

    name, version = "kept", 0

    @property
    def experiment(self) -> Any:
        return self if self.kind == "add_image" else None

    def add_image(self, tag: str, image: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and len(np.unique(image)) > 5
        self.seen.append((tag, image.shape, step))

    def log_metrics(self, *_: Any, **__: Any) -> None: ...
    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def trained(folder: Path, epochs: int, callbacks: list[Any], loggers: Any) -> Lit:
    seed_everything(0, verbose=False)
    model = Lit()
    data = TensorDataset(torch.randn(8, 1, 6, 6), torch.arange(8) % 4)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, logger=loggers,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4))
    return model


SAMPLES = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def test_pictures_go_to_loggers_that_take_them_and_training_is_not_disturbed(tmp_path: Path):
    loggers = [Kept("log_image"), Kept("add_image"), CSVLogger(tmp_path)]
    model = trained(tmp_path, 4, [LogRelevance(SAMPLES, every_n_epochs=2, name="why")], loggers)
    for logger in loggers[:2]:
        assert [(key, step) for key, _, step in logger.seen] == [("why", 4), ("why", 8)]
        assert all(shape[2] == 3 and shape[1] > 3 * shape[0] / 2 for _, shape, _ in logger.seen)
    assert not (tmp_path / "relevance").exists() and model.training
    alone = trained(tmp_path, 4, [], False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))


def test_without_such_a_logger_sheets_are_files(tmp_path: Path):
    callbacks = [LogRelevance(SAMPLES), LogRelevance(SAMPLES, 2, module="net", method="lid-ig", folder=tmp_path / "mine")]
    trained(tmp_path, 2, callbacks, False)
    assert len(list((tmp_path / "relevance").iterdir())) == 2
    files = sorted((tmp_path / "mine").iterdir())
    assert [file.name for file in files] == ["relevance-epoch0000.png", "relevance-epoch0001.png"]
    sheets = [np.asarray(Image.open(file)) for file in files]
    assert (sheets[0] != sheets[1]).any()  # it learns


def test_the_sheet_shows_the_maps(monkeypatch: pytest.MonkeyPatch):
    """The maps that are drawn sum to the scores of the classes in their titles."""
    model, shown = Lit(), {}
    monkeypatch.setattr("frpc.heatmap.grid", lambda pictures, maps, titles: shown.update(maps=maps, titles=titles, of=pictures))
    LogRelevance(SAMPLES).sheet(model, "epoch 7")
    scores, classes = model.eval()(SAMPLES).max(1)
    torch.testing.assert_close(shown["maps"].sum((1, 2, 3)), scores, rtol=0, atol=1e-5)
    assert shown["titles"] == [f"epoch 7, class {c}, {s:+.2f}" for c, s in zip(classes.tolist(), scores.tolist(), strict=True)]
    assert all(float(p.min()) == 0 and float(p.max()) == 1 for p in shown["of"])


def test_features_are_rows_of_cells():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    figure = LogRelevance(torch.randn(3, 5), torch.tensor([0, 1, 1])).sheet(model, "epoch 0")
    assert sum(bool(axes.get_title()) for axes in figure.axes) == 3


def test_real_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trained(tmp_path, 1, [LogRelevance(SAMPLES)], logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (image,) = events.Images("relevance")
    assert image.step == 2 and image.width > image.height > 100


def test_errors():
    with pytest.raises(OptionError, match="every_n_epochs=0: at least 1"):
        LogRelevance(SAMPLES, every_n_epochs=0)
    with pytest.raises(OptionError, match=r"inputs is \[3, 6, 6\]; a sheet shows pictures"):
        LogRelevance(SAMPLES[:, 0])
    with pytest.raises(frpc.FrpcError, match="method='frq' is unknown"):
        LogRelevance(SAMPLES, method="frq").sheet(Lit(), "")
