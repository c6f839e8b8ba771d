"""A sentiment classifier over words: embedding, recurrent layer in both directions, mean over the words' states, two logits.

The vocabulary is learned from the training sentences, and so are the embeddings; nothing is pretrained.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import frpc

PAD, UNKNOWN = 0, 1
Kind = Literal["lstm", "rnn"]
KINDS: tuple[Kind, ...] = ("lstm", "rnn")

_WORD = re.compile(r"n't|'\w+|\w+(?=n't)|[\w-]+|[^\w\s]")


def words_of(sentence: str) -> list[str]:
    """Cuts a sentence into lower-case words and marks, as the corpus does: ``It isn't bad.`` -> ``it is n't bad .``"""
    return _WORD.findall(sentence.lower())


class Vocabulary:
    """Words by number; 0 is padding, 1 any word that is not in it."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = ["<pad>", "<unknown>", *words]
        self.number = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def learned(cls, sentences: Sequence[str], least: int = 2) -> Vocabulary:
        """Takes the words that occur at least that often."""
        counts = Counter(word for sentence in sentences for word in words_of(sentence))
        return cls(sorted(word for word, count in counts.items() if count >= least))

    def encode(self, sentences: Sequence[str], length: int | None = None) -> Tensor:
        """Returns numbers ``[B, T]``, padded behind each sentence's end or cut at T; the longest sentence sets T if not given."""
        rows = [[self.number.get(word, UNKNOWN) for word in words_of(sentence)] for sentence in sentences]
        length = length or max(map(len, rows))
        return torch.tensor([row[:length] + [PAD] * (length - len(row)) for row in rows])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.words[2:], ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        return cls(json.loads(path.read_text(encoding="utf-8")))


class SentimentNet(nn.Module):
    """Numbers of words ``[B, T]`` -> logits ``[B, 2]`` of a negative and a positive opinion."""

    def __init__(self, vocabulary: int, kind: Kind, features: int = 96, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features, padding_idx=PAD)
        layer = nn.LSTM if kind == "lstm" else nn.RNN
        self.recurrent = layer(features, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(2 * hidden, 2)

    def forward(self, words: Tensor) -> Tensor:
        present = words != PAD  # [B, T]
        lengths = present.sum(1)
        x = self.dropout(self.embedding(words))  # [B, T, E]
        states = self._packed(x, lengths) if self.training else frpc.recurrent.masked(self.recurrent, x, lengths)[0]
        return self.head(self.dropout(states.sum(1) / lengths.unsqueeze(1)))  # states behind the end are 0

    def _packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Computes the same as `masked`, faster; its sizes depend on the lengths' values, so it cannot be captured."""
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def load_model(folder: Path, kind: Kind) -> tuple[SentimentNet, Vocabulary]:
    """Reads what `train_sentiment.py` has written."""
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = SentimentNet(len(vocabulary.words), kind)
    model.load_state_dict(load_file(folder / f"{kind}.safetensors"))
    return model.eval(), vocabulary
