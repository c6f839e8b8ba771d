"""What every picture of an explained text shows: words with their relevance, one scale, and lines that add up to the output."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb

from frpc.plots.panels import AGAINST, FOR, signed

__all__ = ["ENDS", "Line", "Sheet", "Word", "colours", "plain"]

ENDS = ("speaks against it", "speaks for it")
FAINT = 0.02  # of the scale: no colour that an eye could tell from none


@dataclass(frozen=True)
class Word:
    """A word, or a single token, with its relevance.

    Attributes:
        text: as a reader would spell it; for a token, as the tokenizer writes it.
        tokens: its positions in the input.
        relevance: summed over them.
        special: whether the tokenizer added it ([CLS], <s>).
        space: whether a space goes before it.
    """

    text: str
    tokens: tuple[int, ...]
    relevance: float
    special: bool = False
    space: bool = True


@dataclass(frozen=True)
class Line:
    """One line of the sum: a name, a number, and a remark."""

    name: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """One explained number of one text, ready to be drawn.

    Attributes:
        heading: what is explained.
        words: in reading order; hidden ones are left out.
        tokens: the same, piece by piece.
        parts: lines that add up to the total.
        total: their sum, and the output it should be.
        remarks: sentences below the sum.
    """

    heading: str
    words: tuple[Word, ...]
    tokens: tuple[Word, ...]
    parts: tuple[Line, ...]
    total: tuple[Line, ...]
    remarks: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """End of the colour scale: the largest ``|relevance|`` among words of the text, so that a [CLS] does not blank them."""
        own = [abs(word.relevance) for word in self.words if not word.special]
        return max(own, default=0.0) or max((abs(word.relevance) for word in self.words), default=0.0) or 1.0

    def strength(self, word: Word) -> float:
        """Relevance on a scale of -1 to 1; words beyond its ends get the ends."""
        return min(max(word.relevance / self.limit, -1.0), 1.0)

    @property
    def beyond(self) -> list[Word]:
        """Words whose relevance lies beyond the scale."""
        return [word for word in self.words if abs(word.relevance) > self.limit]

    def strongest(self, sign: int, count: int) -> list[Word]:
        """The words that speak loudest for (1) or against (-1) the output."""
        found = [word for word in self.words if sign * word.relevance > 0]
        return sorted(found, key=lambda word: -abs(word.relevance))[:count]


def colours(strength: float) -> tuple[str, str] | None:
    """Colours of background and letters for a strength in -1..1; None for no colour."""
    if abs(strength) < FAINT:
        return None
    share = 0.08 + 0.87 * abs(strength)
    red, green, blue = (1 + share * (part - 1) for part in to_rgb(FOR if strength > 0 else AGAINST))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return to_hex((red, green, blue)), "#ffffff" if luminance < 0.25 else "#111111"


def plain(sheet: Sheet) -> str:
    """A table without colour: every word and its relevance, then the sum."""
    shown = [(word.text, signed(word.relevance)) for word in sheet.words]
    account = [(line.name, signed(line.value) + (f"  {line.note}" if line.note else "")) for line in sheet.parts + sheet.total]
    width = max(len(name) for name, _ in shown + account)
    lines = [sheet.heading, *(f"  {name:<{width}}  {value}" for name, value in shown)]
    lines += ["  " + "─" * (width + 9), *(f"  {name:<{width}}  {value}" for name, value in account)]
    return "\n".join([*lines, *sheet.remarks])
