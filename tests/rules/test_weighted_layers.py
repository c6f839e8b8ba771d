"""LRP through every operator that multiplies by parameters, with arguments of all kinds: each rule equals its twin of the paper.

The operator is affine in its input, so the twin reads its matrix column by column and knows nothing of how it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
import twins
from families import built, by_sample, error, explained, randn
from frpc.errors import OptionError, UnsupportedOpError
from frpc.rules import LRP, AlphaBeta, AttnLRP, EpsilonPlus, Flat, Gamma, RuleSet, WSquare, ZBox, ZPlus

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's note on its speed
EPS, TINY = 0.05, 0.01  # large enough to show
NAN = float("nan")


class Calls(nn.Module):
    """A function of the input and of constants of these shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ParameterList(nn.Parameter(randn(*shape, seed=k), False) for k, shape in enumerate(shapes, start=20))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.held)


def each(x: Tensor, w: Tensor) -> Tensor:
    """The same matrix for every sample, as bmm wants it."""
    return w.expand(x.shape[0], *w.shape)


def convolution(kind: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    return built(lambda: nn.Sequential(kind(*arguments, **options)))


OPERATORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Calls(F.linear, (5, 4), (5,)), (4,)),
    "linear, weights turned": (lambda: Calls(lambda x, w, b: F.linear(x, w.t(), b), (4, 5), (5,)), (4,)),
    "linear, of tokens": (lambda: Calls(F.linear, (5, 4), (5,)), (3, 4)),
    "addmm, alpha 3": (lambda: Calls(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=3), (4, 5), (5,)), (4,)),
    "addmm, both below 0": (lambda: Calls(lambda x, w, b: torch.addmm(b, x, w, beta=-1.5, alpha=-2), (4, 5), (5,)), (4,)),
    "addmm, beta 0": (lambda: Calls(lambda x, w, b: torch.addmm(b * NAN, x, w, beta=0, alpha=2), (4, 5), (5,)), (4,)),
    "baddbmm": (lambda: Calls(lambda x, w, b: torch.baddbmm(b, x, each(x, w), beta=0.5, alpha=3), (4, 5), (1, 3, 5)), (3, 4)),
    "baddbmm, turned": (
        lambda: Calls(lambda x, w, b: torch.baddbmm(b, each(x, w), x, beta=2, alpha=-1), (5, 3), (1, 5, 4)), (3, 4),
    ),
    "bmm": (lambda: Calls(lambda x, w: torch.bmm(x, each(x, w)), (4, 5)), (3, 4)),
    "mm": (lambda: Calls(torch.mm, (4, 5)), (4,)),
    "matmul, a matrix each": (lambda: Calls(torch.matmul, (3, 4, 5)), (3, 2, 4)),
    "matmul, on the left": (lambda: Calls(lambda x, w: w @ x, (5, 3)), (3, 4)),
    "matmul, a vector": (lambda: Calls(torch.matmul, (4,)), (3, 4)),
    "mv": (lambda: Calls(torch.mv, (4,)), (4,)),
    "einsum": (lambda: Calls(lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 4)), (4,)),
    "einsum, of heads": (lambda: Calls(lambda x, w: torch.einsum("bhi,hio->bho", x, w), (3, 4, 5)), (3, 4)),
    "tensordot": (lambda: Calls(lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), (3, 4, 5)), (3, 4)),
    "conv1d, groups, dilation": (lambda: convolution(nn.Conv1d, 4, 6, 3, groups=2, dilation=2, padding=1), (4, 9)),
    "conv2d, stride, padding": (lambda: convolution(nn.Conv2d, 2, 3, 3, stride=2, padding=(2, 0)), (2, 6, 7)),
    "conv2d, same": (lambda: convolution(nn.Conv2d, 2, 3, (3, 5), padding="same"), (2, 4, 4)),
    "conv2d, circular": (lambda: convolution(nn.Conv2d, 2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv3d": (lambda: convolution(nn.Conv3d, 2, 3, 2), (2, 3, 3, 3)),
    "transposed": (
        lambda: convolution(nn.ConvTranspose2d, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), (4, 3, 3),
    ),
    "transposed, 1d": (lambda: convolution(nn.ConvTranspose1d, 2, 3, 3, stride=3, output_padding=2), (2, 4)),
}  # fmt: skip

RULES: dict[str, tuple[RuleSet, twins.Share]] = {
    "lrp-0": (LRP(0.0), twins.epsilon(0.0)),
    "epsilon": (LRP(EPS), twins.epsilon(EPS)),
    "z+": (ZPlus(TINY), twins.z_plus(TINY)),
    "alpha 2 beta 1": (AlphaBeta(2.0, 1.0, TINY), twins.alpha_beta(2.0, 1.0, TINY)),
    "gamma": (Gamma(0.25, TINY), twins.gamma(0.25, TINY)),
    "w^2": (WSquare(EPS, TINY), twins.w_square(TINY)),
    "flat": (Flat(EPS, TINY), twins.flat(TINY)),
    "z-box": (
        ZBox(EPS, TINY, -4.0, 5.0),
        lambda layer, a, r: twins.z_box(torch.full_like(a, -4.0), torch.full_like(a, 5.0), TINY)(layer, a, r),
    ),
}


@pytest.mark.parametrize("of", OPERATORS)
def test_every_rule_reads_all_arguments(of: str) -> None:
    make, shape = OPERATORS[of]
    model, x = make().eval(), randn(2, *shape, seed=3)
    if of == "mv":  # of the whole batch: samples are the rows
        shape = (4,)
    with torch.no_grad():
        output = model(x)
        layer = twins.Weighted(*twins.matrix(model, shape), convolution=False)
    seed = randn(*output.shape, seed=5)
    for name, (rules, share) in RULES.items():
        expected = by_sample(lambda a, r, share=share: share(layer, a, r), x, (seed * output).reshape(len(x), -1))
        assert error(explained(model, x, rules, seed), expected) <= 1e-10, name


class Beside(nn.Module):
    """``beta V x + alpha W x``, written as one call whose summand comes from the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(randn(4, 5, seed=20)), nn.Parameter(randn(4, 5, seed=21))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x @ self.v, x, self.w, beta=0.5, alpha=3)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("w^2", "flat", "z-box")])
def test_a_summand_that_carries_is_a_summand(name: str) -> None:
    """Relevance of a sum goes to the summands in proportion; only then does the layer share out its part."""
    model, x = Beside(), randn(2, 4, seed=3)
    rules, share = RULES[name]
    with torch.no_grad():
        output = model(x)
    seed, zero = randn(*output.shape, seed=5), torch.zeros(5, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for factor, weight in ((0.5, model.v.detach()), (3.0, model.w.detach())):
        # Written apart, V is a layer without factor, whose rule does not see beta: z+ and gamma do not care for a factor above 0.
        layer = twins.Weighted((weight if factor == 0.5 else factor * weight).t(), zero, convolution=False)
        part = factor * (x @ weight)
        expected = expected + by_sample(lambda a, r, layer=layer: share(layer, a, r), x, seed * part)
    assert error(explained(model, x, rules, seed), expected) <= 1e-10


class Attends(nn.Module):
    """Values weighed by numbers that come from the input, written as bmm, matmul or einsum."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.score, self.product = nn.Linear(4, 3), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.score(x).softmax(-1), x)


@pytest.mark.parametrize("product", [torch.bmm, torch.matmul, lambda a, b: torch.einsum("bij,bjk->bik", a, b)], ids=range(3))
def test_what_comes_from_the_input_is_no_weight(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """However a product of values is written, rules for weights refuse it; AttnLRP has a rule."""
    model, x = Attends(product).double(), randn(2, 3, 4)
    with pytest.raises(UnsupportedOpError, match="both factors are computed from the input"):
        frpc.compile(model, x, rule=EpsilonPlus())
    assert frpc.compile(model, x, rule=AttnLRP())(x, seed=randn(2, 3, 4)).relevance.shape == x.shape


def test_a_rule_for_the_first_layer_wants_one() -> None:
    """Behind a function of the input no layer reads the input: the first layer's rule must not vanish in silence."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 3)).double()
    for rules in (Flat(), ZBox(low=-1.0, high=1.0), WSquare(), frpc.rules.EpsilonPlusFlat()):
        with pytest.raises(OptionError, match="no layer with weights reads the input"):
            frpc.compile(model, randn(2, 4), rule=rules)
    assert frpc.compile(model, randn(2, 4), rule=LRP())(randn(2, 4), target=0).relevance.shape == (2, 4)
