"""Embedding bags: every token of a bag has relevance, in every mode, and padding has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
from families import compiled, randn
from frpc.driver.prepare import prepare
from frpc.errors import OptionError, ShapeError
from frpc.rules import LID, LRP, Gradient
from graphs import calls
from rule_twins import agrees, from_piece

TOKENS = torch.tensor([[3, 7, 0, 5, 7], [0, 0, 2, 0, 0], [1, 0, 4, 6, 0]])


class Bag(nn.Module):
    """A bag of words, and a layer with a bias behind it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.EmbeddingBag(9, 6, **options), nn.Linear(6, 2)  # type: ignore[arg-type]
        nn.init.normal_(self.words.weight)  # the row of padding too: it must not be read

    def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
        found: Tensor = self.out(self.words(tokens, *rest))
        return found


class Weighed(Bag):
    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self.out(self.words(tokens, None, weights))
        return found


def by_hand(bag: Bag, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's definition on looked-up rows ``[B, L, D]``, bag by bag."""

    def function(rows: Tensor) -> Tensor:
        found = []
        for bag_tokens, bag_rows in zip(tokens.tolist(), rows, strict=True):
            kept = [row for token, row in zip(bag_tokens, bag_rows, strict=True) if token != bag.words.padding_idx]
            whole = torch.stack(kept) if kept else torch.zeros(1, rows.shape[-1], dtype=rows.dtype)
            reduce = {"sum": whole.sum(0), "mean": whole.mean(0), "max": whole.max(0)[0]}
            found.append(reduce[bag.words.mode])
        result: Tensor = bag.out(torch.stack(found))
        return result

    return function


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_every_token_has_its_share(mode: str, padding: int | None) -> None:
    """`[B, L, D]`: the map of the rows that are looked up, x J + c/N; a bag of padding alone is all constant."""
    bag = Bag(mode=mode, padding_idx=padding).double().eval()
    tokens = TOKENS if padding is None else torch.cat([TOKENS, torch.zeros(1, 5, dtype=torch.int64)])
    rows, seed = bag.words.weight.detach()[tokens], randn(len(tokens), 2)
    explainer = compiled(bag, tokens)
    found = explainer(tokens, seed=seed)
    assert agrees(found.output, bag(tokens).detach(), 1e-13)
    assert found.relevance.shape == (*tokens.shape, 6)
    assert agrees(found.relevance.flatten(1), from_piece(by_hand(bag, tokens), (rows,), seed))  # type: ignore[arg-type]
    _, gradient = torch.autograd.functional.vjp(by_hand(bag, tokens), rows, seed)
    assert agrees(frpc.compile(bag, (tokens,), rule=Gradient(False))(tokens, seed=seed).relevance, gradient)
    nothing = by_hand(bag, tokens)(torch.zeros_like(rows)).detach()
    gained = ((bag(tokens).detach() - nothing) * seed).sum(1)
    for rule in (LID(), LRP(0.0)):
        shared = compiled(bag, tokens, rule=rule)(tokens, seed=seed).relevance
        assert bool(torch.isfinite(shared).all())
        if rule == LID():
            assert bool(((shared.flatten(1).sum(1) - gained).abs() <= 1e-12 * shared.flatten(1).abs().sum(1)).all())
    if padding is not None:
        separate = compiled(bag, tokens, bias="separate")(tokens, target=1).relevance
        assert not separate[tokens == padding].any()


def test_weights_of_tokens_are_values_too() -> None:
    """A row and its weight share their product."""
    bag, weights = Weighed(mode="sum").double().eval(), randn(3, 5, seed=3)
    rows, seed = bag.words.weight.detach()[TOKENS], randn(3, 2)
    given, looked_up = frpc.compile(bag, (TOKENS, weights))(TOKENS, weights, seed=seed).relevance
    product = torch.einsum("bld,bl,od,bo->bld", rows, weights, bag.out.weight.detach(), seed)
    share = (seed @ bag.out.bias.detach()) / (rows[0].numel() + weights[0].numel())
    assert agrees(looked_up, product / 2 + share[:, None, None])
    assert agrees(given, product.sum(-1) / 2 + share[:, None])


def test_any_number_of_bags() -> None:
    bag = Bag(mode="mean", padding_idx=0).double().eval()
    explainer = frpc.compile(bag, (TOKENS,))
    more = TOKENS.repeat(2, 1)
    assert agrees(explainer(more, target=1).relevance, explainer(TOKENS, target=1).relevance.repeat(2, 1, 1))
    assert agrees(explainer(TOKENS[:1], target=1).relevance, explainer(TOKENS, target=1).relevance[:1])


def test_bags_given_by_offsets_are_refused_by_name() -> None:
    """They have no batch of samples: the message says where the bag is, and what to give instead."""
    bag, tokens = Bag(mode="sum").eval(), torch.tensor([1, 2, 3])
    expected = r"EmbeddingBag gets one list of tokens and offsets here.*\n    words   test_bags\.py:\d+   .*self\.words\(tokens"
    with pytest.raises(OptionError, match=expected):
        frpc.compile(bag, (tokens, torch.tensor([0, 1, 2])))
    with pytest.raises(ShapeError, match=r"different batch sizes: \[2, 6\].*EmbeddingBag: give it bags of one length, \[B, L\]"):
        frpc.compile(bag, (torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2])))


@pytest.mark.parametrize(
    "offsets",
    [lambda n: torch.arange(0, 5 * n, 4), lambda n: torch.arange(5, 5 * n, 5), lambda n: torch.arange(0, 10 * n, 10)],
    ids=["other lengths", "a first bag left out", "empty bags"],
)
def test_bags_of_several_lengths_are_left_alone(offsets: Callable[[int], Tensor]) -> None:
    """Offsets that only look like those of a batch: the step is no length, or they do not start at the first token."""

    class Uneven(Bag):
        def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
            found: Tensor = self.out(self.words(tokens.reshape(-1), offsets(3)))
            return found

    assert "embedding" not in calls(prepare(Uneven(mode="sum").eval(), [TOKENS], None).canonical)
