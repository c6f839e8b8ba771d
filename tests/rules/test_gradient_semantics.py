"""Gradient methods follow autograd where a model stops it, refuse what they cannot follow, and never return NaN.

The right value is PyTorch's own: ``torch.autograd.grad`` on the model.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
from families import compiled
from frpc.errors import CaptureError, NonFiniteError, UnsupportedOpError

GRADIENTS = ("gradient", "gradient-input")


class Between(nn.Module):
    """Two linear layers and what is asked about between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.middle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def made(middle: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Between(middle).double().eval()


def inputs() -> Tensor:
    return torch.randn([3, 6], generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def autograd(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = model(x)[:, 1].sum()
    (found,) = torch.autograd.grad(output, x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(h) * 2
    return gate * h.tanh()


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h.exp()


def with_islands(h: Tensor) -> Tensor:
    with torch.no_grad():
        z = h.sigmoid()
        with torch.enable_grad():
            z = z + h.tanh()
    return z * h


def switched_off(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = h.abs().mean(1, keepdim=True)
    return h / scale


def in_inference_mode(h: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.abs().mean(1, keepdim=True)
    return h * scale.clone()


def detached_in_place(h: Tensor) -> Tensor:
    gate = h.sigmoid()
    gate.detach_()
    return gate * h


def winners(h: Tensor) -> Tensor:
    with torch.no_grad():
        values, places = h.topk(2, 1)
    return h.gather(1, places).sum(1, keepdim=True) * values.sum(1, keepdim=True) + h


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda h: torch.sigmoid(h).detach() * torch.tanh(h),
    "torch.detach": lambda h: torch.detach(torch.sigmoid(h)) * torch.tanh(h),
    "data": lambda h: torch.sigmoid(h).data * torch.tanh(h),
    "no_grad": without_gradients,
    "decorated": lambda h: decorated(h) * h,
    "enable_grad inside": with_islands,
    "set_grad_enabled": switched_off,
    "detach_": detached_in_place,
    "winners": winners,
    "detached and returned as it is": lambda h: h.detach().contiguous().flatten(1).to(h.dtype) * h,
    "detached copy written to": lambda h: h.detach().clone().mul_(2) * h,
    "straight through, rounded": lambda h: h + (torch.round(4 * h) / 4 - h).detach(),
    "straight through, signs": lambda h: torch.sign(h).detach() - h.clamp(-1, 1).detach() + h.clamp(-1, 1),
    "straight through, one-hot": lambda h: (nn.functional.one_hot(h.argmax(1), 6) - h.softmax(1)).detach() + h.softmax(1),
    "everything": lambda h: h.detach().tanh(),
    "nothing": lambda h: h.tanh(),
}


@pytest.mark.parametrize("name", STOPS)
def test_gradients_stop_where_autograd_stops(name: str) -> None:
    model, x = made(STOPS[name]), inputs()
    slope = autograd(model, x)
    ahead, scaled = (compiled(model, x, method=method) for method in ("gradient", "gradient-input"))
    found = [refusal.why for refusal in ahead.refusals]
    assert len(found) == (name == "everything"), "looking for such places must not fix the batch size"
    assert all("its gradient is 0" in why for why in found)
    for explainer, want in ((ahead, slope), (scaled, slope * x)):
        got = explainer(x, target=1)
        torch.testing.assert_close(got.output, model(x))
        torch.testing.assert_close(got.relevance, want, rtol=1e-10, atol=1e-12)


def test_inference_mode_stops_gradients_too() -> None:
    model, x = made(in_inference_mode), inputs()
    h = model.first(x)
    scale = h.abs().mean(1, keepdim=True)
    want = (model.last.weight[1] * scale) @ model.first.weight
    torch.testing.assert_close(frpc.compile(model, (x,), method="gradient")(x, target=1).relevance, want)


@pytest.mark.parametrize("method", ["frp", "lid-ig", "lrp-epsilon"])
def test_other_rules_explain_values_and_detach_is_a_copy(method: str) -> None:
    x = inputs()
    model = made(lambda h: torch.sigmoid(h).detach() * torch.tanh(h.detach()))
    plain = made(lambda h: torch.sigmoid(h) * torch.tanh(h))
    got, want = (frpc.compile(m, (x,), method=method)(x, target=1) for m in (model, plain))
    assert want.relevance.abs().sum() > 0.1
    torch.testing.assert_close(got.relevance, want.relevance)


def test_an_inner_layer_behind_a_detach_has_a_gradient() -> None:
    class Split(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(self.first(x).detach()).tanh())

    torch.manual_seed(0)
    model, x = Split(lambda h: h).double().eval(), inputs()
    found = frpc.compile(model, (x,), method="gradient")
    assert not found(x, target=1).relevance.any()
    at = found.at(["first", "inner"], x, target=1)
    z = model.inner(model.first(x)).detach().requires_grad_()
    (want,) = torch.autograd.grad(model.last(z.tanh())[:, 1].sum(), z)
    torch.testing.assert_close(at["inner"], want)
    assert not at["first"].any()


def test_captum_classes_follow_detach() -> None:
    captum = pytest.importorskip("captum.attr")
    import frpc.integrations.captum as adapter

    model, x = made(STOPS["detach"]), inputs()
    for name in ("InputXGradient", "Saliency"):
        want = getattr(captum, name)(model).attribute(x.clone().requires_grad_(), target=1)
        torch.testing.assert_close(getattr(adapter, name)(model).attribute(x, target=1), want)
    want = captum.IntegratedGradients(model).attribute(x, target=1, n_steps=7)
    torch.testing.assert_close(adapter.IntegratedGradients(model).attribute(x, target=1, n_steps=7), want)


# Functions with a backward of their own ---------------------------------------------------------------------------------


class Root(torch.autograd.Function):
    """The root of what is positive; its backward lets everything pass."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return z.clamp(min=0).sqrt()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return g


class Reversed(torch.autograd.Function):
    """The identity with the gradient turned round, in the newer form without a context in forward."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z * 1.0

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return -g


@pytest.mark.parametrize("function", [Root, Reversed])
@pytest.mark.parametrize("method", ["gradient", "guided-backprop"])
def test_a_backward_of_its_own_is_refused_by_name(function: type[torch.autograd.Function], method: str) -> None:
    model, x = made(function.apply), inputs()
    for examples in ((x,), None):
        with pytest.raises(UnsupportedOpError, match=f"{function.__name__} has a backward of its own") as raised:
            frpc.compile(model, examples, method=method)(x, target=1)
        gap = raised.value.gaps[0]
        assert gap.where.startswith("test_gradient_semantics.py:") and gap.source
        assert "write it in plain operators" in str(raised.value) and "register a rule" not in str(raised.value)


def test_examine_names_the_function() -> None:
    found = frpc.examine(made(Root.apply), (inputs(),), rule=frpc.rules.Gradient())
    assert not found.ok
    assert any("Root has a backward" in row.fix or "plain operators" in row.fix for row in found.rows if not row.rule)
    assert frpc.examine(made(Root.apply), (inputs(),)).ok


def test_values_of_such_a_function_are_explained() -> None:
    model, x = made(Root.apply), inputs()
    found = frpc.compile(model, (x,))(x, target=1)
    torch.testing.assert_close(found.relevance.sum(1), model(x)[:, 1])


def test_such_a_function_of_constants_is_no_matter() -> None:
    class Weighted(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * Root.apply(self.inner.weight.sum(1) ** 2))

    torch.manual_seed(0)
    model, x = Weighted(lambda h: h).double().eval(), inputs()
    got = frpc.compile(model, (x,), method="gradient")(x, target=1).relevance
    torch.testing.assert_close(got, autograd(model, x))


def written_without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
    return h


def written_through_detach(h: Tensor) -> Tensor:
    other = h.detach()
    other += 1
    return h


def written_behind_detach(h: Tensor) -> Tensor:
    h = h * 1
    before = h.detach()
    h[:, 0] = 0
    return h * before


def test_writing_in_place_where_autograd_does_not_look_is_refused() -> None:
    x = inputs()
    with pytest.raises(UnsupportedOpError, match="written in place under"):
        frpc.compile(made(written_without_gradients), (x,), method="gradient")
    for function in (written_through_detach, written_behind_detach):
        with pytest.raises(CaptureError, match="writes in place into a value that was detached"):
            frpc.compile(made(function), (x,), method="gradient")
    model = made(written_without_gradients)
    torch.testing.assert_close(frpc.compile(model, (x,))(x, target=1).relevance.sum(1), model(x)[:, 1])


# Derivatives without a value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENTS)
def test_an_infinite_derivative_names_its_operator(method: str) -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.sqrt())

    model, x = Rooted().double().eval(), inputs().abs()
    explainer = frpc.compile(model, (x,), method=method)
    assert torch.isfinite(explainer(x, target=1).relevance).all()
    x[1, 2] = 0
    with pytest.raises(NonFiniteError, match=r"derivative of aten.sqrt.default is infinite(.|\n)*test_gradient_semantics.py:\d+"):
        explainer(x, target=1)
    with pytest.raises(NonFiniteError, match=r"aten\.sqrt\.default"):
        frpc.compile(model, method=method)(x, target=torch.tensor([[0, 1]] * 3))
    assert torch.isfinite(frpc.compile(model)(x, target=1).relevance).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x).sqrt(),
        lambda x: x * torch.relu(x).std(1, keepdim=True),
        lambda x: x * torch.linalg.vector_norm(torch.relu(x), dim=1, keepdim=True),
    ],
)
def test_where_autograd_is_finite_so_are_gradients_and_increments(function: Callable[[Tensor], Tensor]) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(x))

    torch.manual_seed(0)
    model, x = Only().double().eval(), inputs()
    x[1], x[2, :4] = -x[1].abs() - 1, 0
    x[2, 4] = 1
    want = autograd(model, x)
    assert torch.isfinite(want).all()
    torch.testing.assert_close(frpc.compile(model, (x,), method="gradient")(x, target=1).relevance, want)
    increments = frpc.compile(model, (x,), method="lid-ig")(x, target=1).relevance
    torch.testing.assert_close(increments.sum(1), (model(x) - model(torch.zeros_like(x)))[:, 1])
