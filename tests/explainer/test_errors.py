"""Bad input: each a clear error of its own class, before work starts and with nothing left behind; the texts are pinned.

What the command line adds (images, weights files, folders) is tested beside the files that read them.
"""

from __future__ import annotations

import inspect
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frpc
from frpc import errors
from frpc.errors import (
    BatchError,
    CaptureError,
    FrpcError,
    InputError,
    OptionError,
    ShapeError,
    SourceError,
    TargetError,
    UnsupportedOpError,
)
from frpc.maps import LinearOp
from frpc.rules.table import TABLE, Affine, Call
from perceptron import explainer, randn

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def line_of(function: Callable[..., Any], text: str) -> int:
    """The line of this file where `function` says `text`."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


# Classes ----------------------------------------------------------------------------------------------------------------


def test_kinds_of_errors() -> None:
    """All are FrpcErrors; what the caller handed in is an InputError, what the compiler cannot do is not."""
    classes = {name: getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    kinds = {name: kind for name, kind in classes.items() if issubclass(kind, Exception)}
    assert all(issubclass(kind, FrpcError) for kind in kinds.values())
    compiler = {n for n, kind in kinds.items() if not issubclass(kind, InputError)} - {"FrpcError"}
    assert {
        "BatchError",
        "CaptureError",
        "CompileError",
        "RuleDeclinedError",
        "TrainingModeError",
        "UnsupportedOpError",
    } <= compiler
    assert all(kind.__doc__ for kind in kinds.values())


# Operators without a rule -----------------------------------------------------------------------------------------------


class Scores(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = torch.special.bessel_j0(x)
        return torch.special.bessel_j0(scores) + 1


class Gaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scores = nn.Linear(4, 4), Scores()

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(self.scores(self.layer(x)))


def test_all_gaps_at_once() -> None:
    with pytest.raises(UnsupportedOpError) as error:
        frpc.compile(Gaps().double(), (randn(2, 4),))
    lines = str(error.value).splitlines()
    first, second = line_of(Scores, "j0(x)"), line_of(Scores, "j0(scores)")
    last = line_of(Gaps, "bessel_j1")
    assert lines == [
        "3 of 5 nodes cannot carry relevance (2 causes).",
        f"  {'aten.special_bessel_j0.default — no rule':<76} 2 nodes",
        f"    scores   test_errors.py:{first}   scores = torch.special.bessel_j0(x)   f64[B, 4]",
        f"    scores   test_errors.py:{second}   return torch.special.bessel_j0(scores) + 1   f64[B, 4]",
        f"  {'aten.special_bessel_j1.default — no rule':<76} 1 node",
        f"    (top level)   test_errors.py:{last}   return torch.special.bessel_j1(self.scores(self.layer(x)))   f64[B, 4]",
        "  Fix: register a rule with @frpc.rule(torch.ops.aten.special_bessel_j0.default) — docs/adding_a_rule.md;",
        "       it cannot be a constant: every path from the input to the output passes through it",
    ]
    assert [(gap.op, gap.module, gap.reason) for gap in error.value.gaps] == [
        ("aten.special_bessel_j0.default", "scores", "no rule"),
        ("aten.special_bessel_j0.default", "scores", "no rule"),
        ("aten.special_bessel_j1.default", "", "no rule"),
    ]


def test_a_gap_in_the_models_own_forward_is_no_reason_to_make_everything_constant() -> None:
    """`constant=["*"]` would close any gap, with a flat map: what is advised is a cure that helps."""
    x = randn(2, 4)
    for model, advised in (
        (Function(lambda x: torch.special.bessel_j0(x) + x), 'constant=["path.of.module"]'),
        (Function(lambda x: torch.special.bessel_j0(x) * 2), "passes through it"),
        (Beside(Scores()).double(), 'or treat it as a constant: frpc.compile(..., constant=["gap"])'),
        (nn.Sequential(Scores()), "it cannot be a constant: every path from the input to the output passes through it"),
    ):
        with pytest.raises(UnsupportedOpError) as error:
            frpc.compile(model, (x,))
        assert str(error.value).endswith(advised)
        assert "*" not in str(error.value).splitlines()[-1]
        again = pickle.loads(pickle.dumps(error.value))
        assert str(again) == str(error.value)


class Beside(nn.Module):
    def __init__(self, gap: nn.Module) -> None:
        super().__init__()
        self.gap, self.last = gap, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.gap(x))


@pytest.mark.parametrize(("gap", "pattern"), [(Scores(), "gap"), (nn.Sequential(OrderedDict(scores=Scores())), "*.scores")])
def test_gaps_may_count_as_constants(gap: nn.Module, pattern: str) -> None:
    """The remedy of the message: what the named modules compute is a constant, and the account still sums up."""
    torch.manual_seed(0)
    model, x = Beside(gap).double(), randn(2, 4)
    out = frpc.compile(model, (x,), constant=pattern)(x, target=1)
    weight = model.last.weight[1].detach()
    share = gap(x) @ weight + model.last.bias[1].detach()
    assert torch.allclose(out.bias, share)
    assert torch.allclose(out.relevance, x * weight + share[:, None] / 4)


def test_nothing_but_constants_is_refused() -> None:
    """A map that owes everything to constants says nothing: no carried path is an error that names where the ways end."""
    model, x = nn.Sequential(OrderedDict(scores=Scores(), last=nn.Linear(4, 3))).double(), randn(2, 4)
    with pytest.raises(
        SourceError, match=r"No path carries relevance from the sources \(input\w*\) to the output: its map would come"
    ) as e:
        frpc.compile(model, (x,), constant=["scores"])
    assert f"scores   test_errors.py:{line_of(Scores, 'scores = ')}" in str(e.value)
    with pytest.raises(SourceError, match="No path carries relevance"):
        frpc.compile(model, constant=["*"])(x, target=0)


def test_a_source_without_a_path_beside_others_is_said() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, codes: Tensor) -> Tensor:
            return x * (codes > 0)

    explainer = frpc.compile(Second(), (randn(2, 4), randn(2, 4)))
    assert [str(r) for r in explainer.refusals] == [
        "relevance not used at codes: no path carries relevance to it from the explained output: its map contains only constants"
    ]


def test_a_gap_may_be_closed_by_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other remedy of the message."""
    monkeypatch.setattr(TABLE, "rules", dict(TABLE.rules))

    @frpc.rule(aten.linalg_cross.default, formula="a x b", source="linear")
    def cross(call: Call, a: Tensor, b: Tensor, dim: int = -1) -> Affine:
        return Affine({"self": LinearOp(lambda u: torch.linalg.cross(u, b.expand_as(u)), a.shape, call.value.shape)})

    model, x = Function(lambda x: torch.linalg.cross(x.relu(), torch.ones_like(x))), randn(2, 3)
    out = frpc.compile(model, (x,))(x, target=2)
    assert torch.allclose(out.relevance.sum(1), model(x)[:, 2])
    with pytest.raises(
        OptionError, match=r"aten\.linalg_cross\.default already has a rule \(cross\); pass override=True to replace it"
    ):
        frpc.rule(aten.linalg_cross.default)(cross)
    with pytest.raises(OptionError, match=r"is not an operator overload: give one, such as torch.ops.aten.mean.dim"):
        frpc.rule(aten.linalg_cross)(cross)
    with pytest.raises(OptionError, match=r"aten\.cumprod\.default has no argument 'axis'; it has self, dim, dtype"):
        frpc.rule(aten.cumprod.default, carries="axis")(cross)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x + x[:1],
        lambda x: x + x[0],
        lambda x: nn.functional.linear(x, x[:, None].sum((0, 1))[None]),
        lambda x: (x @ x.t()).softmax(-1) @ x,
    ],
    ids=["mean", "mean kept", "first sample", "a sample", "weights", "attention"],
)
def test_operators_that_mix_samples_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    """No rule would help, so none is asked for."""
    with pytest.raises(BatchError, match=r"depends on the other samples.*\n    \(top level\)   test_errors.py"):
        frpc.compile(Function(function), (randn(3, 4),))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x.flip(0),
        lambda x: x + x.roll(1, 0),
        lambda x: x.t().roll(1, 1).t(),
    ],
    ids=["flip", "roll", "roll of a transposed"],
)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_models_that_mix_samples_are_refused(function: Callable[[Tensor], Tensor], batch: int) -> None:
    """No map of one sample could sum to its output: that is said, not computed."""
    with pytest.raises(BatchError) as error:
        frpc.compile(Function(function), (randn(batch, 4),))
    first, place, last = str(error.value).splitlines()
    assert first == "One sample's result depends on the other samples of the batch, so no map of that sample could sum to it."
    assert place.startswith("    (top level)   test_errors.py:")
    assert "Make samples independent in the model" in last


def test_models_of_a_fixed_batch_that_mix_samples_are_refused() -> None:
    """The first sample meets the second here, and not the last."""
    with pytest.raises(BatchError, match="One sample's result depends on the other samples of the batch"):
        frpc.compile(Function(lambda x: x.view(-1, 2, 2).transpose(0, 1).reshape(-1, 4)), (randn(3, 4),))


def test_the_line_that_mixes_samples_is_named() -> None:
    class Mixes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.relu() + 1
            y = x * x.flip(0)
            return y.tanh()

    with pytest.raises(BatchError, match=rf"test_errors.py:{line_of(Mixes, 'flip')}   y = x \* x.flip\(0\)   f64\[B, 4\]"):
        frpc.compile(Mixes(), (randn(1, 4),))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: torch.cat([x, 2 * x], 0), r"f64\[2\*B, 4\]"),
        (lambda x: x.repeat(2, 1), r"f64\[2\*B, 4\]"),
        (lambda x: x.t(), r"f64\[4, B\]"),
        (lambda x: x.view(-1, 2), r"f64\[2\*B, 2\]"),
    ],
    ids=["cat", "repeat", "transposed", "rows"],
)
def test_outputs_that_are_not_one_for_each_sample(function: Callable[[Tensor], Tensor], shape: str) -> None:
    with pytest.raises(
        BatchError, match=rf"The explained output {shape} does not have one result for each sample, samples first"
    ):
        frpc.compile(Function(function), (randn(2, 4),))


def test_a_carried_weight_is_named() -> None:
    class Hyper(nn.Module):
        def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
            return nn.functional.conv1d(x, kernel)

    with pytest.raises(UnsupportedOpError, match="carried value as 'weight': the rule accepts it only as a coefficient"):
        frpc.compile(Hyper(), (randn(2, 2, 5), randn(2, 2, 3)))


# Capture ----------------------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x[0, 0].item())


@pytest.mark.parametrize(("model", "line"), [(Branch(), "if x.sum() > 0:"), (Numpy(), ".item()")], ids=["branch", "item"])
def test_what_cannot_be_captured_names_the_line(model: nn.Module, line: str) -> None:
    with pytest.raises(CaptureError) as error:
        frpc.compile(model, (randn(2, 4),))
    text = str(error.value)
    assert text.startswith(f"torch.export cannot capture {type(model).__name__}: ")
    assert f"test_errors.py:{line_of(type(model), line)}" in text
    assert "Try: replace data-dependent Python branches and .item() by tensor operators (torch.where)" in text
    with pytest.raises(CaptureError):
        frpc.examine(model, randn(2, 4))


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 1))
    with pytest.raises(
        CaptureError, match=r"Sequential itself raises an error on these inputs, .*RuntimeError: .*shapes cannot be multi"
    ):
        frpc.compile(model, (torch.ones(2, 4),))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # torch itself advises against what is refused here
def test_torchscript_is_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4))
    with pytest.raises(CaptureError, match=r"TorchScript module, which torch.export does not support: compile"):
        frpc.compile(scripted, (torch.ones(1, 4),))


class Fixed(nn.Module):
    """The batch size is written into the model."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).relu() * torch.arange(1.0, 3.0)[:, None]


def test_a_fixed_batch_is_recorded_and_checked() -> None:
    x = randn(2, 4)
    compiled = frpc.compile(Fixed(), (x,))
    out = compiled(x, target=1)
    assert torch.allclose(out.relevance.sum(1), out.output[:, 1])
    assert any(str(refusal).startswith("a free batch size not used at capture: ") for refusal in compiled.refusals)
    with pytest.raises(
        ShapeError, match=r"'x' has a batch of 3, but this model was captured with a fixed batch of 2 \(explainer"
    ):
        compiled(randn(3, 4), target=1)


# Afterwards -----------------------------------------------------------------------------------------------------------


def test_a_refused_input_leaves_the_explainer_usable() -> None:
    lazy = frpc.compile(Gaps().double())
    for _ in range(2):
        with pytest.raises(UnsupportedOpError):
            lazy(randn(2, 4), target=0)
    assert not lazy.programs.compiled
    out = explainer()(randn(2, 3, 5), target=0)
    with pytest.raises(TargetError):
        explainer()(randn(2, 3, 5), target=9)
    assert torch.equal(explainer()(randn(2, 3, 5), target=0).relevance, out.relevance)


def test_errors_survive_a_process_boundary() -> None:
    """pytest-xdist, multiprocessing and the like send exceptions by pickle."""
    with pytest.raises(UnsupportedOpError) as error:
        frpc.compile(Gaps().double(), (randn(2, 4),))
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)
    assert again.gaps == error.value.gaps
