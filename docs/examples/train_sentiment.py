"""Train the two sentiment classifiers, LSTM and RNN, on sentences with a label.

    python docs/examples/train_sentiment.py DATA FOLDER [--epochs 10]

DATA holds `train.tsv`, `dev.tsv` and `test.tsv` of the Stanford Sentiment Treebank, a header and then `sentence<TAB>label` a
line. FOLDER gets `lstm.safetensors`, `rnn.safetensors`, `vocabulary.json` and `accuracy.json`. One thread and a fixed seed: the
same versions give the same weights, in a few minutes. The epoch that does best on the dev sentences is kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentiment_model import KINDS, PAD, UNKNOWN, Kind, SentimentNet, Vocabulary
from torch import Tensor, nn

SEED, BATCH, LENGTH, WORD_DROPOUT = 0, 64, 56, 0.2
RATES: dict[Kind, float] = {"lstm": 2e-3, "rnn": 1e-3}
Split = tuple[list[str], Tensor]


def read_split(path: Path) -> Split:
    """Returns sentences, and labels int64 ``[S]``: 1 is positive."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["sentence"] for row in rows], torch.tensor([int(row["label"]) for row in rows])


def accuracy(model: SentimentNet, words: Tensor, labels: Tensor) -> float:
    """Returns the share of sentences whose larger logit is the label's."""
    model.eval()
    with torch.no_grad():
        right = [(model(w).argmax(1) == y).sum() for w, y in zip(words.split(512), labels.split(512), strict=True)]
    return float(sum(right)) / len(labels)


def train_one(kind: Kind, vocabulary: Vocabulary, train: Split, dev: Split, epochs: int) -> SentimentNet:
    """AdamW, cross-entropy, dropout, and words replaced by the unknown word at random."""
    torch.manual_seed(SEED)
    model = SentimentNet(len(vocabulary.words), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[kind], weight_decay=0.05)
    words, held_out = (vocabulary.encode(sentences, LENGTH) for sentences in (train[0], dev[0]))
    best, kept = 0.0, model.state_dict()
    for epoch in range(epochs):
        started = time.perf_counter()
        model.train()
        for batch in torch.randperm(len(words)).split(BATCH):
            w = words[batch]
            w = torch.where((torch.rand(w.shape) < WORD_DROPOUT) & (w != PAD), UNKNOWN, w)
            loss = nn.functional.cross_entropy(model(w), train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        score = accuracy(model, held_out, dev[1])
        print(f"{kind}, epoch {epoch + 1}: {100 * score:.1f} % on dev, {time.perf_counter() - started:.0f} s", flush=True)
        if score > best:
            best, kept = score, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, dev, test = (read_split(options.data / f"{name}.tsv") for name in ("train", "dev", "test"))
    options.folder.mkdir(parents=True, exist_ok=True)
    vocabulary = Vocabulary.learned(train[0])
    vocabulary.save(options.folder / "vocabulary.json")
    found = {}
    for kind in KINDS:
        model = train_one(kind, vocabulary, train, dev, options.epochs)
        found[kind] = accuracy(model, vocabulary.encode(test[0], LENGTH), test[1])
        print(f"{kind}: {100 * found[kind]:.2f} % of {len(test[0])} test sentences", flush=True)
        save_file(model.state_dict(), options.folder / f"{kind}.safetensors")
    (options.folder / "accuracy.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
