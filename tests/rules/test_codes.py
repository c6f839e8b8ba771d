"""Numbers that a model rounds and looks up have no share of their own: that is said, and never spread in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import SourceError


class Coded(nn.Module):
    """The first column is a category; `find` makes a row of the table of it."""

    def __init__(self, find: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.find, self.table, self.last = find, nn.Embedding(6, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.table(self.find(x)), x[:, 1:]], 1))


EDGES = torch.tensor([-1.0, 0.0, 1.0, 2.0])
CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "long": lambda x: x[:, 0].long(),
    "all cast, one taken": lambda x: x.long()[:, 0],
    "int": lambda x: x[:, :1].int().clamp(min=0)[:, 0],
    "rounded": lambda x: (x[:, 0] + 0.2).round().to(torch.int64),
    "bins": lambda x: torch.bucketize(x[:, 0].contiguous(), EDGES),
    "counted": lambda x: (x[:, 0] * 2 > 1).long() + x[:, 0].trunc().long(),
}


def example() -> Tensor:
    return torch.tensor([[3.0, 0.2, 0.7], [1.0, -0.4, 0.1]])


def made(find: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Coded(find).eval()


@pytest.mark.parametrize("name", CODES)
def test_a_column_of_codes_names_what_to_ask(name: str) -> None:
    model, x = made(CODES[name]), example()
    with pytest.raises(SourceError, match=r'test_codes\.py:\d+(.|\n)*source=\["table", "input"\]'):
        frpc.compile(model, (x,))
    with pytest.raises(SourceError, match="are codes"):
        frpc.compile(model)(x, target=1)


def test_what_the_error_advises_works() -> None:
    model, x = made(CODES["long"]), example()
    for source in (["table", "input"], ["input", "table"]):
        explainer = frpc.compile(model, (x,), source=source, bias="separate")
        found = explainer(x, target=1)
        of_input, of_table = found.relevance
        weight = model.last.weight[1]
        torch.testing.assert_close(of_table, model.table(x[:, 0].long()).detach() * weight[:4].detach())
        torch.testing.assert_close(of_input[:, 1:], x[:, 1:] * weight[4:].detach())
        assert not of_input[:, 0].any()
        torch.testing.assert_close(of_input.sum(1) + of_table.sum(1) + found.bias, model(x)[:, 1].detach())
    left = frpc.compile(model, (x,), source="input")(x, target=1)
    torch.testing.assert_close(left.relevance.sum(1), model(x)[:, 1].detach())


def test_a_whole_input_of_codes() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.table(x.long()).mean(1))

    with pytest.raises(SourceError, match="table"):
        frpc.compile(Ids(), (torch.tensor([[1.0, 2.0], [3.0, 0.0]]),))


@pytest.mark.parametrize("method", ["lid-ig", "lrp-epsilon"])
def test_other_accounts_refuse_codes_too(method: str) -> None:
    with pytest.raises(SourceError, match="are codes"):
        frpc.compile(made(CODES["long"]), (example(),), method=method)


def test_the_gradient_by_a_code_is_zero_as_autograds() -> None:
    model, x = made(CODES["long"]), example()
    g = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(g)[:, 1].sum(), g)
    torch.testing.assert_close(frpc.compile(model, (x,), method="gradient")(x, target=1).relevance, want)


def largest(x: Tensor) -> Tensor:
    return x.gather(1, x.argmax(1, keepdim=True)) + 0 * x


ORDINARY: dict[str, Callable[[Tensor], Tensor]] = {
    "gate": lambda x: (x > 0).float() * x,
    "gate by another column": lambda x: torch.where(x[:, :1] > 0, x[:, 1:2], -x[:, 1:2]).expand(-1, 3),
    "mask of whole numbers": lambda x: x * (x > 0).long(),
    "largest": largest,
    "sorted": lambda x: x.gather(1, x.argsort(1)),
    "mean of what is not 0": lambda x: x / (x != 0).sum(1, keepdim=True),
    "unused column": lambda x: x[:, 1:2].expand(-1, 3),
    "code and value": lambda x: x * torch.arange(6.0)[x.abs().long().clamp(max=5)],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_choices_are_no_codes(name: str) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(ORDINARY[name](x))

    model, x = Chosen().eval(), example()
    torch.testing.assert_close(frpc.compile(model, (x,))(x, target=1).relevance.sum(1), model(x)[:, 1].detach())
