"""The suite ``recurrent``: token classifiers around RNN, LSTM and GRU in all their forms."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from bench.coverage.subject import SAMPLES, Subject, redraw

__all__ = ["build", "names"]

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
WORDS, WIDTH, HIDDEN, STEPS, CLASSES = 20, 6, 5, 7, 4


class Reader(nn.Module):
    """Embeds tokens, reads them, and scores classes from the last step."""

    def __init__(self, cell: str, layers: int, bidirectional: bool, batch_first: bool) -> None:
        super().__init__()
        kind = {"rnn_tanh": nn.RNN, "rnn_relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
        special = {"nonlinearity": cell.removeprefix("rnn_")} if kind is nn.RNN else {}
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.read = kind(WIDTH, HIDDEN, layers, bidirectional=bidirectional, batch_first=batch_first, **special)
        self.score = nn.Linear(HIDDEN * (1 + bidirectional), CLASSES)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        steps = self.embed(tokens)  # [B, T, E]
        read, _ = self.read(steps if self.batch_first else steps.transpose(0, 1))
        return self.score(read[:, -1] if self.batch_first else read[-1])


def names() -> list[str]:
    forms = itertools.product(CELLS, (1, 2), ("one_way", "two_ways"), ("batch_first", "time_first"))
    return [f"{cell}-{layers}-{ways}-{order}" for cell, layers, ways, order in forms]


def build(name: str) -> Subject:
    cell, layers, ways, order = name.split("-")
    torch.manual_seed(0)
    model = Reader(cell, int(layers), ways == "two_ways", order == "batch_first")
    return Subject(redraw(model), (torch.randint(WORDS, (SAMPLES, STEPS)),))
