"""Where samples lie: maps of models whose batch is fixed, folded into other dimensions or not first; and models that mix samples.

The right map of a piecewise linear model is ``x * dy/dx`` and an even share of what that leaves of y, from autograd.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from families import compiled
from frpc.capture.batch import Batch, Evidence, fitting, one_per_sample, spread_out
from frpc.errors import BatchError, FrpcError, ProgramFileError, SourceError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Function(nn.Module):
    """A function with tensors of its own; it takes ``batch`` samples only, if that is given."""

    def __init__(self, function: Callable[..., Tensor], batch: int | None = None, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.batch, self.names = function, batch, list(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.batch is not None and inputs[0].shape[0] != self.batch:
            raise ValueError("another batch")
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


def right_map(model: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Map and constants' share of a piecewise linear model."""
    given = x.clone().requires_grad_()
    y = model(given)[:, target]
    local = (x * torch.autograd.grad(y.sum(), given)[0]).detach()
    bias = y.detach() - local.flatten(1).sum(1)
    cells = x[0].numel()
    return local + (bias / cells).reshape(-1, *[1] * (x.dim() - 1)), bias


def check(model: nn.Module, x: Tensor, target: int = 1) -> None:
    expected, bias = right_map(model, x, target)
    found = compiled(model, x)(x, target=target)
    assert torch.allclose(found.relevance, expected)
    assert torch.allclose(found.bias, bias)
    apart = compiled(model, x, bias="separate")(x, target=target)
    assert torch.allclose(apart.bias, bias)
    assert torch.allclose(apart.relevance.flatten(1).sum(1) + bias, expected.flatten(1).sum(1))


# A fixed batch ----------------------------------------------------------------------------------------------------------


def features_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (torch.relu(x).t() + b[:, None]).t() @ w


@pytest.mark.parametrize(("batch", "features"), [(2, 4), (2, 2), (3, 6), (4, 4), (3, 9), (2, 8), (5, 5), (6, 3)])
def test_features_before_samples(batch: int, features: int) -> None:
    """Sizes do not tell which dimension holds the samples: the first that divides by them is that of the features."""
    model = Function(features_first, batch, w=randn(features, 3, seed=1), b=randn(features, seed=2))
    check(model, randn(batch, features))


def folded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # [B, 4, 3]
    rows = torch.relu(x.reshape(-1, 3) @ w[:3, :3] + b[:3])  # [B * 4, 3]
    return rows.reshape(x.shape[0], -1) @ w


def time_major(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    steps = x.transpose(0, 1).reshape(-1, 3)  # [4 * B, 3], samples inside
    steps = torch.relu(steps @ w[:3, :3] + b[:3]) - b[3:6]
    return steps.view(4, -1, 3).transpose(0, 1).flatten(1) @ w


def folded_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Samples between steps and channels: [4 * B * 3]."""
    flat = x.transpose(0, 1).reshape(-1)
    flat = torch.relu(flat + 0.3) + b[0]
    return flat.view(4, -1, 3).transpose(0, 1).flatten(1) @ w


def channels_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """[3, B * 4], then [3, 4, B]."""
    wide = x.permute(2, 0, 1).reshape(3, -1) + b[:3, None]
    deep = torch.relu(wide).view(3, -1, 4).transpose(1, 2) + b[:4, None]
    return deep.permute(2, 1, 0).flatten(1) @ w


def stacked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Two copies of the batch behind one another."""
    both = torch.relu(torch.cat([x, -x], 0).flatten(1) + b)  # [2 * B, 12]
    one, other = both[: x.shape[0]], both[x.shape[0] :]
    return one @ w + other @ w.flip(0)


def interleaved(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    both = torch.relu(x.repeat_interleave(2, 0).flatten(1) + b) - b.flip(0)
    return both.view(-1, 2, 12).sum(1) @ w


FOLDS = [folded, time_major, folded_twice, channels_first, stacked, interleaved]


@pytest.mark.parametrize(
    ("batch", "fixed"),
    [
        pytest.param(
            batch, fixed, id=f"{batch}-{'fixed' if fixed else 'free'}", marks=() if fixed or batch == 3 else pytest.mark.slow
        )
        for batch in (2, 3, 4)
        for fixed in (True, False)
    ],
)
@pytest.mark.parametrize("function", FOLDS)
def test_samples_inside_other_dimensions(function: Callable[..., Tensor], batch: int, fixed: bool) -> None:
    model = Function(function, batch if fixed else None, w=randn(12, 3, seed=1), b=randn(12, seed=2))
    check(model, randn(batch, 4, 3))
    if not fixed:
        explainer = compiled(model, randn(batch, 4, 3))
        x = randn(5, 4, 3, seed=7)
        assert torch.allclose(explainer(x, target=2).relevance, right_map(model, x, 2)[0])


def test_one_sample_in_everything() -> None:
    model = Function(lambda x, w, b: (x.t() + b[:, None]).relu().t() @ w, 1, w=randn(4, 3, seed=1), b=randn(4, seed=2))
    check(model, randn(1, 4))


def test_samples_in_another_order_are_refused_where_constants_meet_them() -> None:
    """Which constant is whose cannot be told there, and it is said; without constants nothing has to be told."""
    plain = Function(lambda x, w: (x.flip(0) * 2).relu().flip(0) @ w, w=randn(4, 3, seed=1))
    check(plain, randn(3, 4))
    shifted = Function(lambda x, w, b: (x.flip(0) + b).relu().flip(0) @ w, w=randn(4, 3, seed=1), b=randn(4, seed=2))
    with pytest.raises(FrpcError, match="cannot be told which of its elements belong to which sample"):
        frpc.compile(shifted, (randn(3, 4),))


def random_program(chance: random.Random, batch: int, fixed: bool) -> nn.Module:
    """Views that move the samples about, biases along any dimension, ReLUs, products with a constant, and all of it undone."""
    steps: list[tuple[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    sizes: list[Any] = ["B", chance.choice([2, 3, 4, 6]), chance.choice([2, 3])]
    undo: list[list[Any]] = []
    for k in range(chance.randint(3, 7)):
        kind = chance.choice(["permute", "merge", "bias", "relu", "scale"])
        if kind == "permute":
            order = list(range(len(sizes)))
            chance.shuffle(order)
            steps.append(("permute", order))
            sizes = [sizes[i] for i in order]
        elif kind == "merge" and len(sizes) > 1:
            at = chance.randrange(len(sizes) - 1)
            undo.append([at, sizes[at], sizes[at + 1]])
            merged = (sizes[at], sizes[at + 1])
            steps.append(("merge", at))
            sizes[at : at + 2] = [merged]
        elif kind in ("bias", "scale"):
            plain = [i for i, n in enumerate(sizes) if isinstance(n, int)]
            if plain:
                at = chance.choice(plain)
                tensors[f"t{k}"] = randn(sizes[at], *[1] * (len(sizes) - 1 - at), seed=chance.randrange(1000))
                steps.append((kind, f"t{k}"))
        else:
            steps.append(("relu", None))

    def number(size: Any, count: int) -> int:
        return count if size == "B" else size if isinstance(size, int) else number(size[0], count) * number(size[1], count)

    def run(x: Tensor, *held: Tensor) -> Tensor:
        count, own = x.shape[0], dict(zip(tensors, held, strict=False))
        sizes: list[Any] = ["B", *x.shape[1:]]
        for kind, what in steps:
            if kind == "permute":
                x, sizes = x.permute(what), [sizes[i] for i in what]
            elif kind == "merge":
                sizes = [*sizes[:what], (sizes[what], sizes[what + 1]), *sizes[what + 2 :]]
                x = x.flatten(what, what + 1)
            elif kind == "bias":
                x = x + own[what]
            elif kind == "scale":
                x = x * own[what]
            else:
                x = x.relu()
        while any(isinstance(n, tuple) for n in sizes):
            at = next(i for i, n in enumerate(sizes) if isinstance(n, tuple))
            pair = sizes[at]
            x = x.unflatten(at, (number(pair[0], count), number(pair[1], count)))
            sizes = [*sizes[:at], *pair, *sizes[at + 1 :]]
        x = x.movedim(sizes.index("B"), 0).flatten(1)
        return x @ held[-1]

    width = sizes_of = 1
    for n in (s for s in _leaves(sizes) if s != "B"):
        width *= n
    del sizes_of
    model = Function(run, batch if fixed else None, **tensors, last=randn(width, 3, seed=chance.randrange(1000)))
    model.shape = [batch, *_first_sizes(steps, tensors, sizes)]
    return model


def _leaves(sizes: list[Any]) -> list[Any]:
    found: list[Any] = []
    for n in sizes:
        found += _leaves(list(n)) if isinstance(n, tuple) else [n]
    return found


def _first_sizes(steps: list[tuple[str, Any]], tensors: dict[str, Tensor], sizes: list[Any]) -> list[int]:
    """Undoes the steps to find the sizes of the input beside its batch."""
    for kind, what in reversed(steps):
        if kind == "permute":
            before: list[Any] = [None] * len(sizes)
            for to, came in enumerate(what):
                before[came] = sizes[to]
            sizes = before
        elif kind == "merge":
            sizes = [*sizes[:what], *sizes[what], *sizes[what + 1 :]]
    return sizes[1:]


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_of_a_fixed_batch(seed: int) -> None:
    """Right, or refused: never a map that sums to something else."""
    chance = random.Random(seed)
    batch = chance.choice([2, 3, 4])
    model = random_program(chance, batch, fixed=seed % 3 != 0)
    check(model, randn(*model.shape, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_more_random_programs_of_a_fixed_batch(seed: int) -> None:
    test_random_programs_of_a_fixed_batch(seed)


# Sources whose batch is folded ------------------------------------------------------------------------------------------


class Choices(nn.Module):
    """Several texts a sample, folded into the batch before they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.out = nn.Embedding(60, 8), nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:  # [B, choices, L]
        flat = ids.view(-1, ids.shape[-1])
        return self.out(self.word(flat).relu().mean(1)).view(-1, ids.shape[1])


class TimeMajor(Choices):
    def forward(self, ids: Tensor) -> Tensor:  # [B, choices, L] -> [L * choices * B]
        steps = self.word(ids.permute(2, 1, 0).reshape(-1)).relu()
        return self.out(steps.view(ids.shape[2], ids.shape[1], -1, 8).mean(0).transpose(0, 1)).squeeze(-1)


def right_source(model: Choices, ids: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Local shares of what the embedding gives, constants' share and output, from autograd."""
    held: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    handle = model.word.register_forward_hook(keep)
    y = model(ids)[:, target]
    handle.remove()
    local = held[0].detach() * torch.autograd.grad(y.sum(), held[0])[0]
    return local, y.detach() - _by_sample(model, local, ids).sum(1), y.detach()


folding = functools.cache(lambda kind: kind().double())
"""A net of each kind, with one capture for all questions."""


def _by_sample(model: Choices, relevance: Tensor, ids: Tensor) -> Tensor:
    if isinstance(model, TimeMajor):
        return relevance.view(ids.shape[2], ids.shape[1], len(ids), 8).movedim(2, 0).flatten(1)
    return relevance.reshape(len(ids), -1)


@pytest.mark.parametrize("bias", ["uniform", "separate", "receptive_field"])
@pytest.mark.parametrize("source", [None, "word"])
@pytest.mark.parametrize("kind", [Choices, TimeMajor])
def test_an_embedding_of_a_folded_batch(kind: type[Choices], source: str | None, bias: str) -> None:
    model, ids = folding(kind), torch.randint(0, 60, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    local, share, y = right_source(model, ids, 1)
    explainer = compiled(model, ids, source=source, bias=bias)
    found = explainer(ids, target=1)
    assert found.relevance.shape == local.shape  # like what the module gives
    assert torch.allclose(found.bias, share)
    sums = _by_sample(model, found.relevance, ids).sum(1)
    assert torch.allclose(sums + (found.bias if bias == "separate" else 0), y)
    cells = torch.ones_like(local)
    evenly = spread_out(share / (3 * 7 * 8), local.dim(), explainer.programs.first().places[0]) * cells
    assert torch.allclose(found.relevance, local if bias == "separate" else local + evenly)
    several = explainer(ids, target=torch.tensor([[0, 1], [2, 1]]))
    assert torch.allclose(several.bias[:, 1], share)
    assert torch.allclose(several.relevance[:, 1], found.relevance)
    for k in (0, 1):
        assert torch.allclose(several.map(k, 1), found.map(k))
        assert torch.allclose(found.map(k).sum() + (found.bias[k] if bias == "separate" else 0), y[k])
    more = torch.randint(0, 60, (4, 3, 7), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(explainer(more, target=0).bias, right_source(model, more, 0)[1])


def test_neurons_behind_a_folded_batch() -> None:
    class Later(Choices):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(super().forward(ids)).relu()

    model, ids = Later().double(), torch.randint(0, 60, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    found = frpc.compile(model, (ids,), verify="always").neuron("last", (1,), ids)
    value = model.last(Choices.forward(model, ids))[:, 1].detach()
    assert torch.allclose(found.output, value)
    assert torch.allclose(found.relevance.reshape(2, -1).sum(1), value)
    assert torch.allclose(torch.stack([found.map(0).sum(), found.map(1).sum()]), value)
    assert found.conservation is not None
    assert found.conservation.shape == (2,)


def test_a_folded_batch_is_not_saved(tmp_path: Path) -> None:
    """A file has no words for where its samples are."""
    ids = torch.randint(0, 60, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    for kind in (Choices, TimeMajor):
        with pytest.raises(ProgramFileError, match="does not have one entry for each sample, samples first"):
            frpc.compile(kind(), (ids,)).save(tmp_path / "folded.frpc")


def test_inner_layers_of_a_folded_batch() -> None:
    model, ids = Choices().double(), torch.randint(0, 60, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    explainer = frpc.compile(model, (ids,))
    assert torch.allclose(explainer.at("word", ids, target=1)["word"], right_source(model, ids, 1)[0])
    for ask in (explainer.neuron, explainer.layer):
        with pytest.raises(BatchError, match=r"word gives f64\[3\*B, 7, 8\], whose first dimension is not the samples"):
            ask(*(("word", (0, 0), ids) if ask == explainer.neuron else ("word", ids)))


def test_mapped_over_slices_of_a_folded_batch() -> None:
    """Under vmap the mapped dimension joins the batch, wherever that is."""
    for kind in (Choices, TimeMajor):
        model = kind().double()
        ids = torch.randint(0, 60, (3, 2, 3, 7), generator=torch.Generator().manual_seed(0))
        explainer = frpc.compile(model, (ids[0],))
        mapped = torch.func.vmap(lambda x, e=explainer: e(x, target=1).relevance)(ids)
        assert torch.allclose(mapped, torch.stack([explainer(x, target=1).relevance for x in ids]))


def test_a_source_whose_samples_cannot_be_told_is_refused() -> None:
    class Backwards(Choices):
        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.word(ids[:, 0].flip(0)).mean(1)).flip(0)

    ids = torch.randint(0, 60, (3, 3, 7), generator=torch.Generator().manual_seed(0))
    with pytest.raises(SourceError, match="cannot be split by sample"):
        frpc.compile(Backwards(), (ids,))


def test_one_loss_for_each_sample() -> None:
    """An operator of several results, the first of which holds one number for each sample."""
    model = Function(lambda x, y: nn.functional.cross_entropy(x, y, reduction="none"))
    x, y = randn(4, 3), torch.tensor([0, 1, 2, 1])
    found = frpc.compile(model, (x, y))(x, y)
    assert torch.allclose(found.output, model(x, y))
    assert torch.allclose(found.relevance.sum(1), found.output)


# The pieces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [Batch(0, 1), Batch(0, 6), Batch(1, 6, 2), Batch(2, 6, 6), Batch(1, 6, 3)])
def test_sums_and_spreading_are_transposes(batch: Batch) -> None:
    """``<sum(v), s> == <v, spread(s)>``, for two columns."""
    shape = [4, 3, 2]
    shape[batch.axis] = 5 * batch.factor
    v, s = randn(2, *shape, seed=1), randn(2, 5, seed=2)
    sums = one_per_sample(v, 3, batch)
    assert torch.allclose((sums * s).sum(), (v * spread_out(s, 3, batch)).sum())
    parts = v.movedim(1 + batch.axis, 1).reshape(2, batch.outer, 5, batch.inner, -1)
    assert torch.allclose(sums, parts.sum((1, 3, 4)))


def test_evidence_decides_between_dimensions() -> None:
    members = torch.eye(2, dtype=torch.bool)
    rows = torch.tensor([[True, False], [False, True]])
    both = torch.tensor([[True, True], [True, True]])
    assert fitting(Evidence({0: both, 1: rows}, members, True), Batch(0, 1)) == Batch(1, 1)
    assert fitting(Evidence({0: both, 1: both}, members, True), Batch(0, 1)) is None
    assert fitting(Evidence({0: rows.flip(0)}, members, True), Batch(0, 1)) is None  # in another order
    inside = torch.tensor([[True, False, True, False], [False, True, False, True]])
    assert fitting(Evidence({0: inside}, members, True), Batch(0, 2)) == Batch(0, 2, 2)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert fitting(Evidence({0: nothing}, members, False), Batch(0, 2)) == Batch(0, 2)  # nothing speaks against sizes
    sparse = torch.tensor([[True, False, False, False], [False, False, False, False]])
    assert fitting(Evidence({0: sparse}, members, True), None) is None  # [2, B] and [B, 2] both fit
