"""Recurrent layers: unrolled they compute the same, conserve, and their relevance is the thesis's recursion through time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import frpc
from frpc.canonicalize.recurrent import masked, unroll_recurrent_layers
from frpc.capture.export import capture
from frpc.core.snapshot import snapshot
from places import DATA, EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning")  # torch's own: it flattens weights again

B, T, E, H = 4, 3, 5, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: Callable[..., nn.RNNBase], **options: Any) -> nn.RNNBase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(E, H, **options).double().eval()


class Whole(nn.Module):
    """Everything a recurrent layer returns, side by side, samples first."""

    def __init__(self, layer: nn.RNNBase, given: bool = False) -> None:
        super().__init__()
        self.layer = layer
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = (layer.proj_size or H, H) if isinstance(layer, nn.LSTM) else (H,)
        self.given = [randn(count, 1, size, seed=9 + i) for i, size in enumerate(sizes)] if given else None

    def initial(self, batch: int) -> Any:
        if self.given is None:
            return None
        states = tuple(s.expand(-1, batch, -1).contiguous() for s in self.given)
        return states if len(states) > 1 else states[0]

    def run(self, x: Tensor, state: Any, *lengths: Tensor) -> tuple[Tensor, Any]:
        return self.layer(x, state)

    def forward(self, x: Tensor, *lengths: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        output, last = self.run(x, self.initial(x.shape[0 if self.layer.batch_first else 1]), *lengths)
        output = output if self.layer.batch_first else output.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([output.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


LAYERS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any], bool]] = {
    "lstm": (nn.LSTM, {"batch_first": True}, False),
    "lstm, steps first, no bias": (nn.LSTM, {"bias": False}, False),
    "lstm, two layers, both directions, projected, given state": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dropout": 0.4, "batch_first": True},
        True,
    ),
    "lstm, projected, no bias": (nn.LSTM, {"proj_size": 1, "bias": False, "batch_first": True}, False),
    "gru": (nn.GRU, {"batch_first": True}, False),
    "gru, two layers, both directions, given state": (
        nn.GRU,
        {"num_layers": 2, "bidirectional": True, "dropout": 0.2, "batch_first": True},
        True,
    ),
    "gru, steps first, no bias, both directions": (nn.GRU, {"bias": False, "bidirectional": True}, False),
    "tanh": (nn.RNN, {"batch_first": True}, False),
    "tanh, two layers, both directions, given state": (
        nn.RNN,
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        True,
    ),
    "relu, steps first, three layers": (nn.RNN, {"nonlinearity": "relu", "num_layers": 3}, False),
    "relu, no bias, both directions": (
        nn.RNN,
        {"nonlinearity": "relu", "bias": False, "bidirectional": True, "batch_first": True},
        False,
    ),
}


def whole(name: str) -> Whole:
    kind, options, given = LAYERS[name]
    return Whole(made(kind, **options), given).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_unrolled_layers_compute_the_same(name: str) -> None:
    model = whole(name)
    graph_module = capture(snapshot(model), [randn(B, T, E)]).graph_module
    assert unroll_recurrent_layers(graph_module) is True
    graph_module.graph.lint()
    graph_module.recompile()
    x = randn(5, T, E, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), model(x), rtol=1e-12, atol=1e-12)
    assert unroll_recurrent_layers(graph_module) is False


ALONE = [pytest.param(name, marks=pytest.mark.slow) for name in LAYERS if "," not in name]  # the recursion below has them


@pytest.mark.parametrize("name", [*(name for name in LAYERS if "two layers" in name), *ALONE])
def test_conservation(name: str) -> None:
    """Any functional of all results, of a batch of any size, is the sum of its map."""
    model, x = whole(name), randn(B, T, E)
    explainer = frpc.compile(model, (x,))
    for batch in (B, 1):
        with torch.no_grad():
            output = model(x[:batch])
        seed = randn(*output.shape, seed=2)
        relevance = explainer(x[:batch], seed=seed).relevance
        error = (relevance.sum((1, 2)) - (seed * output).sum(1)).abs()
        assert bool((error <= 1e-12 * relevance.abs().sum((1, 2))).all())


# The thesis's recursion -------------------------------------------------------------------------------------------------


@dataclass
class Carried:
    """Neurons and their maps over all time steps of the input: ``maps[i, t]`` is the score of x_t for neuron i (T 4.14)."""

    value: Tensor  # [I]
    maps: Tensor  # [I, T, E]

    def __add__(self, other: Carried) -> Carried:
        return Carried(self.value + other.value, self.maps + other.maps)

    def times(self, gate: Tensor) -> Carried:
        return Carried(self.value * gate, self.maps * gate[:, None, None])

    def affine(self, weight: Tensor, bias: Tensor) -> Carried:
        """``W a + b``: every cell of the input gets its share of b (T 3.7)."""
        maps = torch.einsum("ij,jte->ite", weight, self.maps)
        return Carried(weight @ self.value + bias, maps + bias[:, None, None] / self.maps[0].numel())

    def through(self, f: Callable[[Tensor], Tensor]) -> Carried:
        """f with f(0) = 0, times ``f(z) / z``: T writes f of the map, which sums to f(z) for ReLU alone."""
        return self.times(torch.where(self.value == 0, 0.0, f(self.value) / self.value))

    def sigmoid(self) -> Carried:
        """``1/2 + tanh(z/2)/(2z) z`` (the method page's row)."""
        from_input = self.through(lambda z: z.sigmoid() - 0.5)
        return Carried(from_input.value + 0.5, from_input.maps + 0.5 / self.maps[0].numel())

    def parts(self, count: int) -> list[Carried]:
        return [Carried(v, m) for v, m in zip(self.value.chunk(count), self.maps.chunk(count), strict=True)]


def steps_of(x: Tensor) -> list[Carried]:
    """The input's own maps: x_t lies in step t, and nowhere else."""
    length, features = x.shape
    steps = []
    for t in range(length):
        maps = x.new_zeros(features, length, features)
        maps[torch.arange(features), t, torch.arange(features)] = x[t]
        steps.append(Carried(x[t], maps))
    return steps


def nothing(steps: list[Carried]) -> Carried:
    return Carried(torch.zeros(H, dtype=torch.float64), torch.zeros(H, *steps[0].maps.shape[1:], dtype=torch.float64))


def rnn_twin(f: Callable[[Tensor], Tensor]) -> Callable[..., list[Carried]]:
    """``s_t = f(U x_t + W s_{t-1})`` (T 4.12), all maps carried forward (T 4.15)."""

    def run(steps: list[Carried], w: Tensor, u: Tensor, b: Tensor, d: Tensor) -> list[Carried]:
        s, found = nothing(steps), []
        for x in steps:
            s = (x.affine(w, b) + s.affine(u, d)).through(f)
            found.append(s)
        return found

    return run


def lstm_twin(steps: list[Carried], w: Tensor, u: Tensor, b: Tensor, d: Tensor) -> list[Carried]:
    h, c, found = nothing(steps), nothing(steps), []
    for x in steps:
        i, f, g, o = (x.affine(w, b) + h.affine(u, d)).parts(4)
        c = c.times(f.value.sigmoid()) + g.through(torch.tanh).times(i.value.sigmoid())
        h = c.through(torch.tanh).times(o.value.sigmoid())
        found.append(h)
    return found


def gru_twin(steps: list[Carried], w: Tensor, u: Tensor, b: Tensor, d: Tensor) -> list[Carried]:
    h, found = nothing(steps), []
    for first, x in zip([True] + [False] * len(steps), steps, strict=False):
        (xr, xz, xn), (hr, hz, hn) = x.affine(w, b).parts(3), h.affine(u, d).parts(3)
        r, z = (xr.value + hr.value).sigmoid(), (xz.value + hz.value).sigmoid()
        reset = (xr + hr).sigmoid().times(hn.value) if first else hn.times(r)  # at first hn is d: r alone comes from the input
        n = (xn + reset).through(torch.tanh)
        h = n.times(1 - z) + h.times(z)
        found.append(h)
    return found


TWINS: dict[str, tuple[Callable[..., list[Carried]], Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "tanh": (rnn_twin(torch.tanh), nn.RNN, {}),
    "relu": (rnn_twin(torch.relu), nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (lstm_twin, nn.LSTM, {}),
    "gru": (gru_twin, nn.GRU, {}),
}


class LastOutputs(nn.Module):
    """``o = V s``: a readout of the last state of each direction, as T 4.12 without its g."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(2 * H, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        return self.readout(torch.cat([output[:, -1, :H], output[:, 0, H:]], 1))


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru", pytest.param("relu", marks=pytest.mark.slow)])
def test_relevance_is_the_recursion_through_time(name: str) -> None:
    """Both directions, and every time step's share."""
    twin, kind, options = TWINS[name]
    layer = made(kind, batch_first=True, bidirectional=True, **options)
    model, x = LastOutputs(layer).eval(), randn(2, T, E)
    found = frpc.compile(model, (x,))(x, target=torch.tensor([[0, 1], [0, 1]])).relevance
    parameters = [p.detach() for p in layer.parameters()]
    for sample in range(2):
        steps = steps_of(x[sample])
        forward, backward = twin(steps, *parameters[:4])[-1], twin(steps[::-1], *parameters[4:])[-1]
        states = Carried(torch.cat([forward.value, backward.value]), torch.cat([forward.maps, backward.maps]))
        expected = states.affine(model.readout.weight.detach(), model.readout.bias.detach())
        with torch.no_grad():
            torch.testing.assert_close(expected.value, model(x[sample : sample + 1])[0], rtol=1e-12, atol=1e-12)
        assert (found[sample] - expected.maps).abs().sum() <= 1e-10 * expected.maps.abs().sum()


# Cells ------------------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A cell called step by step, by the user."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(T):
            state = self.cell(x[:, t], state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_explained_as_layers_are(cell: Callable[..., nn.RNNCellBase]) -> None:
    kind = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}[cell]
    layer, x = made(kind, batch_first=True), randn(B, T, E)
    single = cell(E, H).double()
    single.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    model = Cells(single)
    output = model(x).detach()
    seed = randn(*output.shape, seed=3)
    found = frpc.compile(model, (x,))(x, seed=seed).relevance
    of_layer = torch.cat([torch.zeros(B, T * H, dtype=torch.float64), seed], 1)
    expected = frpc.compile(Whole(layer), (x,))(x, seed=of_layer).relevance
    assert (found - expected).abs().sum() <= 1e-10 * expected.abs().sum()


# Padded sequences -------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([2, T, 1, T])


class Masked(Whole):
    """The layer over padded sequences, whose lengths are an input."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, lengths)

    def run(self, x: Tensor, state: Any, *lengths: Tensor) -> tuple[Tensor, Any]:
        return masked(self.layer, x, lengths[0], state)


class Packed(Masked):
    """The same with PyTorch's packed sequences."""

    def run(self, x: Tensor, state: Any, *lengths: Tensor) -> tuple[Tensor, Any]:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x, lengths[0], first, enforce_sorted=False)
        output, last = self.layer(packed, state)
        return pad_packed_sequence(output, first, total_length=T)[0], last


@pytest.mark.parametrize("name", LAYERS)
def test_masked_is_packed(name: str) -> None:
    kind, options, given = LAYERS[name]
    layer, x = made(kind, **options), randn(B, T, E)
    with torch.no_grad():
        expected = Packed(layer, given)(x, LENGTHS)
        torch.testing.assert_close(Masked(layer, given)(x, LENGTHS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, pytest.param(nn.RNN, marks=pytest.mark.slow)])
def test_padded_steps_have_no_relevance(kind: Callable[..., nn.RNNBase]) -> None:
    model, x = Masked(made(kind, batch_first=True, bidirectional=True)).eval(), randn(B, T, E)
    explainer = frpc.compile(model, (x, LENGTHS), bias="separate")
    for lengths in (LENGTHS, torch.tensor([2, 1, 3, 1])):
        with torch.no_grad():
            output = model(x, lengths)
        seed = randn(*output.shape, seed=2)
        relevance, bias = (explanation := explainer(x, lengths, seed=seed)).relevance, explanation.bias
        inside = torch.arange(T) < lengths[:, None]
        assert bool((relevance[~inside] == 0).all())
        assert bool((relevance[inside] != 0).any(1).all())
        error = (relevance.sum((1, 2)) + bias - (seed * output).sum(1)).abs()
        assert bool((error <= 1e-12 * relevance.abs().sum((1, 2))).all())


def test_masked_refuses() -> None:
    with pytest.raises(frpc.errors.InputError, match=r"three dimensions; got \[3, 5\]"):
        masked(made(nn.GRU), randn(T, E), LENGTHS)
    with pytest.raises(frpc.errors.TrainingModeError, match="not support dropout between layers"):
        masked(made(nn.GRU, num_layers=2, dropout=0.5).train(), randn(T, B, E), LENGTHS)


def test_steps_in_the_dimension_of_the_batch_are_refused() -> None:
    """A layer without batch_first takes the samples for steps."""
    with pytest.raises(frpc.errors.BatchError, match=r"runs over the samples|depends on the other samples"):
        frpc.compile(Confused(), (randn(B, T, E),))


class Confused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = made(nn.GRU)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


# Sentences --------------------------------------------------------------------------------------------------------------

SENTENCES = DATA / "sst2"


@pytest.mark.slow
@pytest.mark.skipif(not SENTENCES.exists(), reason="the sentences of ../shared/data/sst2 are not here")
@pytest.mark.parametrize("kind", ["lstm", "rnn"])
def test_words_of_sentences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relevance of every word of sentences of different lengths sums to the logits, and there is none behind their ends."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from sentiment_model import words_of
    from train_sentiment import Vocabulary, read_split, train_one

    (sentences, labels), dev, (tests, _) = (read_split(SENTENCES / f"{name}.tsv") for name in ("train", "dev", "test"))
    vocabulary = Vocabulary.learned(sentences)
    model = train_one(kind, vocabulary, (sentences[:640], labels[:640]), (dev[0][:100], dev[1][:100]), epochs=1).double().eval()
    short = [s for s in tests if len(words_of(s)) <= 14][:10]
    words = vocabulary.encode(["This movie is not bad and quite enjoyable.", *short])
    with torch.no_grad():
        logits = model(words)
    explainer = frpc.compile(model, (words,), bias="separate")
    for target in range(2):
        explanation = explainer(words, target=target)
        relevance = explanation.relevance
        assert relevance.shape == (*words.shape, model.embedding.embedding_dim)
        error = (relevance.sum((1, 2)) + explanation.bias - logits[:, target]).abs()
        assert bool((error <= 1e-12 * (relevance.abs().sum((1, 2)) + explanation.bias.abs())).all())
        assert bool((relevance[words == 0] == 0).all())
