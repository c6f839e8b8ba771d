"""Explained texts: words lose nothing, accounts add up, and no text can become markup."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import frpc
from frpc import text
from frpc.driver.explanation import Explanation
from frpc.errors import InputError, NonFiniteError, ShapeError, TargetError
from frpc.text.sheet import colours
from frpc.text.words import Marks, marks_of, spans

PIECES = ["[CLS]", "play", "##ing", "<script>", "it", "[SEP]", "[PAD]"]
MASK = [True] * 6 + [False]
ASKED = text.Question((1,), "good", "“good” (class 1)")


def explanation(relevance: torch.Tensor, bias: torch.Tensor | None = None, separate: bool = False) -> Explanation:
    """An explanation whose output 1 is what its relevance adds up to."""
    bias = relevance.new_zeros(relevance.shape[:-2]) if bias is None else bias
    total = relevance.sum((-1, -2)) + (bias if separate else 0)
    total = total if total.dim() == 1 else total[:, 0]
    return Explanation(torch.stack([-total, total], 1), relevance, bias)


@pytest.fixture
def relevance() -> torch.Tensor:
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def found(relevance) -> text.TextExplanation:
    reading = text.listed(PIECES, MASK, special=["[CLS]", "[SEP]"])
    return text.of(explanation(relevance), reading, ASKED, sample=1)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["un", "##believ", "##ably", "good"], ["unbelievably", "good"]),
        (["un", "believ", "ably", "Ġgood", "Ċ", "really"], ["unbelievably", "good", "↵", "really"]),
        (["▁un", "believ", "ably", "▁good"], ["unbelievably", "good"]),
        (["un", "believably</w>", "good</w>"], ["unbelievably", "good"]),
        (["un", "believably", "good"], ["un", "believably", "good"]),
    ],
    ids=["WordPiece", "byte-level BPE", "SentencePiece", "end of word", "no marks"],
)
def test_pieces_become_words(pieces, words):
    marks = marks_of(pieces)
    found = spans(pieces, [False] * len(pieces), marks=marks)
    assert [span.text for span in found] == words
    assert [at for span in found for at in span.tokens] == list(range(len(pieces)))


def test_marks_are_the_vocabulary_s_majority():
    assert marks_of(["##", "#", "Ġa", "Ġb", "##x"]) is Marks.BYTE_BPE
    assert marks_of(["a", "##", "Ġ"]) is Marks.NONE


def test_word_ids_of_the_tokenizer_count_but_never_join_over_a_mark():
    pieces = ["▁a", "▁dog", "s", "!"]
    alone = spans(pieces, [False] * 4, marks=Marks.SENTENCEPIECE, word_ids=[0, 0, 0, 0])
    assert [span.text for span in alone] == ["a", "dogs!"]
    cut = spans(pieces, [False] * 4, marks=Marks.SENTENCEPIECE, word_ids=[0, 1, 1, 2])
    assert [span.text for span in cut] == ["a", "dogs", "!"]


def test_offsets_tell_where_spaces_were():
    pieces, offsets = ["don", "'", "t", "go"], [(0, 3), (3, 4), (4, 5), (6, 8)]
    found = spans(pieces, [False] * 4, marks=Marks.WORDPIECE, word_ids=[0, 1, 2, 3], offsets=offsets)
    assert [span.space for span in found] == [False, False, False, True]


def test_special_tokens_stand_alone():
    found = spans(["<s>", "he", "llo", "</s>"], [True, False, False, True], marks=Marks.BYTE_BPE)
    assert [(span.text, span.special) for span in found] == [("<s>", True), ("hello", False), ("</s>", True)]


# ---- the account ----------------------------------------------------------------------------------------------------


def test_sums_survive(found, relevance):
    expected = relevance[1].sum(1).numpy()
    assert [word.text for word in found.words] == ["[CLS]", "playing", "<script>", "it", "[SEP]"]
    assert found.words[1].tokens == (1, 2)
    assert found.words[1].relevance == pytest.approx(expected[1] + expected[2], abs=1e-14)
    assert [token.relevance for token in found.tokens] == pytest.approx(expected[:6], abs=1e-14)
    assert math.fsum(word.relevance for word in found.words) + found.padding == pytest.approx(expected.sum(), abs=1e-13)
    assert found.padding == pytest.approx(expected[6], abs=1e-14)
    assert found.total == pytest.approx(found.output, abs=1e-13)
    assert found.error <= 1e-15


def test_padding_takes_none_of_the_constants(relevance):
    """Two sources, a share of 3 on all of their cells: afterwards it lies on the six tokens alone, and the sum is what it was."""
    bias = torch.tensor([3.0, 3.0], dtype=torch.float64)
    cells = 7 * 5 + 7 * 2
    local = relevance.clone()
    local[:, 6] = 0  # the mask keeps what is padded out of the model
    other = local[..., :2] * 0.5
    whole = Explanation(torch.zeros(2, 2), (local + 3 / cells, other + 3 / cells), bias)
    found = text.of(whole, text.listed(PIECES, MASK), ASKED, sample=1)
    expected = (local[1].sum(1) + other[1].sum(1))[:6] + 3 / 6
    assert [token.relevance for token in found.tokens] == pytest.approx(expected.tolist(), abs=1e-13)
    assert found.padding == pytest.approx(0, abs=1e-13)
    assert found.total == pytest.approx(float(local[1].sum() + other[1].sum()) + 3, abs=1e-12)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_the_account_adds_up_whatever_is_shown(found, pieces, special):
    sheet = (found if special else found.without_special()).sheet(pieces)
    assert math.fsum(line.value for line in sheet.parts) == pytest.approx(sheet.total[0].value, abs=1e-13)
    assert any(word.special for word in sheet.words) is special
    shown = math.fsum(word.relevance for word in sheet.words)
    lines = {line.name: line.value for line in sheet.parts}
    assert shown == pytest.approx(lines["words"] + (lines["special tokens"] if special else 0), abs=1e-13)


@pytest.mark.parametrize("policy", ["uniform", "separate"])
def test_constants_are_inside_or_apart(relevance, policy):
    bias = torch.tensor([0.5, -2.0], dtype=torch.float64)
    reading = text.listed(PIECES)
    found = text.of(explanation(relevance, bias, policy == "separate"), reading, ASKED, sample=1, policy=policy)
    apart = [line.value for line in found.sheet().parts if line.name == "constants"]
    assert apart == ([-2.0] if policy == "separate" else [])
    assert found.total == pytest.approx(found.output, abs=1e-13)
    assert ("spread evenly" in str(found)) is (policy == "uniform")


def test_one_of_several_targets(relevance):
    several = torch.stack([relevance, 2 * relevance, -relevance], 1)  # [B, K, T, E]
    both = explanation(several)
    first, second = (text.of(both, text.listed(PIECES), ASKED, sample=1, column=k) for k in (0, 1))
    np.testing.assert_allclose(second.relevance, 2 * first.relevance, rtol=1e-15)


def test_sources_are_added(relevance):
    halves = Explanation(explanation(relevance).output, (0.25 * relevance, 0.75 * relevance), torch.zeros(2))
    found = text.of(halves, text.listed(PIECES), ASKED)
    np.testing.assert_allclose(found.relevance, relevance[0].sum(1), rtol=1e-12)


def test_what_does_not_fit_is_said(relevance):
    with pytest.raises(ShapeError, match="3 tokens for relevance of \\[7\\] positions"):
        text.of(explanation(relevance), text.listed(["a", "b", "c"]), ASKED)
    with pytest.raises(ShapeError, match=r"\[B, T, E\].*source="):
        text.of(Explanation(torch.zeros(2, 2), relevance[..., 0], torch.zeros(2)), text.listed(PIECES), ASKED)
    with pytest.raises(NonFiniteError):
        text.of(explanation(relevance / 0), text.listed(PIECES), ASKED)
    with pytest.raises(InputError, match="list of strings"):
        text.listed("playing")
    with pytest.raises(ShapeError, match="mask has 1 entries for 2"):
        text.listed(["a", "b"], [True])


# ---- pictures -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Notes every tag, and the text outside of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "title", "dir", "lang", "charset", "name", "content", "http-equiv"}
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def parsed(markup: str) -> Tags:
    tags = Tags()
    tags.feed(markup)
    assert tags.open == []
    return tags


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;", "'onclick='x", "[red]x[/red]"]


def test_html_escapes_whatever_a_text_holds(relevance):
    reading = text.listed([*HOSTILE, "</p>", "<style>"], special=HOSTILE[:1])
    asked = text.Question((1,), HOSTILE[0], f"{HOSTILE[1]} {HOSTILE[0]}")
    found = text.of(explanation(relevance), reading, asked)
    tags = parsed(text.page([found, found.without_special()], title=HOSTILE[0]))
    assert tags.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "body",
        "div",
        "h2",
        "p",
        "span",
        "br",
        "wbr",
        "table",
        "tr",
        "td",
        "th",
        "details",
        "summary",
    }
    for hostile in HOSTILE:
        assert hostile in tags.text


def test_html_needs_nothing_else(found):
    page = text.page([found])
    assert "default-src 'none'" in page
    assert not any(word in page for word in ("http://", "https://", "src=", "url(", "<script>"))
    assert found._repr_html_() == found.to_html()


def test_terminal_text_is_coloured_and_readable_without_colour(found):
    console = Console(record=True, width=100, force_terminal=True, color_system="truecolor", file=open_nothing())
    console.print(found)
    coloured = console.export_text(clear=False, styles=True)
    plain = console.export_text()
    strongest = max((word for word in found.words if not word.special), key=lambda word: abs(word.relevance))
    red, green, blue = (int(colours(math.copysign(1.0, strongest.relevance))[0][at : at + 2], 16) for at in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}m{strongest.text}" in coloured
    assert "[CLS] playing <script> it [SEP]" in plain
    assert "padding" in plain and "total" in plain and "red speaks for it" in plain


def test_markup_in_a_text_is_no_console_markup(relevance):
    found = text.of(explanation(relevance), text.listed(["[red]x[/red]", *PIECES[1:]]), ASKED)
    console = Console(width=100, file=open_nothing(), record=True)
    console.print(found)
    assert "[red]x[/red]" in console.export_text()


def open_nothing():
    import io

    return io.StringIO()


def test_colours_are_symmetric_and_stronger_with_relevance():
    assert colours(0.0) is None
    for low, high in ((0.1, 0.5), (0.5, 1.0)):
        for sign in (1, -1):
            one, other = (int(colours(sign * value)[0][1:][2:4], 16) for value in (low, high))
            assert other < one  # less green: further from white
    assert colours(1.0)[0][1:3] > colours(-1.0)[0][1:3]


def test_special_tokens_do_not_blank_the_words(relevance):
    relevance = relevance.clone()
    relevance[0, 0] = 1000.0
    found = text.of(explanation(relevance), text.listed(PIECES, special=["[CLS]"]), ASKED)
    sheet = found.sheet()
    assert sheet.limit < 100
    assert [word.text for word in sheet.beyond] == ["[CLS]"]
    assert "Beyond the scale" in found.to_html()


def test_bars_of_a_long_text_still_add_up():
    values = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = text.of(explanation(values), text.listed([f"w{at}$" for at in range(300)]), ASKED)
    axes = found.plot().axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert len(widths) == 40
    assert math.fsum(widths) == pytest.approx(found.total, abs=1e-12)
    assert "261 weaker words together" in axes.get_yticklabels()[-1].get_text()


# ---- a whole model --------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Embeds tokens and classifies their sum."""

    def __init__(self, entries: int = 11, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, 6)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(ids))).sum(1))


class Tagger(Bag):
    """One result for each position."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(ids))))


@pytest.fixture
def bag() -> Bag:
    torch.manual_seed(0)
    return Bag().double().eval()


def test_explain_a_model_of_one_s_own(bag):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    rows = [["a", "b", "##c", "d"], ["e", "f", "g", "h"]]
    found = text.explain(bag, ids=ids, tokens=rows, labels=["no", "yes", "maybe"])
    with torch.no_grad():
        expected, best = bag(ids).max(1)
    for one, value, chosen in zip(found, expected, best, strict=True):
        assert one.output == pytest.approx(float(value), abs=1e-12)
        assert one.target == int(chosen)
        assert one.label == ["no", "yes", "maybe"][int(chosen)]
        assert one.error <= 1e-12
    assert [word.text for word in found[0].words] == ["a", "bc", "d"]


def test_relevance_of_a_token_is_what_the_net_makes_of_it(bag):
    """The bag treats tokens apart, so a token's own part of the output is known: head(relu(...)) without head's bias."""
    ids = torch.tensor([1, 2, 3, 4])
    explainer = frpc.compile(bag, ids[None], bias="separate")
    found = text.explain(explainer, ids=ids, tokens=list("abcd"), target=[2, 0])
    with torch.no_grad():
        before = bag.hidden(bag.embedding(ids))
        local = (before - bag.hidden.bias) * (before > 0) @ bag.head.weight.T  # [T, C], constants apart
    for one, target in zip(found, (2, 0), strict=True):
        np.testing.assert_allclose(one.relevance, local[:, target], atol=1e-12)
        assert one.error <= 1e-12


def test_a_position_of_the_output(bag):
    torch.manual_seed(1)
    tagger = Tagger().double().eval()
    ids = torch.tensor([1, 2, 3])
    explainer = frpc.compile(tagger, ids[None], bias="separate")
    first = text.explain(explainer, ids=ids, tokens=list("abc"), target=(0, 2))
    last = text.explain(explainer, ids=ids, tokens=list("abc"), labels=["x", "y", "z"])
    assert first.target == (0, 2)
    np.testing.assert_array_equal(first.relevance[1:], 0)
    assert last.target[0] == 2
    assert last.label in "xyz"


def test_questions_that_do_not_fit(bag):
    explainer = frpc.compile(bag, torch.tensor([[1, 2]]))

    def ask(**changes):
        return text.explain(explainer, **{"ids": torch.tensor([1, 2]), "tokens": ["a", "b"]} | changes)

    with pytest.raises(TargetError, match="classes 0 to 2"):
        ask(target=3)
    with pytest.raises(TargetError, match="nearest names: maybe"):
        ask(target="mabye", labels=["no", "yes", "maybe"])
    with pytest.raises(TargetError, match="names a position"):
        ask(target=(0, 1))
    with pytest.raises(InputError, match="do not match"):
        ask(tokens=["a", "b", "c"])
    with pytest.raises(InputError, match="Give tokenizer and text"):
        text.explain(explainer, text="a b")
    with pytest.raises(InputError, match="at least one target"):
        ask(target=[])
    with pytest.raises(InputError, match="already compiled"):
        ask(bias="separate")
    with pytest.raises(ShapeError, match="2 labels for 3 outputs"):
        ask(labels=["no", "yes"])
