"""A batch of tokenised texts: what the model gets, and what its positions mean to a reader."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpc.errors import InputError, ShapeError
from frpc.text.words import Marks, Span, marks_of, spans

__all__ = ["Reading", "encode", "listed"]

UNLIMITED = 10**6  # tokenizers without a limit say 10**30


@dataclass(frozen=True)
class Reading:
    """One text as its tokens.

    Attributes:
        pieces: its tokens as the tokenizer writes them, without padding.
        positions: the position of each in the model's input.
        special: which of them the tokenizer added.
        spans: its words, as runs over ``pieces``.
        padding: positions of the input that hold none of them.
        cut: tokens left out because the text was too long.
        text: the text itself, if it is known.
        unknown: number of tokens for text that the tokenizer does not know.
    """

    pieces: tuple[str, ...]
    positions: tuple[int, ...]
    special: tuple[bool, ...]
    spans: tuple[Span, ...]
    padding: tuple[int, ...] = ()
    cut: int = 0
    text: str = ""
    unknown: int = 0


def listed(tokens: Sequence[str], mask: Sequence[bool] | None = None, special: Collection[str] = ()) -> Reading:
    """Reads a plain list of tokens, one for each position.

    Args:
        tokens: as a tokenizer writes them; marks of WordPiece, byte-level BPE and SentencePiece join them to words.
        mask: False where a position is padding.
        special: tokens that are not words of the text, e.g. ``["[CLS]", "[SEP]"]``.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InputError('tokens must be a list of strings, one for each position, e.g. ["play", "##ing"].')
    if mask is not None and len(mask) != len(tokens):
        raise ShapeError(f"The mask has {len(mask)} entries for {len(tokens)} tokens.")
    real = [at for at in range(len(tokens)) if mask is None or mask[at]]
    pieces = [tokens[at] for at in real]
    added = [piece in special for piece in pieces]
    found = spans(pieces, added, marks=marks_of(pieces))
    padding = tuple(at for at in range(len(tokens)) if mask is not None and not mask[at])
    return Reading(tuple(pieces), tuple(real), tuple(added), tuple(found), padding)


def encode(tokenizer: Any, texts: Sequence[str], limit: int | None = None) -> tuple[dict[str, Tensor], list[Reading]]:
    """Tokenises texts into one batch, padded at the end, where padding cannot move a token.

    Args:
        tokenizer: of the transformers library.
        texts: at least one, none of them empty.
        limit: most tokens of a text; longer ones are cut and their readings say by how much.

    Shapes:
        ``input_ids`` and, if the tokenizer makes one, ``attention_mask``: ``[B, T]``.
    """
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError("Give at least one text; texts must not be empty.")
    limit = min(limit or UNLIMITED, tokenizer.model_max_length)
    encodings = [_encode_one(tokenizer, text, limit if limit < UNLIMITED else None) for text in texts]
    longest = max(len(encoding["input_ids"]) for encoding in encodings)
    marks = marks_of(tokenizer.get_vocab())
    readings = [_reading(tokenizer, encoding, marks, longest, text) for encoding, text in zip(encodings, texts, strict=True)]
    fill = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    ids = torch.full((len(texts), longest), fill)
    mask = torch.zeros((len(texts), longest), dtype=torch.int64)
    for row, encoding in enumerate(encodings):
        count = len(encoding["input_ids"])
        ids[row, :count] = torch.tensor(encoding["input_ids"])
        mask[row, :count] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {name: x for name, x in inputs.items() if name == "input_ids" or name in tokenizer.model_input_names}, readings


def _encode_one(tokenizer: Any, text: str, limit: int | None) -> Any:
    """One text without padding; its ``cut`` counts the tokens beyond the limit."""
    wanted = {"return_special_tokens_mask": True, "return_offsets_mapping": tokenizer.is_fast}
    whole = tokenizer(text, verbose=False, **wanted)
    kept = tokenizer(text, truncation=True, max_length=limit, **wanted) if limit else whole
    if not kept["input_ids"]:
        raise InputError(f"The tokenizer makes no tokens from {text!r}" + (f" within {limit}." if limit else "."))
    kept["cut"] = len(whole["input_ids"]) - len(kept["input_ids"])
    return kept


def _reading(tokenizer: Any, encoding: Any, marks: Marks, longest: int, text: str) -> Reading:
    ids = encoding["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    special = [bool(flag) for flag in encoding["special_tokens_mask"]]
    found = spans(
        pieces,
        special,
        marks=marks,
        word_ids=encoding.word_ids() if tokenizer.is_fast else None,
        offsets=encoding["offset_mapping"] if tokenizer.is_fast else None,
        spell=tokenizer.convert_tokens_to_string,
    )
    positions, padding = tuple(range(len(ids))), tuple(range(len(ids), longest))
    unknown = sum(number == tokenizer.unk_token_id for number in ids) if tokenizer.unk_token_id is not None else 0
    return Reading(tuple(pieces), positions, tuple(special), tuple(found), padding, encoding["cut"], text, unknown)
