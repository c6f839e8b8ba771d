"""Words of a tokenised text: which pieces belong together, and how a reader would spell them.

Tokenizers cut words into pieces and mark where words begin or go on: WordPiece writes ``play ##ing``, byte-level BPE
``Ġplay ing``, SentencePiece ``▁play ing``, and the BPE of the first GPT ``play ing</w>``. A word here is a run of positions, so
a sum over a word is a sum over its pieces and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Marks", "Span", "marks_of", "spans"]

BREAKS = ("Ċ", "ĉ", "č")  # newline, tab and carriage return in byte-level BPE
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "", " ": "␣"}


class Marks(StrEnum):
    """How pieces show where words begin; the value is the mark."""

    WORDPIECE = "##"
    BYTE_BPE = "Ġ"
    SENTENCEPIECE = "▁"
    END_OF_WORD = "</w>"
    NONE = ""

    def carried_by(self, piece: str) -> bool:
        """Whether a piece has this mark, and more than it."""
        has = piece.endswith if self is Marks.END_OF_WORD else piece.startswith
        return self is not Marks.NONE and has(self.value) and len(piece) > len(self.value)

    def begins(self, before: str, piece: str) -> bool:
        """Whether ``piece`` begins a word, given the piece before it."""
        match self:
            case Marks.WORDPIECE:
                return not self.carried_by(piece)
            case Marks.BYTE_BPE:
                return piece.startswith((self.value, *BREAKS)) or before.startswith(BREAKS)
            case Marks.SENTENCEPIECE:
                return piece.startswith(self.value)
            case Marks.END_OF_WORD:
                return before.endswith(self.value)
            case Marks.NONE:
                return True

    def spaced(self, before: str, piece: str) -> bool:
        """Whether the text had a space before ``piece``, as far as its marks tell."""
        if self in (Marks.BYTE_BPE, Marks.SENTENCEPIECE):
            return piece.startswith(self.value)
        return self.begins(before, piece)

    def stripped(self, pieces: Sequence[str]) -> str:
        """The word without its marks; byte-level pieces beyond ASCII stay in the tokenizer's own letters."""
        if self is Marks.NONE:
            return "".join(pieces)
        if self is Marks.END_OF_WORD:
            return "".join(piece.removesuffix(self.value) for piece in pieces)
        joined = "".join(piece.removeprefix(self.value) for piece in pieces)
        return joined.replace("Ċ", "\n").replace("ĉ", "\t") if self is Marks.BYTE_BPE else joined


@dataclass(frozen=True)
class Span:
    """A word as a run of positions.

    Attributes:
        text: as a reader would spell it.
        tokens: its positions.
        special: whether the tokenizer added it ([CLS], <s>), so that it is not a word of the text.
        space: whether a space goes before it.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool = False
    space: bool = True


def marks_of(pieces: Iterable[str]) -> Marks:
    """The marks that most of the pieces carry; of a whole vocabulary where there is one, since one text may have none."""
    counts = dict.fromkeys(Marks, 0)
    for piece in pieces:
        for marks in Marks:
            counts[marks] += marks.carried_by(piece)
    best = max(Marks, key=counts.__getitem__)
    return best if counts[best] else Marks.NONE


def spans(
    pieces: Sequence[str],
    special: Sequence[bool],
    *,
    marks: Marks,
    word_ids: Sequence[int | None] | None = None,
    offsets: Sequence[tuple[int, int]] | None = None,
    spell: Callable[[list[str]], str] | None = None,
) -> list[Span]:
    """Groups pieces into words; every position is in exactly one.

    Args:
        pieces: as the tokenizer writes them.
        special: which of them the tokenizer added; these are never merged.
        marks: how the pieces show where words begin.
        word_ids: the tokenizer's own count of words. A piece whose mark begins a word does so in any case: tokenizers
            that do not cut at spaces count a whole text as one word.
        offsets: where each piece is in the text, for its spaces.
        spell: pieces of a word to text, e.g. ``tokenizer.convert_tokens_to_string``; without it marks are taken off.
    """
    groups: list[list[int]] = []
    for at, piece in enumerate(pieces):
        alone = at == 0 or special[at] or special[at - 1]
        if alone or _begins(marks, pieces[at - 1], piece, word_ids, at):
            groups.append([])
        groups[-1].append(at)
    spell = spell or marks.stripped
    return [_span(group, pieces, special[group[0]], marks, offsets, spell) for group in groups]


def _begins(marks: Marks, before: str, piece: str, word_ids: Sequence[int | None] | None, at: int) -> bool:
    if word_ids is None:
        return marks.begins(before, piece)
    starts = marks in (Marks.BYTE_BPE, Marks.SENTENCEPIECE) and marks.begins(before, piece)
    return starts or word_ids[at] is None or word_ids[at] != word_ids[at - 1]


def _span(
    group: list[int],
    pieces: Sequence[str],
    special: bool,
    marks: Marks,
    offsets: Sequence[tuple[int, int]] | None,
    spell: Callable[[list[str]], str],
) -> Span:
    at = group[0]
    before = pieces[at - 1] if at else ""
    if special:
        return Span(pieces[at], tuple(group), special=True)
    gap = offsets is not None and at > 0 and offsets[at][0] > offsets[at - 1][1]
    marked = marks.spaced(before, pieces[at]) if offsets is None or marks in (Marks.BYTE_BPE, Marks.SENTENCEPIECE) else False
    text = spell([pieces[position] for position in group])
    return Span(_shown(text), tuple(group), space=at > 0 and (gap or marked))


def _shown(text: str) -> str:
    """A word without the spaces around it; one that is nothing but spaces and line ends, made visible."""
    inner = text.strip()
    return inner or "".join(VISIBLE.get(letter, letter) for letter in text) or "␣"
