"""Draw sentences with every word coloured by its share of "positive minus negative", for the LSTM and the RNN.

    python docs/examples/sentiment_words.py FOLDER OUT.png [SENTENCE ...]

FOLDER is what `train_sentiment.py` has written. The explained number is the difference of the two logits; a word's share is the
sum over its embedding. Words and constants (biases) add up to the number.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from sentiment_model import KINDS, UNKNOWN, load_model, words_of

import frpc
from frpc.plots.panels import MAP_COLOURS, SMALL, TITLE, draw_bar, signed

SENTENCES = (
    "This movie is not bad and quite enjoyable.",
    "A dull plot, played brilliantly.",
    "It is too long, too loud and never funny.",
    "The best film of the year, moving and smart.",
)
WORD, WIDTH, ROW, NAME, ACCOUNT, DPI = 11.0, 10.0, 0.34, 0.55, 2.3, 130  # points; inches: least page, row, name, account
CONTRAST = ((-1.0, 1.0),)  # positive minus negative


@dataclass(frozen=True)
class Explained:
    """One sentence at one model: words, their shares, what the constants add, and the number all this is an account of."""

    kind: str
    words: list[str]
    shares: list[float]
    constants: float
    total: float


def explain(folder: Path, kind: str, sentences: list[str]) -> list[Explained]:
    """Explains all sentences in one batch; what lies behind a sentence's end has no share."""
    model, vocabulary = load_model(folder, kind)  # type: ignore[arg-type]
    numbers = vocabulary.encode(sentences)
    seed = torch.tensor(CONTRAST).expand(len(sentences), -1)
    found = frpc.compile(model, (numbers,), bias="separate")(numbers, seed=seed)
    shares, totals = found.relevance.sum(2), (found.output * seed).sum(1)
    rows = []
    for i, sentence in enumerate(sentences):
        words = words_of(sentence)
        shown = [word if n != UNKNOWN else f"{word}*" for word, n in zip(words, numbers[i].tolist(), strict=False)]
        rows.append(Explained(kind, shown, shares[i, : len(words)].tolist(), float(found.bias[i]), float(totals[i])))
    return rows


def draw(rows: list[list[Explained]]) -> Figure:
    """A block for each sentence, a line for each model, one scale for all."""
    count = sum(len(block) for block in rows)
    height = max(ROW * count + 0.3 * len(rows) + 0.7, 2.4)  # as high as the label of the scale is long
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)  # it measures words
    axes = figure.add_axes((0.0, 0.0, 0.9, 1.0))
    axes.set(xlim=(0, 0.9 * WIDTH), ylim=(height, 0))
    axes.axis("off")
    limit = max(abs(share) for block in rows for row in block for share in row.shares)
    axes.text(0.2, 0.3, "each word's share of logit(positive) − logit(negative)", fontsize=TITLE + 1, va="center")
    lines = [(row, 0.75 + ROW * (i * len(block) + j) + 0.3 * i) for i, block in enumerate(rows) for j, row in enumerate(block)]
    longest = max(_draw_words(axes, row, y, limit) for row, y in lines)
    width = max(WIDTH, (longest + ACCOUNT) / 0.9)  # one unit of the axes stays an inch
    figure.set_size_inches(width, height)
    axes.set_xlim(0, 0.9 * width)
    axes.text(0.9 * width - 0.1, 0.3, "words + constants = total", fontsize=SMALL + 1, va="center", ha="right")
    for row, y in lines:
        account = f"{signed(sum(row.shares))} {signed(row.constants)} = {signed(row.total)}"
        axes.text(0.9 * width - 0.1, y, account, fontsize=SMALL + 1, va="center", ha="right")
    bar = figure.add_axes((0.9, 0.1, 0.02, 0.8))
    bar.axis("off")
    shares = [torch.tensor(row.shares).double().numpy() for block in rows for row in block]
    draw_bar(figure, bar, limit, shares, "share of the difference of logits")
    return figure


def _draw_words(axes: Axes, row: Explained, y: float, limit: float) -> float:
    """Draws words from left to right, each in a box of its colour; returns where they end."""
    axes.text(0.2, y, row.kind.upper(), fontsize=SMALL + 1, va="center", color="#555555")
    x, scale = 0.2 + NAME, Normalize(-limit, limit)
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for word, share in zip(row.words, row.shares, strict=True):
        colour = MAP_COLOURS(scale(share))
        dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.55
        box = {"boxstyle": "round,pad=0.18", "facecolor": colour, "edgecolor": "#cccccc", "linewidth": 0.5}
        text = axes.text(x, y, word, fontsize=WORD, va="center", color="white" if dark else "black", bbox=box, parse_math=False)
        x += text.get_window_extent(renderer).width / axes.figure.dpi + 0.12
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [explain(options.folder, kind, list(options.sentences)) for kind in KINDS]
    figure = draw([list(block) for block in zip(*found, strict=True)])
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
