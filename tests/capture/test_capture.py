"""Capture: what users' modules do in forward, and what comes out: the model's own numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from captured_nets import Cache, Computes, agrees, randn, settled
from frpc.capture.export import capture
from frpc.errors import (
    CaptureError,
    TrainingModeError,
    UnsupportedOpError,
    WeightsError,
)

# Values that are known --------------------------------------------------------------------------------------------------


def write_masked(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, m.keep] = 0.5
    return h


def write_many(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, m.keep] = h[:, m.keep] * 2
    return h


def built_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(h.shape[1], dtype=torch.bool)
    mask[1:3] = True
    return h[:, mask]


def viewed_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool)
    mask.view(2, 2)[0] = True  # through memory that is shared
    return h[:, mask]


def branching(m: Any, h: Tensor) -> Tensor:
    return h.relu() if m.flag else h


def counting(m: Any, h: Tensor) -> Tensor:
    return h * int(m.keep.sum())


def looping(m: Any, h: Tensor) -> Tensor:
    return torch.stack([h[:, place] for place in m.places], 1)


def triangle(m: Any, h: Tensor) -> Tensor:
    pairs = h[:, :, None] * h[:, None, :]
    return pairs[:, torch.ones(4, 4).tril().bool()]


KNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mask": lambda m, h: h[:, m.keep],
    "attribute": lambda m, h: h[:, m.mask],
    "opposite": lambda m, h: h[..., ~m.keep],
    "bytes": lambda m, h: h[:, m.keep.long() > 0],
    "two masks": lambda m, h: h[:, m.keep & ~m.mask],
    "comparison of weights": lambda m, h: h[:, m.first.bias > 0.0],
    "where": lambda m, h: h[:, torch.where(m.keep)[0]],
    "nonzero": lambda m, h: h[:, m.keep.nonzero().flatten()],
    "nonzero as tuple": lambda m, h: h[:, m.keep.nonzero(as_tuple=True)[0]],
    "masked_select": lambda m, h: h[:, torch.masked_select(torch.arange(4), m.keep)],
    "unique": lambda m, h: h[:, m.counts.unique()],
    "unique sorted": lambda m, h: h[:, torch.unique(m.counts, return_counts=True)[1]],
    "repeat_interleave": lambda m, h: h.repeat_interleave(m.counts, dim=1),
    "bincount": lambda m, h: h[:, torch.bincount(m.counts)],
    "one_hot": lambda m, h: h @ F.one_hot(m.counts).to(h.dtype),
    "item": lambda m, h: h[:, : m.places[1].item() + 1],
    "index": lambda m, h: h[:, m.places[0]][:, None],
    "slice": lambda m, h: h[:, : m.places[0]],
    "tolist": lambda m, h: h[:, m.places.tolist()],
    "numpy": lambda m, h: h * float(m.counts.numpy().sum()),
    "like": lambda m, h: h[:, torch.ones_like(m.first.bias, dtype=torch.bool)],
    "write number": write_masked,
    "write tensor": write_many,
    "built": built_mask,
    "built through a view": viewed_mask,
    "branch": branching,
    "count": counting,
    "loop": looping,
    "triangle": triangle,
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_model_holds_is_known(name: str) -> None:
    """Indices and branches that follow from parameters, buffers and literals are the model's, at any batch size."""
    model, x = Computes(KNOWN[name]).double(), randn(3, 4)
    settled(model.first)
    model(x)
    settled(model.last)
    explainer = frpc.compile(model, (x,), method="gradient-input")
    given = x.clone().requires_grad_()
    wanted = torch.autograd.grad(model(given).flatten(1)[:, 1].sum(), given)[0] * x
    shape = model(x).shape[1:]
    found = explainer(x, target=1 if len(shape) == 1 else (0, 1))
    assert agrees(found.output, model(x))
    assert agrees(found.relevance, wanted)
    fresh = randn(5, 4, seed=3)
    assert agrees(explainer.predict(fresh), model(fresh))
    assert explainer.conservation is None or explainer.conservation < 1e-10


def written_by_the_input(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=torch.bool)
    mask.copy_(h[0] > 0)
    return h * h[:, mask].sum(1, keepdim=True)


def random_mask(m: Any, h: Tensor) -> Tensor:
    mask = torch.ones(4, dtype=torch.bool)
    mask.bernoulli_(0.5)
    return h * h[:, mask].sum(1, keepdim=True)


def shared_memory(m: Any, h: Tensor) -> Tensor:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    row = mask[0]
    row.copy_(h[0, :2] > 0)
    return h * h[:, mask.view(-1)].sum(1, keepdim=True)


def input_itself(m: Any, h: Tensor) -> Tensor:
    return h * h[:, h[0] > 0].sum(1, keepdim=True)


@pytest.mark.parametrize("function", [written_by_the_input, random_mask, shared_memory, input_itself])
def test_what_depends_on_the_input_is_not_known(function: Callable[[Any, Tensor], Tensor]) -> None:
    """A mask that inputs or chance have written is refused, at the user's line."""
    model = Computes(function)
    model.last = nn.Linear(4, 3)
    with pytest.raises((CaptureError, TrainingModeError, UnsupportedOpError), match=r"captured_nets\.py:\d+"):
        frpc.compile(settled(model), (randn(2, 4),))


def test_a_renewed_model_has_the_masks_that_shaped_the_graph() -> None:
    model = nn.Sequential(Computes(KNOWN["mask"]))
    model[0].last = nn.Linear(3, 2)
    settled(model)
    explainer, x = frpc.compile(model, (randn(2, 4),)), randn(2, 4, seed=2)
    model[0].first.weight.data.mul_(2)
    assert agrees(explainer.refresh(model).predict(x), model(x))
    model[0].keep[1] = True
    model[0].keep[0] = False
    with pytest.raises(WeightsError, match=r"0\.keep of Sequential has changed since the model was captured"):
        explainer.refresh(model)


def test_the_model_is_left_as_it_is() -> None:
    model = Computes(KNOWN["built"])
    model.last = nn.Linear(2, 2)
    model = settled(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frpc.compile(model, (randn(2, 4),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


# Autocast ---------------------------------------------------------------------------------------------------------------


class Applies(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.function(self.layers, x).float()


def chain(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def partly(layers: Any, x: Tensor) -> Tensor:
    h = layers[0](x)
    with torch.autocast("cpu", enabled=False):
        h = layers[1](h.float())
    return layers[2](h)


def without_gradient(layers: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = layers[0](x)
    return layers[1](h + x)


AUTOCAST: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[nn.Module, ...], tuple[int, ...]]] = {
    "layer norm": (chain, (nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (3, 4)),
    "rms norm": (chain, (nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), (3, 4)),
    "batch norm": (chain, (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (3, 4)),
    "group norm": (chain, (nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)), (3, 3, 5, 5)),
    "instance norm": (
        chain,
        (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(36, 2)),
        (3, 3, 5, 5),
    ),
    "residual": (lambda m, x: m[2](m[1](x + m[0](x))), (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (3, 4)),
    "concatenation": (lambda m, x: torch.cat([m[0](x), x], -1), (nn.Linear(4, 4),), (3, 4)),
    "disabled inside": (partly, (nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (3, 4)),
    "no_grad inside": (without_gradient, (nn.Linear(4, 4), nn.Linear(4, 2)), (3, 4)),
    "attention": (lambda m, x: m[0](x, x, x)[0], (nn.MultiheadAttention(8, 2, batch_first=True),), (3, 5, 8)),
    "einsum": (lambda m, x: torch.einsum("btd,bsd->bts", m[0](x), x), (nn.Linear(8, 8),), (3, 5, 8)),
    "recurrent cell": (lambda m, x: m[0](x), (nn.GRUCell(4, 3),), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_in_forward(name: str) -> None:
    """The captured graph gives the model's own numbers, casts included; programs add sums in another order of bfloat16."""
    function, layers, shape = AUTOCAST[name]
    torch.manual_seed(0)
    model, x = Applies(function, *layers).eval(), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(capture(frpc.compile(model).programs.model, (x,)).graph_module(x), wanted)
    explainer = frpc.compile(model, (x,))
    found = explainer(x, seed=torch.ones_like(wanted))
    size = wanted.abs().max()
    assert float((found.output - wanted).abs().max() / size) < 2e-2  # two roundings to bfloat16 at its largest number
    total = found.relevance.flatten(1).sum(1)
    assert float((total - wanted.flatten(1).sum(1)).abs().max() / found.relevance.abs().flatten(1).sum(1).min()) < 3e-2


def test_code_under_autocast_keeps_its_names_and_lines() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.special.bessel_j0(self.layer(x).float())

    with pytest.raises(UnsupportedOpError) as error:
        frpc.compile(nn.Sequential(Shifted()), (torch.randn(2, 4),))
    line = inspect.getsourcelines(Shifted)[1] + 7
    assert f"0   test_capture.py:{line}   return torch.special.bessel_j0(self.layer(x).float())" in str(error.value)


# Modules that hold tensors of a graph -----------------------------------------------------------------------------------


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.attribute = self.layer.weight * 2
        self.inside = [{"deep": (self.layer.weight.sum(0),)}]
        self.object = Cache(self.layer.bias * 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.attribute + self.inside[0]["deep"][0] + self.object.value


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        Holds,
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.ReLU()),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()),
    ],
    ids=["attributes", "weight_norm", "spectral_norm", "parametrized", "orthogonal"],
)
def test_tensors_that_hang_on_a_graph_are_copied_without_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), randn(2, 4)
    model(x)  # old norms leave a weight with a graph behind
    held = model.attribute if isinstance(model, Holds) else None
    explainer = frpc.compile(model, (x,), bias="separate")
    given = x.clone().requires_grad_()
    wanted = model(given)
    found = explainer(x, target=1)
    assert agrees(found.output, wanted)
    if isinstance(model, Holds):
        assert model.attribute is held and held.grad_fn is not None
        assert agrees(found.relevance, x * model.attribute[:, 1].detach())
    assert all(p.requires_grad for p in model.parameters())
