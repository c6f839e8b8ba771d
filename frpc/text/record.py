"""An explained text: its tokens and words with their relevance, and the lines that add up to the output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from frpc.driver.explanation import Explanation
from frpc.errors import ShapeError
from frpc.plots.panels import finite
from frpc.text import chart, terminal, web
from frpc.text.questions import Question
from frpc.text.sheet import Line, Sheet, Word, plain
from frpc.text.tokens import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

__all__ = ["TextExplanation", "of", "page"]

SPREAD = {
    "uniform": "spread evenly over the tokens",
    "receptive_field": "spread over the positions the output can see",
}


@dataclass(frozen=True, eq=False)
class TextExplanation:
    """One explained number of one text; prints as a table, in colour on a terminal, and as HTML in a notebook.

    Attributes:
        reading: the text as its tokens.
        relevance: of each position of the model's input, summed over the embedding, ``[T]``, float64; padding included.
        output: the explained number.
        bias: the constants' share of it.
        question: the explained number.
        policy: where the constants' share went; with ``"separate"`` it is in no token.
        magnitude: ``sum |V|`` over all embedding elements, the measure of errors.
        special: whether tokens that the tokenizer added ([CLS], <s>) are shown; the sum counts them in any case.

    Units: relevance, bias and magnitude have the unit of the output.
    """

    reading: Reading
    relevance: NDArray[np.float64]
    output: float
    bias: float
    question: Question
    policy: str = "uniform"
    magnitude: float = 1.0
    special: bool = True

    # ---- numbers ------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> tuple[Word, ...]:
        """Every token with its relevance, padding left out."""
        each = zip(self.reading.pieces, self.reading.positions, self.reading.special, strict=True)
        return tuple(Word(piece, (at,), float(self.relevance[at]), added) for piece, at, added in each)

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """Tokens merged to words; a word's relevance is the sum over its tokens."""
        merged = []
        for span in self.reading.spans:
            positions = tuple(self.reading.positions[at] for at in span.tokens)
            relevance = math.fsum(float(self.relevance[at]) for at in positions)
            merged.append(Word(span.text, positions, relevance, span.special, span.space))
        return tuple(merged)

    @property
    def target(self) -> int | tuple[int, ...]:
        """The class, or ``(t, v)``: entry v at position t."""
        return self.question.index[0] if len(self.question.index) == 1 else self.question.index

    @property
    def label(self) -> str:
        """The name of the class or token."""
        return self.question.label

    @property
    def padding(self) -> float:
        """Relevance of the padded positions."""
        return math.fsum(float(self.relevance[at]) for at in self.reading.padding)

    @property
    def total(self) -> float:
        """The sum of tokens, padding and separate constants."""
        return math.fsum(self.relevance.tolist()) + (self.bias if self.policy == "separate" else 0.0)

    @property
    def error(self) -> float:
        """``|total - output| / sum|V|``."""
        return abs(self.total - self.output) / self.magnitude

    def without_special(self) -> TextExplanation:
        """The same with the tokenizer's own tokens hidden; the sum still counts them."""
        return dataclasses.replace(self, special=False)

    # ---- pictures -----------------------------------------------------------------------------------------------

    def sheet(self, pieces: bool = False) -> Sheet:
        """The content of all pictures; ``pieces`` shows tokens instead of merging them into words."""
        tokens = tuple(token for token in self.tokens if self.special or not token.special)
        words = tokens if pieces else tuple(word for word in self.words if self.special or not word.special)
        heading = f"{self.question.heading}: {self.output:+.5g}".replace("-", "−")
        return Sheet(heading, words, tokens, self._parts(), self._total(), self._remarks())

    def to_rich(self, pieces: bool = False) -> Group:
        """For a rich console: coloured words, the scale, the strongest words, the sum."""
        return terminal.rendered(self.sheet(pieces))

    def __rich__(self) -> Group:
        return self.to_rich()

    def to_html(self, pieces: bool = False) -> str:
        """A ``<div>`` that needs nothing but itself; :func:`frpc.text.page` makes a document of several."""
        return web.fragment(self.sheet(pieces))

    def _repr_html_(self) -> str:
        return self.to_html()

    def plot(self, pieces: bool = False) -> Figure:
        """A bar for each word, in reading order."""
        return chart.bars(self.sheet(pieces), "relevance")

    def __str__(self) -> str:
        return plain(self.sheet())

    def _parts(self) -> tuple[Line, ...]:
        own = math.fsum(word.relevance for word in self.words if not word.special)
        added = [word for word in self.words if word.special]
        lines = [Line("words", own)]
        if added:
            names = " ".join(dict.fromkeys(word.text for word in added))
            lines.append(
                Line("special tokens", math.fsum(w.relevance for w in added), names if self.special else f"{names}, hidden")
            )
        if self.reading.padding:
            lines.append(Line("padding", self.padding, f"{len(self.reading.padding)} positions, not shown"))
        if self.policy == "separate":
            lines.append(Line("constants", self.bias, "not part of the tokens' relevance"))
        return tuple(lines)

    def _total(self) -> tuple[Line, ...]:
        return (
            Line("total", self.total),
            Line("output", self.output, f"differs by {self.error:.0e} of all that was added"),
        )

    def _remarks(self) -> tuple[str, ...]:
        remarks = []
        if self.policy in SPREAD:
            share = f"{self.bias:+.4g}".replace("-", "−")
            remarks.append(f"The constants' share of the output, {share}, is part of the numbers above: {SPREAD[self.policy]}.")
        if 2 * self.reading.unknown > len(self.reading.pieces):
            remarks.append(
                f"{self.reading.unknown} of {len(self.reading.pieces)} tokens are unknown to the tokenizer: it may not be the "
                "model's own."
            )
        if self.reading.cut:
            remarks.append(f"The text was too long: its last {self.reading.cut} tokens were cut off and not explained.")
        return tuple(remarks)


def of(
    explanation: Explanation,
    reading: Reading,
    question: Question,
    *,
    sample: int = 0,
    column: int = 0,
    policy: str = "uniform",
    special: bool = True,
) -> TextExplanation:
    """Reads one text off an explanation of embeddings.

    With ``policy="uniform"`` the constants' share goes to the text's own tokens, and none of it to padding: a text's map is the
    same whatever stands beside it in the batch.

    Args:
        explanation: with relevance ``[B, T, E]``, or ``[B, K, T, E]`` for K targets; where there are several sources of
            that form, a token's relevance is the sum over them.
        reading: the sample's tokens.
        question: what was explained.
        sample: which of B.
        column: which of K.
        policy: the explainer's ``bias_policy``.
        special: whether to show the tokens that the tokenizer added.

    Raises:
        ShapeError: relevance of another form, or another number of positions.
        NonFiniteError: NaN or Inf in the relevance.
    """
    sources = explanation.relevance if isinstance(explanation.relevance, tuple) else (explanation.relevance,)
    columns = explanation.bias.dim() == 2
    maps = [_one(source, sample, column if columns else None) for source in sources]
    positions = len(reading.positions) + len(reading.padding)
    if any(values.shape[0] != positions for values in maps):
        raise ShapeError(f"{positions} tokens for relevance of {[values.shape[0] for values in maps]} positions.")
    bias = float(explanation.bias[sample, column] if columns else explanation.bias[sample])
    if policy == "uniform" and reading.padding:
        maps = _off_padding(maps, bias, reading.positions)
    return TextExplanation(
        reading=reading,
        relevance=np.add.reduce([values.sum(1) for values in maps]),
        output=float(explanation.output[(sample, *question.index)]),
        bias=bias,
        question=question,
        policy=policy,
        magnitude=sum(float(np.abs(values).sum()) for values in maps) or 1.0,
        special=special,
    )


def _one(relevance: Tensor, sample: int, column: int | None) -> NDArray[np.float64]:
    """One sample's map ``[T, E]``."""
    rank = 3 if column is None else 4
    if relevance.dim() != rank:
        form = "[B, T, E]" if column is None else "[B, K, T, E]"
        raise ShapeError(
            f"The relevance of a text must be {form}, one vector per token; got {list(relevance.shape)}. "
            'Compile with source="path.of.the.embedding".'
        )
    return finite(relevance[sample] if column is None else relevance[sample, column])


def _off_padding(maps: Sequence[NDArray[np.float64]], bias: float, positions: Sequence[int]) -> list[NDArray[np.float64]]:
    """Moves the constants' share, which lies evenly on all cells of the maps, onto those of the text's own positions."""
    own = np.isin(np.arange(len(maps[0])), positions)
    cells = sum(values.size for values in maps)
    kept = sum(values[own].size for values in maps)
    return [values - bias / cells + np.where(own, bias / kept, 0.0)[:, None] for values in maps]


def page(texts: Sequence[TextExplanation], title: str = "frpc: explained texts", *, pieces: bool = False) -> str:
    """A whole HTML document of several explained texts, with nothing to load and nothing to run."""
    return web.page([text.sheet(pieces) for text in texts], title)
