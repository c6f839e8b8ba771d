"""Receptive fields: what a neuron reads lies in its field, and constants that are put there land on nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx, nn

import frpc
from calls import Made, made
from families import compiled
from frpc.assign.receptive import Field, receptive_fields
from frpc.core.graph import fetch, first_result
from frpc.core.traits import Axes, Operand
from frpc.emit.propagate import evaluate
from frpc.rules.locality import cells
from frpc.rules.table import traits_of
from strategies import Case, cases

aten = torch.ops.aten
QUICK = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)

# One operator -----------------------------------------------------------------------------------------------------------


def points(shape: torch.Size) -> Axes:
    return tuple((torch.arange(n), torch.arange(1, n + 1)) for n in shape[2:])


def reached(call: Made, names: tuple[Operand, ...], axis: int) -> Tensor:
    """``[positions, cells]``: does anything at a position of the result change when a cell of the operands does?"""
    before, size = call(), call.operands[names[0]].shape[2 + axis]
    columns = []
    for cell in range(size):
        changed = torch.zeros(before.shape, dtype=torch.bool)
        for step in (0.37, 50.0, -50.0):
            moved = {n: call.operands[n].clone() for n in names}
            for value in moved.values():
                value.select(2 + axis, cell).add_(step)
            changed |= call(moved).nan_to_num(7.0) != before.nan_to_num(7.0)
        columns.append(changed.movedim(2 + axis, 0).flatten(1).any(1))
    return torch.stack(columns, 1)


def local_calls() -> list[tuple[Made, tuple[Operand, ...], Axes]]:
    """Calls whose result has a field of its own when some operands are the input, with that field."""
    found = []
    for call in made():
        traits = traits_of(call.op)
        locality = cells if traits.pointwise else traits.locality
        rank = call().dim()
        names = [n for n, x in call.operands.items() if n not in traits.ignores and x.dim() == rank >= 3]
        groups = {(n,) for n in names} | {tuple(names)}
        for group in groups if locality is not None else ():
            shapes = {call.operands[n].shape[2:] for n in group}
            if len(shapes) != 1:
                continue
            axes = locality(call.args, {n: points(call.operands[n].shape) for n in group}, call().shape)
            if axes is not None:
                found.append((call, group, axes))
    return found


EXACT = {
    aten.convolution.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.slice.Tensor,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.cat.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.upsample_nearest2d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten._softmax.default,
    aten.mean.dim,
    aten.linear.default,
    aten.relu.default,
    aten.add.Tensor,
}


def test_what_an_operator_reads_lies_in_its_field() -> None:
    """And of most operators the field is no wider than what they read."""
    met = set()
    for call, names, axes in local_calls():
        met.add(call.op)
        for axis, (low, high) in enumerate(axes):
            read = reached(call, names, axis)
            cell = torch.arange(read.shape[1])
            inside = (cell >= low[:, None]) & (cell < high[:, None])
            assert not bool((read & ~inside).any()), f"{call} reads cells outside its field, along axis {axis}"
            if call.op in EXACT:
                some = read.any(1)  # a window of padding alone reads nothing
                first = read.long().argmax(1)
                last = read.shape[1] - read.flip(1).long().argmax(1)
                assert torch.equal(low[some], first[some]) and torch.equal(high[some], last[some]), f"{call}: axis {axis}"
    assert met >= EXACT and len(met) > 100


# Nets -------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution in front of a function, and one behind it where the result is a picture still."""

    def __init__(self, function: Callable[..., Tensor], behind: bool = True, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function, self.behind = function, behind
        self.front, self.back = nn.Conv2d(2, 4, 3, padding=1), nn.LazyConv2d(2, 2) if behind else nn.Identity()
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, self.front(x))
        return self.back(y) if self.behind else y


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Net(lambda m, y: F.relu(y)),
    "cumsum": lambda: Net(lambda m, y: y.cumsum(2)),
    "cumsum over channels": lambda: Net(lambda m, y: y.cumsum(1)),
    "softmax over a row": lambda: Net(lambda m, y: y.softmax(-1)),
    "softmax over channels": lambda: Net(lambda m, y: y.softmax(1)),
    "group norm": lambda: Net(lambda m, y: m.norm(y), norm=nn.GroupNorm(2, 4)),
    "instance norm": lambda: Net(lambda m, y: m.norm(y), norm=nn.InstanceNorm2d(4, affine=True)),
    "layer norm": lambda: Net(lambda m, y: m.norm(y), norm=nn.LayerNorm(7)),
    "batch norm": lambda: Net(lambda m, y: m.norm(y), norm=nn.BatchNorm2d(4)),
    "matmul from the right": lambda: Net(lambda m, y: y @ m.w, w=randn(7, 7)),
    "matmul from the left": lambda: Net(lambda m, y: m.w @ y, w=randn(7, 7)),
    "linear": lambda: Net(lambda m, y: m.dense(y), dense=nn.Linear(7, 7)),
    "sort": lambda: Net(lambda m, y: y.sort(-1)[0]),
    "index_select": lambda: Net(lambda m, y: y.index_select(2, m.i), i=torch.tensor([6, 0, 0, 2, 3, 1, 5])),
    "indexing": lambda: Net(lambda m, y: y[:, :, m.i], i=torch.tensor([6, 0, 0, 2, 3, 1, 5])),
    "flip": lambda: Net(lambda m, y: y.flip(2)),
    "roll": lambda: Net(lambda m, y: y.roll((2, -1), (2, 3))),
    "transposed": lambda: Net(lambda m, y: y.transpose(2, 3)),
    "turned": lambda: Net(lambda m, y: y.rot90(1, (2, 3))),
    "channels and rows swapped": lambda: Net(lambda m, y: F.pad(y, (0, 0, 0, 0, 0, 3)).transpose(1, 2)[:, :4]),
    "reshaped": lambda: Net(lambda m, y: y.reshape(y.shape[0], 7, 4, 7)[:, :4]),
    "groups of channels": lambda: Net(lambda m, y: y.unflatten(1, (2, 2)).sum(1)),
    "reflected": lambda: Net(lambda m, y: F.pad(y, (2, 1, 1, 0), mode="reflect")),
    "circular": lambda: Net(lambda m, y: F.pad(y, (2, 1, 1, 0), mode="circular")),
    "a frame of ones": lambda: Net(lambda m, y: F.pad(y, (1, 1, 1, 1), value=1.0)),
    "bilinear": lambda: Net(lambda m, y: F.interpolate(y, scale_factor=1.7, mode="bilinear")),
    "bilinear, smaller": lambda: Net(lambda m, y: F.interpolate(y, size=(3, 4), mode="bilinear", align_corners=True)),
    "bicubic": lambda: Net(lambda m, y: F.interpolate(y, size=(9, 5), mode="bicubic")),
    "nearest": lambda: Net(lambda m, y: F.interpolate(y, scale_factor=0.6)),
    "antialiased": lambda: Net(lambda m, y: F.interpolate(y, size=(4, 3), mode="bilinear", antialias=True)),
    "pixel shuffle": lambda: Net(lambda m, y: F.pixel_shuffle(y, 2)),
    "transposed convolution": lambda: Net(lambda m, y: m.up(y), up=nn.ConvTranspose2d(4, 3, 3, 2, 1)),
    "dilated, strided": lambda: Net(lambda m, y: m.conv(y), conv=nn.Conv2d(4, 3, 2, 2, 3, dilation=3)),
    "pools": lambda: Net(lambda m, y: F.max_pool2d(y, 3, 2, 1) + F.avg_pool2d(y, 3, 2, 1)),
    "adaptive pool": lambda: Net(lambda m, y: F.adaptive_avg_pool2d(y, (3, 2))),
    "squeeze and excite": lambda: Net(lambda m, y: y * torch.sigmoid(m.conv(y.mean((2, 3), True))), conv=nn.Conv2d(4, 4, 1)),
    "a gate beside": lambda: Net(lambda m, y: y[:, :2] * torch.sigmoid(y[:, 2:].roll(1, 2))),
    "a mask from the input": lambda: Net(lambda m, y: torch.where(y.roll(1, 3) > 0, y, 0.1)),
    "rows of another place": lambda: Net(lambda m, y: y + y[:, :, :1]),
    "a branch pooled": lambda: Net(lambda m, y: y + F.adaptive_avg_pool2d(y, 1)),
    "two branches": lambda: Net(lambda m, y: torch.cat([F.relu(y), m.wide(y)], 1), wide=nn.Conv2d(4, 2, 5, padding=2)),
    "halves side by side": lambda: Net(lambda m, y: torch.cat([y[..., :3], y[..., 4:].flip(3)], 3)),
    "with a constant row": lambda: Net(
        lambda m, y: torch.cat([m.row.expand(y.shape[0], -1, -1, -1), y], 2), row=randn(1, 4, 1, 7)
    ),
    "written in part": lambda: Net(lambda m, y: torch.slice_scatter(y, 2 * y[:, :, 3:], 2, 0, 4)),
    "lower triangle": lambda: Net(lambda m, y: y.tril()),
    "attention over rows": lambda: Net(lambda m, y: (y @ y.transpose(-1, -2)).softmax(-1) @ y),
    "flattened": lambda: Net(lambda m, y: m.dense(y.flatten(1)), behind=False, dense=nn.Linear(196, 3)),
    "pooled": lambda: Net(lambda m, y: m.dense(y.mean((2, 3))), behind=False, dense=nn.Linear(4, 3)),
    "grid": lambda: Net(
        lambda m, y: F.grid_sample(y, m.g.expand(y.shape[0], -1, -1, -1), align_corners=False), g=randn(1, 5, 4, 2) / 2
    ),
}

UNKNOWN = {  # an operator in them says nothing of its field, or moves axes: what it makes is taken to see everything
    *("index_select", "indexing", "transposed", "turned", "channels and rows swapped", "reshaped", "groups of channels"),
    *("antialiased", "grid"),
}


@functools.cache
def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = NETS[name]().double(), randn(2, 2, 7, 7)
    net(x)  # lazy modules
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return net.eval(), x


def reads(explainer: frpc.Explainer, x: Tensor) -> dict[fx.Node, Tensor]:
    """``[*cells, *positions]`` of every node with as many axes: does it change at a position when a cell of the input does?"""
    module, shape, steps = explainer.compiled(x).assignment.graph_module, x.shape[2:], (3.0, -3.0, 30.0, -30.0)
    constants = {str(n.target): fetch(module, str(n.target)) for n in module.graph.find_nodes(op="get_attr")}
    bumps = torch.eye(shape.numel(), dtype=x.dtype).reshape(-1, 1, 1, *shape) * torch.tensor(steps).reshape(
        -1, 1, *[1] * len(shape)
    )
    moved = torch.cat([x[:1], (x[:1] + bumps.flatten(0, 1))])
    with torch.no_grad():
        values = {n: first_result(v) for n, v in evaluate(module.graph, constants, (moved,)).items()}
    found = {}
    for node, value in values.items():
        if isinstance(value, Tensor) and value.dim() == x.dim() and len(value) == len(moved):
            differs = (value[1:] != value[:1]).any(1)  # [cells * steps, *positions]
            found[node] = differs.unflatten(0, (*shape, len(steps))).any(len(shape))
    return found


def hull(read: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first cell and the one behind the last that each position along an axis reads; and which read any."""
    rank = read.dim() // 2
    rest = [d for d in range(2 * rank) if d not in (axis, rank + axis)]
    along = read.permute(axis, rank + axis, *rest).flatten(2).any(2) if rest else read  # [cells, positions]
    return along.long().argmax(0), len(along) - along.flip(0).long().argmax(0), along.any(0)


def check_fields(explainer: frpc.Explainer, x: Tensor, exactly: bool) -> int:
    """Nothing lies outside a field, and of fields that are exact nothing inside is never read; returns how many are local."""
    fields, local = receptive_fields(explainer.compiled(x).assignment), 0
    for node, read in reads(explainer, x).items():
        axes = fields[node].axes if node in fields else None
        local += axes is not None
        for axis, (low, high) in enumerate(axes or ()):
            first, behind, some = hull(read, axis)
            assert bool((low <= first)[some].all() and (behind <= high)[some].all()), f"{node} reads cells outside its field"
            if exactly:
                assert torch.equal(low[some], first[some]) and torch.equal(high[some], behind[some]), f"{node}: too wide a field"
    return local


OFTEN = (
    *("plain", "cumsum", "softmax over a row", "group norm", "layer norm", "matmul from the right", "matmul from the left"),
    *("linear", "sort", "index_select", "flip", "transposed", "bicubic", "pools", "squeeze and excite", "two branches"),
    *("a mask from the input", "with a constant row"),
)


def nets(often: Collection[str], *names: str) -> list[Any]:
    """Some nets always, the others in the slow run."""
    return [pytest.param(n, marks=() if n in often else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", nets(OFTEN, *NETS))
def test_fields_hold_what_is_read_and_no_more(name: str) -> None:
    """Every node of a net, every cell of its input."""
    net, x = built(name)
    assert check_fields(compiled(net, x, bias="receptive_field"), x, exactly=name not in UNKNOWN)


@settings(QUICK, max_examples=12)
@given(cases())
def test_fields_of_random_nets_hold_what_is_read(case: Case) -> None:
    module, x = case
    if x.dim() > 2:
        check_fields(frpc.compile(module, (x,)), x, exactly=False)


@pytest.mark.slow
@settings(QUICK, max_examples=300, derandomize=False, print_blob=True, phases=list(Phase))
@given(cases(steps=9))
def test_fields_of_many_random_nets_hold_what_is_read(case: Case) -> None:
    module, x = case
    if x.dim() > 2:
        check_fields(frpc.compile(module, (x,)), x, exactly=False)


@pytest.mark.parametrize(
    "name",
    nets(
        ("plain", "flip", "squeeze and excite", "with a constant row"),
        *("plain", "flip", "squeeze and excite", "with a constant row"),
        *("cumsum", "softmax over a row", "group norm", "pools", "sort"),
    ),
)
def test_constants_land_on_cells_that_the_neuron_reads(name: str) -> None:
    """And relevance and constants together sum to the neuron; a field is an interval, so cells between count as read."""
    net, x = built(name)
    spread, apart = (compiled(net, x, bias=bias) for bias in ("receptive_field", "separate"))
    output = net(x).detach()
    for place in (0, output[0].numel() // 3, output[0].numel() - 1):
        seed = torch.zeros_like(output)
        seed.view(2, -1)[:, place] = 1.0
        whole, local = spread(x, seed=seed).relevance, apart(x, seed=seed).relevance
        assert torch.allclose(whole.flatten(1).sum(1), output.flatten(1)[:, place], rtol=1e-10, atol=1e-12)
        placed = (whole - local)[0].abs().amax(0) > 1e-14
        moved = x[:1].repeat(49, 1, 1, 1)
        for k in range(49):
            moved[k, :, k // 7, k % 7] += 30.0
        read = (net(moved).flatten(1)[:, place] - output.flatten(1)[0, place]).abs().gt(1e-12).reshape(7, 7)
        rows, columns = read.any(1).nonzero()[:, 0], read.any(0).nonzero()[:, 0]
        reachable = torch.zeros_like(read)
        reachable[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert not bool((placed & ~reachable).any())


def field_of(net: nn.Module, x: Tensor, target: object) -> Field:
    fields = receptive_fields(compiled(net, x).compiled(x).assignment)
    (found,) = [field for node, field in fields.items() if node.target is target]
    return found


@pytest.mark.parametrize(
    ("name", "target"),
    [("squeeze and excite", aten.mul.Tensor), ("indexing", aten.index.Tensor), ("grid", aten.grid_sampler_2d.default),
     ("group norm", aten.group_norm.default), ("transposed", aten.transpose.int), ("turned", aten.rot90.default)],
)  # fmt: skip
def test_what_no_trait_says_is_taken_to_see_everything(name: str, target: object) -> None:
    net, x = built(name)
    field = field_of(net, x, target)
    whole = not field.local or all(bool((low == 0).all() and (high == 7).all()) for low, high in field.axes or ())
    assert whole


def test_fields_of_layers_with_windows_are_exact() -> None:
    """Position i of two convolutions of 3 cells, the second with stride 2: cells 2i - 2 to 2i + 2, cut at the border."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, 2, 1)).double()
    x = randn(2, 2, 7, 7)
    fields = receptive_fields(frpc.compile(net, (x,)).compiled(x).assignment)
    axes = list(fields.values())[-1].axes
    assert axes is not None
    for low, high in axes:
        assert low.tolist() == [0, 0, 2, 4] and high.tolist() == [3, 5, 7, 7]
