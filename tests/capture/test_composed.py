"""Operators that are written out in terms of others: the same output, and every account of it right."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from case import K4, One, Two, constant
from families import check_complete, compiled, front_of, prepared, randn
from frpc.capture import decompose
from frpc.capture.composed import COMPOSED
from frpc.errors import BatchError, UnsupportedOpError
from frpc.rules import LID, Gradient
from graphs import calls
from rule_twins import agrees, from_frozen, from_piece

aten = torch.ops.aten
V, S, I = (3, 4), (3, 4, 6), (3, 2, 4, 6)  # noqa: E741
PLACES = torch.tensor([2, 0, 3, 0])
LABELS = torch.tensor([2, 0, -1, 1])
T = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
BILINEAR, K5 = constant(5, 3, 4) - 5.0, constant(5)


@dataclass(frozen=True)
class Composed:
    """A call of an operator that is written out.

    Attributes:
        op: the operator.
        function: makes the call of one carried tensor, or of two.
        shapes: of the tensors.
        held: the function with its coefficients held, as for `cases.frozen`; None where it is linear in pieces.
        complete: increments add up; where a choice that is no number changes on the way, they cannot.
    """

    op: Any
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    held: Callable[..., Tensor] | None = None
    complete: bool = True

    def module(self) -> nn.Module:
        return (One if len(self.shapes) == 1 else Two)(self.function).double().eval()

    def inputs(self, batch: int = 3, seed: int = 1) -> tuple[Tensor, ...]:
        return tuple(randn(batch, *shape[1:], seed=seed + k) for k, shape in enumerate(self.shapes))


def one_of_four(a: Tensor) -> Tensor:
    """The class of every sample."""
    return torch.full([a.shape[0]], 2)


def smoothed(a: Tensor, x: Tensor) -> Tensor:
    """Log softmax from the largest element, then nine tenths of the class and a fortieth of each."""
    log = a - a.gather(1, x.argmax(1, True)) + x.amax(1, True) - x.logsumexp(1, True)
    return -0.9 * log.gather(1, one_of_four(x)[:, None])[:, 0] - log.sum(1) * 0.025


def binary(a: Tensor, x: Tensor) -> Tensor:
    """`-t log p - (1 - t) log(1 - p)` of p = a^2/9: log is carried whole, log1p by its secant, a square by its factor."""
    p, at = a * x / 9, x * x / 9
    return -T * p * at.log() / at - (1 - T) * p * torch.log1p(-at) / at


def soft_margin(a: Tensor, x: Tensor) -> Tensor:
    """`log1p(exp(u))` of u = -t a, secant upon secant."""
    u, e = -(2 * T - 1) * x, (-(2 * T - 1) * x).exp()
    return torch.log1p(e) / e * (u.expm1() / u * (-(2 * T - 1) * a) + 1)


def by_channel(a: Tensor, x: Tensor) -> Tensor:
    """A norm of each channel of each sample, the deviation held."""
    return (a - a.mean((2, 3), True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


def prefixes(a: Tensor, x: Tensor) -> Tensor:
    """`log sum_(j <= i) e^a_j`: 1 on the largest so far, the rest is constant."""
    largest = x.cummax(1)
    return a.gather(1, largest.indices) + x.logcumsumexp(1) - largest.values


def similarity(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_embedding_loss(a, b, torch.ones(a.shape[0]), reduction="none")[:, None]


def similar(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`1 - sqrt(<a, b>^2 / ...)`: PyTorch divides by sqrt(|a|^2 |b|^2), a norm; the product is halved."""
    size = ((x.square().sum(1) + 1e-12) * (y.square().sum(1) + 1e-12)).sqrt()
    return (1 - ((a * y).sum(1) + (x * b).sum(1)) / 2 / size)[:, None]


def unpooled(a: Tensor) -> Tensor:
    return F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2)


def per_image(a: Tensor) -> Tensor:
    return F.batch_norm(a.reshape(1, -1, 4, 6), None, None, training=True).reshape(a.shape)


def huber(delta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`h(d) / d` on d."""
    return lambda a, x: F.huber_loss(x, K4.expand_as(x), reduction="none", delta=delta) / (x - K4) * (a - K4)


# fmt: off
COMPOSITIONS: dict[str, Composed] = {
    "mul.Scalar": Composed(aten.mul.Scalar, lambda a: torch.trapezoid(a, dx=0.5)[:, None], (V,)),
    "div.Scalar": Composed(aten.div.Scalar, lambda a: torch.gradient(a, dim=1)[0], (V,)),
    "sub.Scalar": Composed(aten.sub.Scalar, lambda a: aten.sub.Scalar(a, 2.0, 3), (V,)),
    "div.Scalar_mode": Composed(aten.div.Scalar_mode, lambda a: aten.div.Scalar_mode(a, 0.5, rounding_mode=None), (V,)),
    "div.Tensor_mode": Composed(aten.div.Tensor_mode, lambda a: aten.div.Tensor_mode(a, K4, rounding_mode=None), (V,)),
    "div.Tensor_mode, trunc": Composed(
        aten.div.Tensor_mode, lambda a: torch.div(a, 0.25, rounding_mode="trunc"), (V,),
        lambda a, x: torch.div(x, 0.25, rounding_mode="trunc") / x * a),
    "ldexp": Composed(aten.ldexp.Tensor, lambda a: torch.ldexp(a, PLACES), (V,)),
    "remainder of a number": Composed(
        aten.remainder.Scalar_Tensor, lambda a: torch.remainder(2.5, a.abs() + 0.2), (V,),
        lambda a, x: 2.5 - torch.div(torch.tensor(2.5), x.abs() + 0.2, rounding_mode="floor") * (x.sign() * a + 0.2), False),
    "rrelu": Composed(aten.rrelu.default, F.rrelu, (V,)),
    "addmv": Composed(aten.addmv.default, lambda a: torch.addmv(a[:, 1], a, K4, beta=0.5, alpha=2)[:, None], (V,)),
    "bilinear": Composed(
        aten._trilinear.default, lambda a, b: F.bilinear(a, b, BILINEAR, K5), ((3, 3), V),
        lambda a, b, x, y: (F.bilinear(a, y, BILINEAR) + F.bilinear(x, b, BILINEAR)) / 2 + K5),
    "bilinear of tokens": Composed(
        aten._trilinear.default, lambda a: F.bilinear(a[..., :3], K4.expand(a.shape[0], 4, 4), BILINEAR, K5), (S,)),
    "cross": Composed(
        aten.linalg_cross.default, lambda a, b: torch.linalg.cross(a, b, dim=1), ((3, 3, 2), (3, 3, 2)),
        lambda a, b, x, y: (torch.linalg.cross(a, y, dim=1) + torch.linalg.cross(x, b, dim=1)) / 2),
    "cross with a constant": Composed(aten.linalg_cross.default, lambda a: torch.linalg.cross(a, K4[:3].expand_as(a)), ((3, 3),)),
    "unpooling": Composed(aten.max_unpool2d.default, unpooled, (I,), complete=False),
    "unpooling in one dimension": Composed(
        aten.max_unpool2d.default, lambda a: F.max_unpool1d(*F.max_pool1d(a, 2, return_indices=True), 2), (S,), complete=False),
    "unpooling in three": Composed(
        aten.max_unpool3d.default, lambda a: F.max_unpool3d(*F.max_pool3d(a, (1, 2, 2), return_indices=True), (1, 2, 2)),
        ((3, 2, 2, 4, 2),), complete=False),
    "batch norm of one image": Composed(aten._native_batch_norm_legit.no_stats, per_image, (I,), by_channel),
    "logcumsumexp": Composed(aten.logcumsumexp.default, lambda a: a.logcumsumexp(1), (S,), prefixes),
    "logcumsumexp, last": Composed(
        aten.logcumsumexp.default, lambda a: a.logcumsumexp(-1), (S,),
        lambda a, x: prefixes(a.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)),
    "nansum": Composed(aten.nansum.default, lambda a: a.nansum(1, keepdim=True), (V,)),
    "affine grid": Composed(
        aten.affine_grid_generator.default, lambda a: F.affine_grid(a, [a.shape[0], 1, 2, 2], align_corners=False), ((3, 2, 3),)),
    "mean squared error": Composed(
        aten.mse_loss.default, lambda a: F.mse_loss(a, K4.expand_as(a), reduction="none"), (V,),
        lambda a, x: (x - K4) * (a - K4)),
    "mean squared error of two": Composed(
        aten.mse_loss.default, lambda a, b: F.mse_loss(a, b, reduction="none"), (V, V), lambda a, b, x, y: (x - y) * (a - b)),
    "Huber's loss": Composed(
        aten.huber_loss.default, lambda a: F.huber_loss(a, K4.expand_as(a), reduction="none", delta=0.7), (V,), huber(0.7)),
    "smooth L1": Composed(
        aten.smooth_l1_loss.default, lambda a: F.smooth_l1_loss(a, K4.expand_as(a), reduction="none", beta=0.5), (V,),
        lambda a, x: huber(0.5)(a, x) / 0.5),
    "smooth L1, beta 0": Composed(
        aten.smooth_l1_loss.default, lambda a: F.smooth_l1_loss(a, K4.expand_as(a), reduction="none", beta=0.0), (V,)),
    "cross-entropy of a probability": Composed(
        aten.binary_cross_entropy.default,
        lambda a: F.binary_cross_entropy(a.square() / 9, T.expand_as(a), reduction="none"), (V,), binary, complete=False),
    "cross-entropy of a logit": Composed(
        aten.binary_cross_entropy_with_logits.default,
        lambda a: F.binary_cross_entropy_with_logits(a, T.expand_as(a), reduction="none"), (V,),
        lambda a, x: (1 - T) * a + ((1 + (-x).exp()).log() - math.log(2)) / -x * -a + math.log(2)),
    "cross-entropy of a logit, weighed": Composed(
        aten.binary_cross_entropy_with_logits.default,
        lambda a: F.binary_cross_entropy_with_logits(a, T.expand_as(a), K4, reduction="none", pos_weight=2 * K4), (V,),
        lambda a, x: K4 * ((1 - T) * a + (1 + (2 * K4 - 1) * T) * (
            ((1 + (-x).exp()).log() - math.log(2)) / -x * -a + math.log(2)))),
    "negative log likelihood": Composed(
        aten.nll_loss_forward.default, lambda a: F.nll_loss(a, one_of_four(a), reduction="none")[:, None], (V,)),
    "negative log likelihood, weighed, one ignored": Composed(
        aten.nll_loss_forward.default,
        lambda a: F.nll_loss(a, one_of_four(a), K4, ignore_index=1, reduction="none")[:, None], (V,)),
    "negative log likelihood of pixels": Composed(
        aten.nll_loss2d_forward.default,
        lambda a: F.nll_loss(a, one_of_four(a)[:, None, None].expand(-1, 4, 5), reduction="none"), ((3, 4, 4, 5),)),
    "cross-entropy, smoothed": Composed(
        aten.cross_entropy_loss.default,
        lambda a: F.cross_entropy(a, one_of_four(a), label_smoothing=0.1, reduction="none")[:, None], (V,),
        lambda a, x: smoothed(a, x)[:, None]),
    "cross-entropy with probabilities": Composed(
        aten.cross_entropy_loss.default, lambda a: F.cross_entropy(a, (K4 / K4.sum()).expand_as(a), reduction="none")[:, None],
        (V,), lambda a, x: -(K4 / K4.sum() * (a - a.gather(1, x.argmax(1, True)) + x.amax(1, True) - x.logsumexp(1, True))).sum(
            1, keepdim=True)),
    "soft margin": Composed(
        aten.soft_margin_loss.default, lambda a: F.soft_margin_loss(a, (2 * T - 1).expand_as(a), reduction="none"), (V,),
        soft_margin),
    "hinge": Composed(
        aten.hinge_embedding_loss.default,
        lambda a: F.hinge_embedding_loss(a, (2 * T - 1).expand_as(a), 0.5, reduction="none"), (V,)),
    "margin of ranks": Composed(
        aten.margin_ranking_loss.default,
        lambda a, b: F.margin_ranking_loss(a, b, (2 * T - 1).expand_as(a), 0.3, reduction="none"), (V, V)),
    "margin of several labels": Composed(
        aten.multilabel_margin_loss_forward.default,
        lambda a: F.multilabel_margin_loss(a, LABELS.expand(a.shape[0], 4), reduction="none")[:, None], (V,)),
    "Poisson, full": Composed(
        aten.poisson_nll_loss.default, lambda a: F.poisson_nll_loss(a, 2 * K4.expand_as(a), full=True, reduction="none"), (V,),
        lambda a, x: x.expm1() / x * a - 2 * K4 * a
        + F.poisson_nll_loss(0 * x, 2 * K4.expand_as(x), full=True, reduction="none")),
    "cosine": Composed(aten.cosine_embedding_loss.default, similarity, (V, V), similar),
}
# fmt: on

FIXED, NO_GRADIENT = {"div.Scalar"}, {"remainder of a number"}
WRITTEN = pytest.mark.parametrize("name", COMPOSITIONS)


def test_every_composition_has_a_line() -> None:
    """Sums over everything mix samples, what PyTorch composes itself has tests of its own, and the rest is above."""
    mixing = {aten.addr.default, aten.mean.default, aten.sum.default, aten.max.default, aten.min.default, aten.prod.default}
    elsewhere = {aten.aminmax.default, aten.floor_divide.default, aten.floor_divide.Scalar, aten.special_ndtr.default}
    elsewhere.add(aten.index_reduce.default)  # below
    elsewhere.add(aten.nll_loss_nd.default)  # becomes one of the two with the numbers of dimensions
    listed = {line.op for line in COMPOSITIONS.values()}
    missing = [str(op) for op in COMPOSED if op not in listed | mixing | elsewhere and not str(op).endswith(("out", "put"))]
    assert not missing, f"add a line for {', '.join(missing)}"


@functools.cache
def module_of(name: str) -> nn.Module:
    return COMPOSITIONS[name].module()


@WRITTEN
def test_forward(name: str) -> None:
    """The output is PyTorch's, the map sums to it and is the twin's, and the operator itself is gone."""
    line = COMPOSITIONS[name]
    module, inputs = module_of(name), line.inputs()
    explainer = compiled(module, inputs)
    with torch.no_grad():
        output = module(*inputs)
    seed = randn(*output.shape, seed=7)
    found = explainer(*inputs, seed=seed)
    assert agrees(found.output, output, 1e-13)
    maps = found.relevance if isinstance(found.relevance, tuple) else (found.relevance,)
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    missing = flat.sum(1) - (seed * output).flatten(1).sum(1)
    assert bool((missing.abs() <= 1e-12 * flat.abs().sum(1)).all())
    assert line.op not in {node.target for node in explainer.compiled(*inputs).assignment.graph_module.graph.nodes}
    if line.held is None:
        assert agrees(flat, from_piece(module, inputs, seed))
    else:
        assert agrees(flat, from_frozen(line.held, module, inputs, seed))


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in NO_GRADIENT])
def test_gradient(name: str) -> None:
    module, inputs = module_of(name), COMPOSITIONS[name].inputs()
    output = module(*inputs)
    seed = randn(*output.shape, seed=7)
    _, expected = torch.autograd.functional.vjp(module, inputs, seed)
    ready = prepared(module, inputs, Gradient(times_input=False))
    free = front_of(module, inputs).captured.static_batch_reason is None
    assert free == (name not in FIXED), "PyTorch itself fixes the batch size of torch.gradient, and of nothing else"
    assert isinstance(ready.assignment.sources[0].meta["val"].shape[0], torch.SymInt) == free, "the rules fix the batch size"
    _, *found, _ = ready.run(inputs, seed)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and bool((f - e).abs().sum() <= 1e-10 * e.abs().sum())


@pytest.mark.parametrize("name", [name for name, line in COMPOSITIONS.items() if line.complete])
def test_increments(name: str) -> None:
    line = COMPOSITIONS[name]
    assert check_complete(module_of(name), line.inputs(), line.inputs(1, seed=9), LID(), 1e-12) <= 1e-12


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("how", ["mean", "prod", "amax", "amin"])
def test_index_reduce_is_scatter_reduce(how: str, own: bool) -> None:
    """The same index for every row: the same maps as with an index for every element."""
    inputs = randn(3, 4), randn(3, 4, seed=2)
    by_row = Two(lambda a, b: a.index_reduce(1, PLACES, b, how, include_self=own))
    by_element = Two(lambda a, b: a.scatter_reduce(1, PLACES.expand(b.shape), b, how, include_self=own))
    found, expected = (frpc.compile(m, inputs)(*inputs, target=2) for m in (by_row, by_element))
    for one, other in zip(found.relevance, expected.relevance, strict=True):
        assert torch.equal(one, other)


# Near misses ----------------------------------------------------------------------------------------------------------------


def canonical(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    return calls(front_of(One(function).double().eval(), inputs).canonical)


def test_rounding_down_is_not_the_floor_of_the_quotient() -> None:
    """1 // 0.1 is 9, and floor(1 / 0.1) is 10: the operator stays whole."""
    assert canonical(lambda a: torch.div(a, 0.1, rounding_mode="floor") + a, randn(3, 4)) == ["div.Tensor_mode", "add.Tensor"]


def test_a_product_of_three_of_another_form_stays_whole() -> None:
    """Only the form of a bilinear layer is known: `sum_ij a[n, i] W[o, i, j] b[n, j]`."""
    found = canonical(lambda a: aten._trilinear(a[:, None], a[:, None], a[:, None], [], [], [], [1]), randn(3, 4))
    assert found[-1] == "_trilinear"


def test_batch_norm_by_the_statistics_of_a_batch_is_refused() -> None:
    """It mixes samples; of a batch of one image it is a norm of each channel, as above."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).double().eval()
    with pytest.raises(UnsupportedOpError, match=r"normalizes by the statistics of the batch: the result mixes samples"):
        frpc.compile(model, (randn(3, 2, 4, 4),))
    ungrouped = canonical(lambda a: F.batch_norm(a, None, None, training=True), randn(3, 2, 4))
    assert "_native_batch_norm_legit.no_stats" in ungrouped


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.amax, torch.max, torch.min, torch.prod])
def test_a_reduction_of_everything_mixes_samples(reduce: Callable[[Tensor], Tensor]) -> None:
    """What runs over all dimensions runs over the samples: refused in those words, not as an operator nobody knows."""
    with pytest.raises(BatchError, match="depends on the other samples of the batch"):
        frpc.compile(One(lambda a: a * reduce(a)).double(), (randn(3, 4),))


def test_what_is_written_in_place_inside_a_composition_has_no_other_name() -> None:
    """A value is read in place of the one it overwrites only where no view shares its memory."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    fresh = graph.call_function(aten.neg.default, (x,))
    plain = graph.call_function(aten.clamp_min_.default, (fresh, 0.0))
    base = graph.call_function(aten.mul.Tensor, (plain, 2.0))
    seen = graph.call_function(aten.view.default, (base, [-1]))
    shared = graph.call_function(aten.clamp_min_.default, (base, 1.0))
    given = graph.call_function(aten.clamp_min_.default, (x, 0.0))
    graph.output((seen, shared, given))
    decompose._write_nothing(graph)
    assert plain.target is aten.clamp_min.default
    assert shared.target is given.target is aten.clamp_min_.default
    assert base.args[0] is plain
