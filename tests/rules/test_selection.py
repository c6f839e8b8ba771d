"""Selection where it is delicate: ties, places written twice, masks, the batch, casts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc

PLACES = torch.tensor([1, 1, 3])


class Function(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def explained(function: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> Tensor:
    explainer = frpc.compile(Function(function), (x,))
    relevance = explainer(x, seed=seed).relevance
    assert isinstance(relevance, Tensor)
    return relevance


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda x: x.amax(1), [[0.0, 3.0, 3.0], [3.0, 0.0, 0.0]]),
        (lambda x: x.amax((1, 2)), [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]),
        (lambda x: x.max(2)[0].amax(1), [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_the_first_of_equals_wins(choose: Callable[[Tensor], Tensor], expected: list[list[float]]) -> None:
    x = torch.tensor([[[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    relevance = explained(choose, x, torch.ones_like(choose(x)))
    assert relevance.tolist() == [expected, [[0.0] * 3] * 2]


def test_a_place_written_twice_holds_one_value() -> None:
    x = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 4)

    def twice(x: Tensor) -> Tensor:
        return torch.index_put(x, (torch.arange(x.shape[0])[:, None], PLACES), x[:, :3] * 10)

    y = twice(x)
    relevance = explained(twice, x, torch.ones_like(y))
    torch.testing.assert_close(relevance.sum(1), y.sum(1))


def test_columns_stay_in_front() -> None:
    """Index tensors with a slice between them put their dimensions first; targets must not land among them."""
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def spread(x: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0]), :, PLACES[0]][:, :, 2]

    explainer = frpc.compile(Function(spread), (x,))
    relevance = explainer(x, target=torch.tensor([[0, 3], [1, 1], [2, 0]])).relevance
    assert relevance.shape == (3, 2, 4, 5, 4)
    torch.testing.assert_close(relevance.flatten(2).sum(2), spread(x).gather(1, torch.tensor([[0, 3], [1, 1], [2, 0]])))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x + x.amax(0), "sample"),
        (lambda x: x.sort(0)[0], "sample"),
        (lambda x: x.cumsum(0), "sample"),
        (lambda x: (x * 2).as_strided((x.shape[0], 2), (4, 2)), "reads memory by address"),
    ],
)
def test_what_cannot_be_told_apart_is_declined(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(frpc.FrpcError, match=reason):
        frpc.compile(Function(function), (torch.randn(3, 4),))


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_a_cast_passes_relevance_on(low: torch.dtype) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seed = torch.ones_like(x)
    relevance = explained(lambda x: x.to(low).to(torch.float64), x, seed)
    assert relevance.dtype == torch.float64
    torch.testing.assert_close(relevance, x, rtol=0.0, atol=0.0)


def test_integers_carry_nothing() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    relevance = explained(lambda x: x * x.to(torch.int64), x, torch.ones_like(x))
    torch.testing.assert_close(relevance, x * x.to(torch.int64))


def test_a_frame_of_minus_infinity_is_passed_over() -> None:
    """TensorFlow's padding of a max pool: the frame never wins, and its share of the constants is 0, not NaN."""
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def pooled(a: Tensor) -> Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(a, (0, 1, 0, 1), value=-torch.inf), 3, 2).flatten(1)

    seed = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    relevance = explained(pooled, x, seed)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((pooled(leaf) * seed).sum(), leaf)
    torch.testing.assert_close(relevance, x * gradient)
