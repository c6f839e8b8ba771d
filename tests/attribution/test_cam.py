"""Class activation maps against their formulas, written out with PyTorch's autograd on the net cut in two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc
from frpc import cam
from frpc.errors import LayerNameError, OptionError, ShapeError, TargetError

TIGHT = 1e-12
X = torch.randn(2, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PAIRS = torch.tensor([[0, 1], [2, 0]])
GRADIENT = frpc.rules.Gradient(times_input=False)


def settled(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def plain() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.Softplus()]
    return settled(*first, nn.Flatten(), nn.Linear(80, 6), nn.ReLU(), nn.Linear(6, 3))


def pooled(*head: nn.Module) -> nn.Sequential:
    return settled(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@pytest.fixture(scope="module")
def explainer() -> frpc.Explainer:
    return frpc.compile(plain(), (X,), rule=GRADIENT)


def cut(model: nn.Sequential, layer: int, target: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of a layer, and their gradient."""
    a = model[: layer + 1](X).detach().requires_grad_(True)
    score = model[layer + 1 :](a).gather(1, target[:, None]).sum()
    return a.detach(), torch.autograd.grad(score, a)[0]


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_grad_cam(explainer: frpc.Explainer, layer: int) -> None:
    a, g = cut(plain(), layer, PAIRS[:, 0])
    alpha = g.mean((2, 3))
    found = cam.grad_cam(explainer, X, str(layer), PAIRS[:, 0])
    assert torch.allclose(found.weights, alpha, rtol=0, atol=TIGHT)
    assert torch.allclose(found.map, F.relu(torch.einsum("bc,bchw->bhw", alpha, a)), rtol=0, atol=TIGHT)
    signed = cam.grad_cam(explainer, X, str(layer), PAIRS[:, 0], rectify=False)
    assert torch.allclose(signed.map, torch.einsum("bc,bchw->bhw", alpha, a), rtol=0, atol=TIGHT)
    assert torch.allclose(found.output, plain()(X).detach(), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("layer", [2, 3, 4])
def test_grad_cam_plus_plus(explainer: frpc.Explainer, layer: int) -> None:
    a, g = cut(plain(), layer, PAIRS[:, 1])
    divisor = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(g > 0, g**2 / divisor, 0)
    weights = (alpha * F.relu(g)).sum((2, 3))
    found = cam.grad_cam_plus_plus(explainer, X, str(layer), PAIRS[:, 1])
    assert torch.allclose(found.weights, weights, rtol=1e-9, atol=TIGHT)
    assert torch.allclose(found.map, F.relu(torch.einsum("bc,bchw->bhw", weights, a)), rtol=1e-9, atol=TIGHT)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_layer_cam(explainer: frpc.Explainer, layer: int) -> None:
    a, g = cut(plain(), layer, PAIRS[:, 0])
    found = cam.layer_cam(explainer, X, str(layer), PAIRS[:, 0])
    assert torch.allclose(found.map, F.relu((F.relu(g) * a).sum(1)), rtol=0, atol=TIGHT)
    assert found.weights is None


def test_grad_cam_plus_plus_where_gradients_vanish() -> None:
    """A class that a channel does not reach gives it no weight, and nothing divides by 0."""
    model = pooled(nn.Linear(5, 3))
    model[4].weight.data[1] = 0
    assert not cam.grad_cam_plus_plus(model, X, "1", 1).map.any()
    model[4].weight.data[1] = 1e-160  # G^3 would underflow
    assert torch.isfinite(cam.grad_cam_plus_plus(model, X, "1", 1).map).all()


def test_cam_is_grad_cam_where_pooling_and_one_linear_layer_follow() -> None:
    model = pooled(nn.Linear(5, 3))
    found = cam.cam(model, X, "1", PAIRS[:, 0])
    a = model[:2](X).detach()
    weights = model[4].weight[PAIRS[:, 0]].detach()
    assert torch.allclose(found.weights, weights, rtol=0, atol=TIGHT)
    assert torch.allclose(found.map, F.relu(torch.einsum("bc,bchw->bhw", weights, a)), rtol=0, atol=TIGHT)
    graded = cam.grad_cam(model, X, "1", PAIRS[:, 0]).map
    assert torch.allclose(found.map, graded * 7 * 6, rtol=0, atol=TIGHT)  # h w = 7 * 6
    signed = cam.cam(model, X, "1", PAIRS[:, 0], rectify=False).map
    scores = model(X).gather(1, PAIRS[:, :1])[:, 0] - model[4].bias[PAIRS[:, 0]]
    assert torch.allclose(signed.mean((1, 2)), scores.detach(), rtol=0, atol=TIGHT)  # y = mean of the map + b


def test_cam_refuses_other_nets(explainer: frpc.Explainer) -> None:
    with pytest.raises(OptionError, match="4 is not followed by global average pooling and one linear layer"):
        cam.cam(explainer, X, "4", 0)
    with pytest.raises(OptionError, match="After 1 the net is not linear: the weights of its channels depend on the input"):
        cam.cam(pooled(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), X, "1", 0)


def test_several_targets(explainer: frpc.Explainer) -> None:
    for method in (cam.grad_cam, cam.grad_cam_plus_plus, cam.layer_cam, cam.score_cam):
        both = method(explainer, X, "4", PAIRS)
        assert both.map.shape == (2, 2, 4, 4) and both.on().shape == (2, 2, 9, 8)
        for column in range(2):
            one = method(explainer, X, "4", PAIRS[:, column])
            assert torch.allclose(both.map[:, column], one.map, rtol=0, atol=TIGHT)
    both = cam.guided_grad_cam(explainer, X, "4", PAIRS)
    assert torch.allclose(both.relevance[:, 1], cam.guided_grad_cam(explainer, X, "4", PAIRS[:, 1]).relevance, rtol=0, atol=TIGHT)
    model = pooled(nn.Linear(5, 3))
    assert torch.allclose(cam.cam(model, X, "1", PAIRS).map[:, 1], cam.cam(model, X, "1", PAIRS[:, 1]).map, rtol=0, atol=TIGHT)


def test_maps_are_resized_bilinearly(explainer: frpc.Explainer) -> None:
    found = cam.grad_cam(explainer, X, "4", 0)
    expected = F.interpolate(found.map[:, None], size=(9, 8), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(found.on(), expected)
    assert found.on((5, 3)).shape == (2, 5, 3)
    output, places = found
    assert output is found.output and places is found.map


def test_guided_grad_cam(explainer: frpc.Explainer) -> None:
    guided = frpc.compile(plain(), (X,), method="guided-backprop")
    found = cam.guided_grad_cam(explainer, X, "4", 2, guided=guided)
    expected = guided(X, target=2).relevance * cam.grad_cam(explainer, X, "4", 2).on()[:, None]
    assert torch.allclose(found.relevance, expected, rtol=0, atol=TIGHT)
    assert torch.allclose(cam.guided_grad_cam(explainer, X, "4", 2).relevance, expected, rtol=0, atol=TIGHT)
    with pytest.raises(OptionError, match=r'guided= was compiled with Gradient; compile it with method="guided-backprop"'):
        cam.guided_grad_cam(explainer, X, "4", 2, guided=explainer)


@pytest.mark.parametrize("of", ["logit", "probability"])
def test_score_cam(explainer: frpc.Explainer, of: str) -> None:
    model = plain()
    a = model[:5](X).detach()
    scores = torch.empty(2, 5, dtype=torch.float64)
    for b in range(2):
        for k in range(5):
            mask = F.interpolate(a[b : b + 1, k : k + 1], size=(9, 8), mode="bilinear", align_corners=False)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            output = model(X[b : b + 1] * mask).detach()
            scores[b, k] = (output.softmax(1) if of == "probability" else output)[0, PAIRS[b, 0]]
    weights = scores.softmax(1)
    for size in (None, 3):
        found = cam.score_cam(explainer, X, "4", PAIRS[:, 0], of=of, internal_batch_size=size)  # type: ignore[arg-type]
        assert torch.allclose(found.weights, weights, rtol=0, atol=TIGHT)
        assert torch.allclose(found.map, F.relu(torch.einsum("bc,bchw->bhw", weights, a)), rtol=0, atol=TIGHT)
    frp = frpc.compile(model, (X,))  # any rules will do: only forward passes are asked for
    same = cam.score_cam(frp, X, "4", PAIRS[:, 0], of=of)  # type: ignore[arg-type]
    assert torch.allclose(same.map, found.map, rtol=0, atol=TIGHT)


def test_layers_without_places_are_refused(explainer: frpc.Explainer) -> None:
    for method in (cam.cam, cam.grad_cam, cam.grad_cam_plus_plus, cam.layer_cam, cam.guided_grad_cam, cam.score_cam):
        with pytest.raises(OptionError) as caught:
            method(explainer, X, "6", 0)
        assert str(caught.value) == "6 gives [B, 6], which is not a spatial map. Layers that return one: 0, 1, 2, 3, 4."
    with pytest.raises(OptionError, match=r"2 gives \[B, 5, 1, 1\], which is not a spatial map. Layers that return one: 0, 1\."):
        cam.grad_cam(pooled(nn.Linear(5, 3)), X, "2", 0)
    with pytest.raises(LayerNameError, match="has no layer 'seven'"):
        cam.grad_cam(explainer, X, "seven", 0)
    with pytest.raises(ShapeError, match=r"x is \[2, 144\]; give pictures \[B, C, H, W\]"):
        cam.grad_cam(explainer, X.flatten(1), "4", 0)
    with pytest.raises(TargetError, match="Give target= or seed="):
        cam.grad_cam(explainer, X, "4")
    with pytest.raises(OptionError, match="FRP gives relevance, but this function averages gradients"):
        cam.grad_cam(frpc.compile(plain(), (X,)), X, "4", 0)


@pytest.mark.peer
def test_captum_agrees(explainer: frpc.Explainer) -> None:
    captum = pytest.importorskip("captum.attr")
    model = plain()
    theirs = captum.LayerGradCam(model, model[3]).attribute(X, target=PAIRS[:, 0], relu_attributions=True)[:, 0]
    assert torch.allclose(cam.grad_cam(explainer, X, "3", PAIRS[:, 0]).map, theirs.detach(), rtol=0, atol=TIGHT)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_captum_agrees_on_guided_backpropagation(explainer: frpc.Explainer) -> None:
    captum = pytest.importorskip("captum.attr")
    model = plain()
    theirs = captum.GuidedBackprop(model).attribute(X.clone().requires_grad_(True), target=PAIRS[:, 0])
    guided = frpc.compile(model, (X,), method="guided-backprop")
    assert torch.allclose(guided(X, target=PAIRS[:, 0]).relevance, theirs.detach(), rtol=0, atol=TIGHT)
    both = captum.GuidedGradCam(model, model[3]).attribute(
        X.clone().requires_grad_(True), target=PAIRS[:, 0], interpolate_mode="bilinear"
    )
    ours = cam.guided_grad_cam(explainer, X, "3", PAIRS[:, 0], guided=guided).relevance
    assert torch.allclose(ours, both.detach(), rtol=0, atol=TIGHT)
