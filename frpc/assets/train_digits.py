"""Train `frpc.assets.digits.DigitNet` on MNIST and write the assets of ``frpc demo``.

    python -m frpc.assets.train_digits FOLDER      FOLDER holds the four MNIST ``*-ubyte.gz`` files

Writes beside this file: ``digits.safetensors`` (weights), ``digits_images.safetensors`` (ten test digits, unchanged)
and ``digits.json`` (what was measured, and with what). It runs on one thread from a fixed seed, so that the same
versions give the same weights; an accuracy below 98.5 % on the 10,000 test images is an error.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from frpc.assets.digits import DigitNet

HERE = Path(__file__).parent
SEED, EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY = 0, 5, 128, 1e-2, 1e-2
LEAST_ACCURACY = 0.985


def read_idx(path: Path) -> Tensor:
    """The array in a gzipped idx file: two zero bytes, type 8 (uint8), rank, big-endian sizes, then the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is not an idx file of bytes")
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def read_split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """``name`` is "train" or "t10k"; returns images uint8 ``[S, 1, 28, 28]`` and labels int64 ``[S]``."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:, None]
    return images, read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long()


def train(images: Tensor, labels: Tensor) -> DigitNet:
    """AdamW with a one-cycle learning rate, cross-entropy, no augmentation."""
    torch.manual_seed(SEED)
    model = DigitNet().train()
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            loss = nn.functional.cross_entropy(model(images[batch].float() / 255), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss of the last batch {loss.item():.4f}", flush=True)
    return model.eval()


def choose(logits: Tensor, labels: Tensor) -> list[int]:
    """One test digit per class: clear ones, but for the narrowest mistake and the narrowest success.

    Clear is the first correctly classified image of its class. The mistake is the misclassified image whose two
    largest logits lie closest; the success is the correctly classified one of another class with the same property.
    """
    best = logits.topk(2).values
    margin, right = best[:, 0] - best[:, 1], logits.argmax(1) == labels
    chosen = [int(((labels == digit) & right).nonzero()[0]) for digit in range(10)]
    mistake = int(margin.masked_fill(right, torch.inf).argmin())
    same_class = labels == labels[mistake]
    success = int(margin.masked_fill(~right | same_class, torch.inf).argmin())
    for index in (mistake, success):
        chosen[int(labels[index])] = index
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digit net of `frpc demo`.")
    parser.add_argument("folder", type=Path, help="folder with the four MNIST *-ubyte.gz files")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    model = train(*read_split(folder, "train"))
    images, labels = read_split(folder, "t10k")
    with torch.no_grad():
        logits = torch.cat([model(part.float() / 255) for part in images.split(1000)])  # [10000, 10]
    correct = int((logits.argmax(1) == labels).sum())
    accuracy = correct / len(labels)
    print(f"test: {correct} of {len(labels)} right, {100 * accuracy:.2f} %")
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"below {100 * LEAST_ACCURACY} %: nothing written")
    chosen = choose(logits, labels)
    (HERE / "digits.safetensors").write_bytes(save(model.state_dict()))
    (HERE / "digits_images.safetensors").write_bytes(save({"images": images[chosen], "labels": labels[chosen]}))
    record = {
        "model": "frpc.assets.digits.DigitNet",
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": accuracy,
        "test_correct": correct,
        "test_images": len(labels),
        "training": {"seed": SEED, "epochs": EPOCHS, "batch": BATCH, "peak_rate": PEAK_RATE, "threads": 1},
        "digits": {"split": "test", "indices": chosen},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    (HERE / "digits.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
