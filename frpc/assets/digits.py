"""`frpc demo`: ten handwritten digits explained by a small trained net, without network access.

The weights, the digits and their provenance lie in ``frpc/assets``; ``frpc/assets/train_digits.py`` makes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

from frpc.explainer.compile import compile
from frpc.integrations.torchvision import load_weights, read_weights
from frpc.plots.outputs import OutputFolder
from frpc.plots.panels import SMALL, TITLE, draw_bar, draw_map, draw_picture, pixel_map, robust_limit, signed

__all__ = ["Digit", "DigitNet", "contact_sheet", "explain_digits", "load_digit_net", "load_digits", "run"]

ASSETS = Path(__file__).parent
CREDIT = "Digits: MNIST by Y. LeCun, C. Cortes and C. J. C. Burges, CC BY-SA 3.0"


class DigitNet(nn.Module):
    """Three convolutions and one linear layer for 28x28 digits in 0..1, 55,034 parameters.

    The input is left in 0..1 on purpose: an empty pixel is then exactly 0, so apart from its equal share of the
    constants it has no relevance, and a map lies on the ink.

    Shapes:
        input ``[B, 1, 28, 28]``, output ``[B, 10]`` (logits).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm1(self.conv1(x))))  # [B, 16, 14, 14]
        x = self.pool(self.relu(self.norm2(self.conv2(x))))  # [B, 32, 7, 7]
        x = self.relu(self.norm3(self.conv3(x)))  # [B, 64, 7, 7]
        logits: Tensor = self.classifier(self.flatten(x))
        return logits


@dataclass(frozen=True, eq=False)
class Digit:
    """One explained digit.

    Attributes:
        picture: uint8 ``[28, 28]``.
        label: what its writer meant.
        classes: the predicted class and the runner-up.
        logits: their two logits.
        maps: their relevance ``[2, 28, 28]``; each sums to its logit.
    """

    picture: Tensor
    label: int
    classes: list[int]
    logits: list[float]
    maps: Tensor

    @property
    def sums(self) -> list[float]:
        """What the two maps add up to, in float64."""
        totals: list[float] = self.maps.double().sum((1, 2)).tolist()
        return totals

    @property
    def error(self) -> float:
        """The larger ``|sum V - y| / sum|V|`` of the two maps."""
        magnitude = self.maps.double().abs().sum((1, 2)).tolist()
        return max(abs(s - y) / m for s, y, m in zip(self.sums, self.logits, magnitude, strict=True))


def load_digit_net() -> DigitNet:
    """The trained net in eval mode."""
    model = DigitNet().eval()
    load_weights(model, ASSETS / "digits.safetensors")
    return model


def load_digits() -> tuple[Tensor, Tensor]:
    """Ten MNIST test digits, one of each class: uint8 ``[10, 1, 28, 28]`` and labels int64 ``[10]``."""
    stored = read_weights(ASSETS / "digits_images.safetensors")
    return stored["images"], stored["labels"]


def explain_digits() -> list[Digit]:
    """The two strongest classes of each digit, in one call of the compiled net."""
    model, (images, labels) = load_digit_net(), load_digits()
    x = images.float() / 255
    explainer = compile(model, (x,))
    with torch.inference_mode():
        classes = model(x).topk(2).indices  # [10, 2]
        logits, relevance = explainer(x, target=classes)  # [10, 10], [10, 2, 1, 28, 28]
    chosen = logits.gather(1, classes)
    return [
        Digit(images[i, 0], int(labels[i]), classes[i].tolist(), chosen[i].tolist(), relevance[i, :, 0]) for i in range(len(x))
    ]


def contact_sheet(digits: list[Digit]) -> Figure:
    """Each digit, the map of its predicted class and that of the runner-up, all on one scale."""
    rows = (len(digits) + 1) // 2
    figure = Figure(figsize=(10.6, 2.05 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, 7, squeeze=False, width_ratios=[1, 1, 1, 0.1, 1, 1, 1])  # the fourth is a gap
    for axes in panels.flat:
        axes.set_axis_off()
    maps = [pixel_map(values) for digit in digits for values in digit.maps]
    limit = robust_limit(maps)
    for position, digit in enumerate(digits):
        column, row = divmod(position, rows)
        _draw_digit(list(panels[row, 4 * column : 4 * column + 3]), digit, limit)
    draw_bar(figure, list(panels.flat), limit, maps, "logit per pixel: red speaks for the class, blue against it")
    figure.suptitle("Every map adds up to the logit that it explains", fontsize=TITLE + 3)
    figure.supxlabel(CREDIT, fontsize=SMALL)
    return figure


def _draw_digit(panels: Sequence[Axes], digit: Digit, limit: float) -> None:
    for axes in panels:
        axes.set_axis_on()
    wrong = "" if digit.classes[0] == digit.label else f", taken for a {digit.classes[0]}"
    draw_picture(panels[0], digit.picture, title=f"a {digit.label}{wrong}")
    for k, axes in enumerate(panels[1:]):
        name = f"{('predicted', 'runner-up')[k]}: {digit.classes[k]}"
        sums = f"logit {signed(digit.logits[k])}\nmap sum {signed(digit.sums[k])}"
        draw_map(axes, None, pixel_map(digit.maps[k]), limit, title=name, caption=sums)


def run(out_dir: str | Path, console: Console) -> dict[str, Any]:
    """Explains the ten digits and writes ``digits.png`` and ``digits.json``.

    Returns:
        What was measured, ready for JSON.

    Raises:
        OutputFolderError: nothing can be written to ``out_dir``; known before work starts.
    """
    folder = OutputFolder(out_dir)
    start = time.perf_counter()
    with console.status("explaining ten digits"):
        digits = explain_digits()
        explained = time.perf_counter()
        sheet = folder.figure("digits.png", contact_sheet(digits))
    record = json.loads((ASSETS / "digits.json").read_text())
    result = {
        "net": {key: record[key] for key in ("model", "parameters", "test_accuracy")},
        "digits": [
            {"label": d.label, "classes": d.classes, "logits": d.logits, "sums": d.sums, "error": d.error} for d in digits
        ],
        "conservation_error": max(d.error for d in digits),
        "seconds": {"explain": explained - start, "pictures": time.perf_counter() - explained},
        "files": [str(sheet), str(folder.path / "digits.json")],
    }
    folder.json("digits.json", result)
    return result
