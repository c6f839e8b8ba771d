"""Which number of a model's output to explain: a class, or a token at a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from frpc.errors import ShapeError, TargetError
from frpc.integrations.torchvision import class_index
from frpc.text.tokens import Reading

__all__ = ["Question", "Wanted", "questions", "seed_of"]

Wanted = int | str | tuple[int, int] | None


@dataclass(frozen=True)
class Question:
    """One number of one sample's output.

    Attributes:
        index: a class ``(c,)``, or ``(t, v)``: entry v of the output at position t.
        label: its name.
        heading: what is explained, in words.
    """

    index: tuple[int, ...]
    label: str
    heading: str


def questions(
    output: Tensor, readings: Sequence[Reading], wanted: Sequence[Wanted], labels: Sequence[str] | None, tokenizer: Any
) -> list[list[Question]]:
    """Turns what the caller wants into places of the output: K questions for each of B samples.

    Args:
        output: ``[B, C]`` or ``[B, T, V]``.
        readings: the B texts.
        wanted: each None or "auto" (the largest), a class number or name, a token's number or text, or ``(t, v)``.
        labels: names of the classes, or of the V entries.
        tokenizer: names the V entries if there are no labels.

    Raises:
        TargetError: out of range, or a name that is none, or several.
        ShapeError: an output of another form.
    """
    if output.dim() not in (2, 3):
        raise ShapeError(f"Texts can be explained for outputs [B, C] or [B, T, V], not {list(output.shape)}.")
    if labels is not None and len(labels) != output.shape[-1]:
        raise ShapeError(f"{len(labels)} labels for {output.shape[-1]} outputs.")
    one = _class_question if output.dim() == 2 else _token_question
    return [
        [one(scores, reading, each, labels, tokenizer) for each in wanted]
        for scores, reading in zip(output, readings, strict=True)
    ]


def seed_of(asked: Sequence[Sequence[Question]], output: Tensor) -> Tensor:
    """The functional that reads the questions off the output: ``[B, ...]``, or ``[B, K, ...]`` for several a sample."""
    seed = output.new_zeros([len(asked), len(asked[0]), *output.shape[1:]])
    for sample, row in enumerate(asked):
        for column, question in enumerate(row):
            seed[(sample, column, *question.index)] = 1
    return seed if len(asked[0]) > 1 else seed[:, 0]


def _class_question(scores: Tensor, _reading: Reading, wanted: Wanted, labels: Sequence[str] | None, _tokenizer: Any) -> Question:
    if isinstance(wanted, tuple):
        raise TargetError(f"target {wanted} names a position, but the output is one number for each of {len(scores)} classes.")
    names = labels or [f"class {index}" for index in range(len(scores))]
    chosen = int(scores.argmax()) if wanted in (None, "auto") else class_index(str(wanted), names)
    named = f"“{names[chosen]}” (class {chosen})" if labels else names[chosen]
    return Question((chosen,), names[chosen], named)


def _token_question(scores: Tensor, reading: Reading, wanted: Wanted, labels: Sequence[str] | None, tokenizer: Any) -> Question:
    """At the text's last position, unless another is named."""
    at, entry = wanted if isinstance(wanted, tuple) else (reading.positions[-1], wanted)
    if not 0 <= at < scores.shape[0]:
        raise TargetError(f"position {at} is out of range: the output has positions 0 to {scores.shape[0] - 1}.")
    if entry in (None, "auto"):
        chosen = int(scores[at].argmax())
    elif labels is not None or tokenizer is None or isinstance(entry, int) or str(entry).strip().isdigit():
        chosen = class_index(str(entry), labels or [f"class {index}" for index in range(scores.shape[1])])
    else:
        chosen = _token_id(str(entry), tokenizer)
    label = labels[chosen] if labels else _spelled(chosen, tokenizer)
    last = at == reading.positions[-1]
    heading = f"next token “{label}” ({chosen})" if last and labels is None else f"“{label}” ({chosen}) at position {at}"
    return Question((at, chosen), label, heading)


def _token_id(text: str, tokenizer: Any) -> int:
    """The one token that spells ``text``, a leading space included."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise TargetError(
            f"target {text!r} is not a single token of this tokenizer but {pieces or 'none'}; give one of them, or a token's "
            "number. A token that begins a word often has the space before it: ' word'."
        )
    return int(ids[0])


def _spelled(index: int, tokenizer: Any) -> str:
    return f"entry {index}" if tokenizer is None else str(tokenizer.decode([index]))
