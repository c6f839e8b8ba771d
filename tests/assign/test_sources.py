"""Sources, keyword inputs, gates: what relevance is spread over, and which operands it goes to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc.errors import InputError, LayerNameError, OptionError, UnsupportedOpError
from frpc.rules.carriers import Product

TIGHT = 1e-12


def settled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def off(relevance: Tensor, output: Tensor) -> float:
    """``|sum V - y| / sum |V|``, the largest of all samples."""
    flat = relevance.flatten(1)
    return float(((flat.sum(1) - output.detach()).abs() / flat.abs().sum(1)).max())


class Reader(nn.Module):
    """Tokens and a mask in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(7, 8)
        self.mixer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.arange(7)[None])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        h = torch.relu(self.mixer(self.words(ids) + self.places(self.order)))
        h = h if mask is None else h * mask[..., None]
        return {"hidden": h, "logits": self.head(h.mean(1))}


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6]])


def test_integer_inputs_are_explained_at_their_embedding() -> None:
    model = settled(Reader())
    out = frpc.compile(model, (IDS,))(IDS, target=1)
    assert out.relevance.shape == (3, 7, 8)
    assert off(out.relevance, model(IDS)["logits"][:, 1]) <= TIGHT
    # Positions are no input: what comes from them is a constant, as if the embedded words were given.
    assert float(out.bias.abs().min()) > 0


def test_the_embedding_is_explained_as_if_it_were_the_input() -> None:
    class Embedded(nn.Module):
        def __init__(self, reader: Reader) -> None:
            super().__init__()
            self.reader = reader

        def forward(self, words: Tensor) -> Tensor:
            reader = self.reader
            return reader.head(torch.relu(reader.mixer(words + reader.places(reader.order))).mean(1))

    model = settled(Reader())
    words = model.words(IDS).detach()
    expected = frpc.compile(Embedded(model).eval(), (words,))(words, target=2).relevance
    assert torch.allclose(frpc.compile(model, (IDS,))(IDS, target=2).relevance, expected, rtol=0, atol=1e-14)


def test_inputs_by_name_in_any_order() -> None:
    model, mask = settled(Reader()), torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 3)
    explainer = frpc.compile(model, {"mask": mask, "ids": IDS})
    by_name = explainer(mask=mask, ids=IDS, target=0)
    assert torch.equal(by_name.relevance, explainer(IDS, mask, target=0).relevance)  # in forward's order
    assert torch.equal(by_name.output, model(IDS, mask)["logits"])
    local = frpc.compile(model, {"ids": IDS, "mask": mask}, bias="separate")(ids=IDS, mask=mask, target=0)
    assert not local.relevance[:, 5:].any()  # masked tokens have no influence
    assert torch.allclose(explainer.at("mixer", ids=IDS, mask=mask, target=0)["mixer"].sum(-1)[:, 5:], torch.zeros(3, 2).double())


def test_unknown_names_and_mixtures_are_refused() -> None:
    model = settled(Reader())
    with pytest.raises(InputError, match="has no argument 'id'"):
        frpc.compile(model, {"id": IDS})
    explainer = frpc.compile(model, {"ids": IDS})
    with pytest.raises(InputError, match="all inputs by position or all by name"):
        explainer(IDS, mask=IDS, target=0)
    with pytest.raises(InputError, match="the explainer takes ids"):
        explainer(words=IDS, target=0)


def test_logits_are_explained_unless_another_output_is_named() -> None:
    model = settled(Reader())
    hidden = frpc.compile(model, (IDS[:2],), output="hidden")(IDS[:2], target=(2, 6))
    assert off(hidden.relevance, model(IDS[:2])["hidden"][:, 2, 6]) <= TIGHT
    assert not hidden.relevance[:, 3].sub(hidden.bias[:, None] / 56).abs().gt(1e-15).any()  # token 3 is not in token 2's neurons


def test_any_layer_can_be_the_source() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    x = torch.randn(4, 5, dtype=torch.float64)
    out = frpc.compile(model, (x,), source="1")(x, target=1)
    assert out.relevance.shape == (4, 6)
    assert off(out.relevance, model(x)[:, 1]) <= TIGHT
    later = model[2:]
    inner = model[:2](x).detach()
    assert torch.allclose(out.relevance, frpc.compile(later, (inner,))(inner, target=1).relevance, rtol=0, atol=1e-14)


def test_two_sources_share_the_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dense, self.head = nn.Embedding(9, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.dense(x) + self.table(ids)))

    model = settled(Two())
    x, ids = torch.randn(3, 3, dtype=torch.float64), torch.tensor([1, 8, 3])
    out = frpc.compile(model, (x, ids))(x, ids, target=0)
    assert [tuple(r.shape) for r in out.relevance] == [(3, 3), (3, 4)]
    assert off(torch.cat(list(out.relevance), 1), model(x, ids)[:, 0]) <= TIGHT
    alone = frpc.compile(model, (x, ids), source="input")(x, ids, target=0)
    assert alone.relevance.shape == (3, 3)
    assert off(alone.relevance, model(x, ids)[:, 0]) <= TIGHT


def test_a_source_that_is_no_layer_names_the_nearest() -> None:
    with pytest.raises(LayerNameError, match="words"):
        frpc.compile(settled(Reader()), (IDS,), source="word")
    with pytest.raises(OptionError, match="no input is floating-point"):
        frpc.compile(settled(Reader()), (IDS,), source="input")


class Gated(nn.Module):
    """``f(Ax) * (Bx)``, with a factor f that may be a gate."""

    def __init__(self, factor: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(4, 4), nn.Linear(4, 4), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor(self.a(x)) * self.b(x)


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("factor", "product", "share"),
    [
        (nn.Sigmoid(), "auto", 0.0),
        (nn.Hardsigmoid(), "auto", 0.0),
        (nn.Softmax(-1), "auto", 0.0),
        (nn.Sigmoid(), "half", 0.5),
        (nn.GELU(), "auto", 0.5),
        (nn.GELU(), "gate", 1.0),
    ],
)
def test_products_share_as_asked(factor: nn.Module, product: Product, share: float) -> None:
    """The factor on the left gets ``share`` of the product: of Ax's neurons, all relevance is its share of z, constants apart."""
    model = settled(Gated(factor))
    explainer = frpc.compile(model, (X,), rule=frpc.rules.FRP(product=product))
    assert off(explainer(X, target=2).relevance, model(X)[:, 2]) <= TIGHT
    right = explainer.at("b", X, target=2)["b"].sum(1)
    assert torch.allclose(right, (1 - share) * model(X)[:, 2], rtol=0, atol=1e-14)


def test_products_by_module_path() -> None:
    model = settled(nn.Sequential(Gated(nn.Sigmoid()), Gated(nn.Sigmoid())))
    explainer = frpc.compile(model, (X,), rule=frpc.rules.FRP(product={"1": "half"}))
    z = model(X)[:, 2]
    assert torch.allclose(explainer.at("1.b", X, target=2)["1.b"].sum(1), z / 2, rtol=0, atol=1e-14)
    with pytest.raises(OptionError, match="choose one of auto, half, gate"):
        frpc.rules.FRP(product="whole")  # type: ignore[arg-type]


class Screened(nn.Module):
    """An operator without a rule, on the way into a gate alone or into the output."""

    def __init__(self, into_gate: bool) -> None:
        super().__init__()
        self.into_gate, self.a = into_gate, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        odd = torch.special.bessel_j0(self.a(x))
        return torch.sigmoid(odd) * x if self.into_gate else odd * x


def test_gaps_count_only_where_relevance_goes() -> None:
    model = settled(Screened(True))
    assert off(frpc.compile(model, (X,))(X, target=1).relevance, model(X)[:, 1]) <= TIGHT
    with pytest.raises(UnsupportedOpError, match="bessel_j0"):
        frpc.compile(settled(Screened(False)), (X,))
    with pytest.raises(UnsupportedOpError, match="bessel_j0"):
        frpc.compile(model, (X,), rule=frpc.rules.FRP(product="half"))


def test_a_later_result_of_an_operator_is_a_gap() -> None:
    class Spread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.native_layer_norm(x, [4], None, None, 1e-5)[1]

    with pytest.raises(UnsupportedOpError):
        frpc.compile(Spread().eval(), (X,))


class TimeFirst(nn.Module):
    """Samples within time steps, all in one dimension: ``[T * B, F]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[1], x.shape[0]
        h = torch.relu(self.a(x.transpose(0, 1).reshape(steps * batch, 4)))
        return self.b(h.reshape(steps, batch, 5)).sum(0)


def test_constants_stay_with_their_sample_where_time_steps_lie_outside() -> None:
    model = settled(TimeFirst())
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    out = frpc.compile(model, (x,), bias="separate")(x, target=1)
    whole = out.relevance.flatten(1).sum(1) + out.bias
    assert torch.allclose(whole, model(x)[:, 1], rtol=0, atol=1e-13)
    alone = frpc.compile(model, (x,), bias="separate")(x[2:], target=1)
    assert torch.allclose(alone.bias, out.bias[2:], rtol=0, atol=1e-13)
