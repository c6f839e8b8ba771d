"""Models that mix samples: refused, at the first call that shows it; and what only looks like mixing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import BatchError


class Rolled(nn.Module):
    def __init__(self, by: int = 1) -> None:
        super().__init__()
        self.emb, self.lin, self.by = nn.Embedding(10, 4), nn.Linear(4, 3), by

    def forward(self, ids: Tensor) -> Tensor:
        e = self.emb(ids)[:, 0]
        return self.lin(e + e.roll(self.by, 0))


@pytest.mark.parametrize("ids", [[[1], [2]], [[1]], [[1], [1]], [[3], [1], [2]], [[1, 1]]])
def test_mixing_of_whole_numbers(ids: list[list[int]]) -> None:
    with pytest.raises(BatchError, match="One sample's result depends on the other samples of the batch"):
        frpc.compile(Rolled(), (torch.tensor(ids),))


@pytest.mark.parametrize("by", [2, 3, 5])
def test_mixing_of_samples_far_apart(by: int) -> None:
    """Of a few samples it may not show; the example's are all tried."""
    with pytest.raises(BatchError, match="One sample's result depends on the other samples of the batch"):
        frpc.compile(Rolled(by), (torch.arange(8)[:, None],))


def test_mixing_shows_at_the_first_call_of_several_samples() -> None:
    explainer = frpc.compile(Rolled(3), (torch.tensor([[1]]),))
    explainer(torch.tensor([[1]]), target=0)
    with pytest.raises(BatchError, match=r"differ by .* of the largest value if they are run alone"):
        explainer(torch.arange(6)[:, None], target=0)


class Masked(nn.Module):
    """Only the mask of other samples is seen."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask.any(0) if mask.dtype is torch.bool else x * (mask.amax(0) > 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mixing_through_a_mask_alone(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 0], [0, 1, 0]]).to(dtype)
    with pytest.raises(BatchError, match="One sample's result depends on the other samples of the batch"):
        frpc.compile(Masked(), (torch.randn(2, 3), mask))


class Spans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.width, self.out = nn.Embedding(30, 4), nn.Embedding(10, 4), nn.Linear(8, 2)

    def forward(self, ids: Tensor, span: Tensor) -> Tensor:
        return self.out(torch.cat([self.word(ids).mean(1), self.width(span[:, 1] - span[:, 0])], 1))


@pytest.mark.parametrize("count", [1, 2])
def test_the_trial_takes_no_values_that_the_model_does_not(count: int) -> None:
    """An end before its beginning would index out of range."""
    ids, span = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 4], [2, 3]])
    found = frpc.compile(Spans(), (ids[:count], span[:count]))(ids, span, target=1)
    assert isinstance(found.relevance, tuple)
    assert torch.allclose(sum(r.flatten(1).sum(1) for r in found.relevance), found.output[:, 1], atol=1e-6)


def test_columns_of_codes() -> None:
    """Tables with a number of codes of their own for every column."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Embedding(3, 4), nn.Embedding(50, 4), nn.Linear(8, 2)

        def forward(self, codes: Tensor) -> Tensor:
            return self.out(torch.cat([self.one(codes[:, 0]), self.two(codes[:, 1])], 1))

    for codes in (torch.tensor([[2, 49]]), torch.tensor([[2, 49], [0, 7]])):
        assert not frpc.compile(Table(), (codes,)).refusals


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 3)

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        return self.lin(h.index_add(0, edges[1], h[edges[0]]))


@pytest.mark.parametrize(("nodes", "edges"), [(6, [[0, 1, 5], [2, 3, 4]]), (2, [[0, 1, 1], [1, 0, 1]])])
def test_nodes_of_a_graph_are_no_samples(nodes: int, edges: list[list[int]]) -> None:
    with pytest.raises(BatchError, match=r"counts the nodes of a graph.*store the graph as a buffer of the model and explain"):
        frpc.compile(Graph(), (torch.randn(nodes, 5), torch.tensor(edges)))


def test_what_could_not_be_tried_is_said() -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return self.lin(x) * (kind * 2 + 1)

    one = frpc.compile(Coded(), (torch.randn(1, 4), torch.tensor([[3]])))
    assert [str(r) for r in one.refusals] == [
        "the test that samples are independent not used at verification: input 1 could not be changed: give example "
        "inputs of two different samples"
    ]
    assert not frpc.compile(Coded(), (torch.randn(2, 4), torch.tensor([[3], [4]]))).refusals
