"""Patterns of modules and operators: one meaning everywhere, and none that names nothing goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from families import compiled, error, randn
from frpc.errors import OptionError
from frpc.maps import Scale
from frpc.rules import FRP, LRP, Flat, Half, RuleSet, ZPlus, compose
from frpc.rules.table import Affine, Call

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return self.act(self.inner(x)) * gate


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), Block(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).double().eval()


NET = net()
X = randn(2, 2, 6, 6)


def map_of(rule: RuleSet, **options: Any) -> Tensor:
    return compiled(NET, X, rule=rule, **options)(X, target=1).relevance


def half_of_it(call: Call, a: Tensor, *rest: Any) -> Affine:
    """A ReLU's rule that gives its operand half of the result; the other half is constant."""
    return Affine({"self": Scale(0.5 * (a > 0).to(a.dtype), a.shape)}, 0.5 * call.value)


def test_a_pattern_names_a_module_and_everything_inside_it() -> None:
    """The block's ReLU lies in `2.act`: `2`, `2.act`, `2.*` and `*` all reach it, in overrides as in compose."""
    inside = {
        key: map_of(FRP(overrides={(key, aten.relu.default): half_of_it})) for key in ("2", "2.act", "2.a?t", "2.*", "[12]")
    }
    assert error(inside["2"], inside["2.act"]) == 0 and error(inside["2.a?t"], inside["2"]) == 0
    assert error(inside["2.*"], inside["2"]) == 0 and error(inside["[12]"], inside["2"]) > 0.01
    assert error(map_of(FRP()), inside["2"]) > 0.01
    composed = [map_of(compose({key: ZPlus()}, default=LRP())) for key in ("2", "2.inner", "2.*")]
    assert error(composed[0], composed[1]) == 0 and error(composed[2], composed[0]) == 0
    shared = [map_of(FRP(product={key: "half"})) for key in ("2", "*")]
    assert error(shared[0], shared[1]) == 0 and error(shared[0], map_of(FRP())) > 0.01
    assert error(map_of(FRP(product={"2.inner": "half"})), map_of(FRP())) == 0  # the product stands in the block itself
    fixed = [map_of(FRP(), constant=[key]) for key in ("2.inner", "2.inn*")]
    assert error(fixed[0], fixed[1]) == 0


MISSES: dict[str, tuple[Callable[[], Any], str]] = {
    "overrides": (lambda: FRP(overrides={"bluck": half_of_it}), r"overrides: 'bluck' matches no module of this model"),
    "overrides, a pair": (
        lambda: FRP(overrides={("2.iner", aten.relu.default): half_of_it}),
        r"overrides: \('2.iner', aten.relu.default\) matches no module of this model; nearest names: 2.inner",
    ),
    "overrides, an operator elsewhere": (
        lambda: FRP(overrides={("2", aten.linear.default): half_of_it}),
        r"\('2', aten.linear.default\) matches no operator of these modules",
    ),
    "overrides, an operator as it is called": (
        lambda: FRP(overrides={aten.conv2d.default: half_of_it}),
        r"aten.conv2d.default matches no operator of the graph that rules are written for: there it is aten.convolution.default",
    ),
    "product": (lambda: FRP(product={"3.*.x": "half", "2": "half"}), r"product: '3.\*.x' matches no module"),
    "compose": (lambda: compose({"2.inne": ZPlus()}, default=LRP()), r"compose: '2.inne' matches no module.*2.inner"),
    "compose, an operator": (
        lambda: compose({aten.conv3d: ZPlus()}, default=LRP()), r"compose: aten.conv3d matches no operator of this model",
    ),
    "compose, a set inside": (lambda: compose({"2": FRP(product={"9": "half"})}), r"product: '9' matches no module"),
    "compose, the default": (lambda: compose({"2": Half()}, default=FRP(overrides={"9": half_of_it})), r"overrides: '9' matches"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_what_matches_nothing_is_an_error(name: str) -> None:
    make, message = MISSES[name]
    rule = make()
    with pytest.raises(OptionError, match=message):
        compiled(NET, X, rule=rule)


def test_it_is_an_error_at_the_first_call_too() -> None:
    """Compiled without inputs nothing is known of the graph; all that is wrong is said at once."""
    rule = FRP(overrides={"bluck": half_of_it}, product={"7": "half"})
    explainer = frpc.compile(net(), rule=rule)
    with pytest.raises(OptionError, match=r"(?s)overrides: 'bluck'.*product: '7'.*A pattern names a module"):
        explainer(X, target=1)
    with pytest.raises(OptionError, match="constant: 'hed' matches no module"):
        compiled(NET, X, constant=["hed"])


@pytest.mark.parametrize("key", [aten.conv2d, aten.conv2d.default, aten.convolution, aten.convolution.default], ids=str)
def test_operators_are_known_by_every_name(key: Any) -> None:
    """A packet means all its overloads; an operator goes by its name in the model and by that in the canonical graph."""
    by_name = map_of(compose({key: ZPlus()}, default=LRP()))
    by_module = map_of(compose({"0": ZPlus(), "2": ZPlus()}, default=LRP()))
    assert error(by_name, by_module) == 0 and error(by_name, map_of(LRP())) > 0.01


def test_a_packet_in_overrides_means_all_overloads() -> None:
    one, all_of_them = (map_of(FRP(overrides={key: half_of_it})) for key in (aten.relu.default, aten.relu))
    assert error(one, all_of_them) == 0


def test_what_relevance_does_not_reach_counts() -> None:
    """Of an inner layer's neurons the rest of the net is not looked at: patterns there are no mistakes."""
    rule = compose({"0": Flat(), "5": ZPlus()}, default=LRP())
    explainer = compiled(NET, X, rule=rule)
    assert explainer.neurons("2", [(0, 1, 1)], X).relevance.shape[-2:] == X.shape[-2:]


def test_modules_without_operators_count() -> None:
    """A dropout does half_of_it in evaluation: to name it is no mistake."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).double().eval()
    frpc.compile(model, (randn(2, 4),), rule=compose({"1": ZPlus()}, default=LRP()))
