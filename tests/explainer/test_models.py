"""Conservation on whole models: torchvision's, the thesis's, and trained ones on real photographs.

`|sum V - y| / sum|V|` is at most 1e-6 in float32 and 1e-12 in float64, for random targets and inputs. Parameters and
batch statistics are drawn at random, so that no batch norm is an identity and no bias is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import frpc
import nets
from frpc.integrations.images import prepare
from frpc.integrations.torchvision import build_model, class_names, load_weights, recipe
from nets import built, redrawn

BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}

# Sizes at which the whole list runs; inception_v3 needs 75 pixels at least and is made for 299.
FULL = {
    "alexnet": 224, "vgg16": 224, "vgg16_bn": 224, "resnet18": 224, "resnet50": 224, "resnext50_32x4d": 224,
    "wide_resnet50_2": 224, "squeezenet1_0": 224, "squeezenet1_1": 224, "densenet121": 224, "googlenet": 224,
    "inception_v3": 299, "mobilenet_v2": 224, "mnasnet1_0": 224, "shufflenet_v2_x1_0": 224, "regnet_x_400mf": 224,
}  # fmt: skip
SMALL = {"resnet18": 64, "squeezenet1_1": 64, "shufflenet_v2_x1_0": 64, "googlenet": 64}


def check_conservation(model: nn.Module, x: Tensor) -> None:
    """Random targets of random inputs, two of each sample."""
    explainer = frpc.compile(model, (x[:1],))
    with torch.no_grad():
        expected = model(x)
    targets = torch.randint(expected.shape[1], (len(x), 2))
    out = explainer(x, target=targets)
    scale = expected.abs().amax()
    assert bool((out.output - expected).abs().amax() <= 1e3 * torch.finfo(x.dtype).eps * scale)
    assert conservation(out.relevance, out.output.gather(1, targets)) <= BOUNDS[x.dtype]


def conservation(relevance: Tensor, explained: Tensor) -> float:
    """The largest `|sum V - y| / sum|V|`; sums are taken in float64, so that they add no rounding of their own.

    An output that no active neuron reaches is 0 and has a map of zeros: nothing is lost there.
    """
    maps = relevance.double().flatten(explained.dim())
    error = (maps.sum(-1) - explained.double()).abs()
    return float(torch.where(error == 0, 0.0, error / maps.abs().sum(-1)).max())


# torchvision ------------------------------------------------------------------------------------------------------------


# By default the short nets are tried, in one type each: they have the sums and the branches of the long ones.
BY_DEFAULT = {("resnet18", torch.float32), ("squeezenet1_1", torch.float64)}

SMALL_CELLS = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in BY_DEFAULT else [pytest.mark.slow])
    for name in SMALL
    for dtype in BOUNDS
]


@pytest.mark.parametrize(("name", "dtype"), SMALL_CELLS, ids=str)
def test_small_images(name: str, dtype: torch.dtype) -> None:
    model = built(name, dtype)
    check_conservation(model, torch.randn(2, 3, SMALL[name], SMALL[name], dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=["f32", "f64"])
@pytest.mark.parametrize("name", FULL)
def test_full_images(name: str, dtype: torch.dtype) -> None:
    model = built(name, dtype)
    check_conservation(model, torch.randn(2, 3, FULL[name], FULL[name], dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_input_transform(name: str) -> None:
    """As torchvision's own weights of these two want it: each colour channel is scaled and shifted inside the model."""
    torch.manual_seed(0)
    model = redrawn(build_model(name)).double()
    assert model.transform_input
    check_conservation(model, torch.randn(2, 3, 96, 96, dtype=torch.float64))


# The thesis's nets ------------------------------------------------------------------------------------------------------


def shrunk_alexnet() -> nn.Module:
    """T 3.3.1's AlexNet with a sixteenth of its fully connected layers, for the default run."""
    model = nets.ThesisAlexNet()
    model.classifier = nn.Sequential(
        nn.Flatten(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return model


@pytest.mark.parametrize("dtype", BOUNDS, ids=["f32", "f64"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (nets.thesis_mlp, (1, 28, 28)),
        (shrunk_alexnet, (3, 32, 32)),
        pytest.param(nets.ThesisAlexNet, (3, 32, 32), marks=pytest.mark.slow),
    ],
    ids=["mlp", "small alexnet", "alexnet"],
)
def test_thesis_nets(build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_conservation(redrawn(build()).to(dtype), torch.rand(2, *shape, dtype=dtype))


# Trained models on real images ------------------------------------------------------------------------------------------


def test_bull_mastiff() -> None:
    """SqueezeNet on a photo of a dog and a cat: class, logit and map."""
    model = build_model("squeezenet1_0")
    load_weights(model, nets.shared("data/weights/squeezenet1_0_imagenet.safetensors"))
    x = prepare(nets.shared("data/images/dog_and_cat.png"), recipe("squeezenet1_0")).pixels
    explainer = frpc.compile(model, (x,))
    top = int(explainer.predict(x).argmax())
    assert class_names(1000)[top] == "bull mastiff"
    out = explainer(x, target=top)
    logit = float(out.output[0, top])
    assert math.isclose(logit, 22.93, abs_tol=0.05)
    assert conservation(out.relevance, out.output[:, top]) <= 1e-6
    assert math.isclose(float(out.relevance.double().sum()), logit, rel_tol=1e-4)
    report = frpc.check(explainer, x, target=top)
    assert report.error <= 1e-6
    assert max(row.error for row in report.rows) <= 1e-5


@pytest.mark.parametrize(
    ("depth", "dtype"),
    [
        pytest.param(20, torch.float64, id="20 f64", marks=pytest.mark.slow),  # by default against the recursion, in test_thesis
        pytest.param(20, torch.float32, id="20 f32"),
        pytest.param(56, torch.float32, id="56 f32", marks=pytest.mark.slow),
        pytest.param(56, torch.float64, id="56 f64", marks=pytest.mark.slow),
    ],
)
def test_residual_nets_on_cifar(depth: int, dtype: torch.dtype) -> None:
    """The predicted class of test images, and the runner-up."""
    model = nets.cifar_resnet(depth).to(dtype)
    images, labels = nets.cifar10_test(8)
    x = images.to(dtype)
    explainer = frpc.compile(model, (x,))
    top = explainer.predict(x).topk(2).indices
    out = explainer(x, target=top)
    assert conservation(out.relevance, out.output.gather(1, top)) <= BOUNDS[dtype]
    assert int((top[:, 0] == labels).sum()) >= 7


@pytest.mark.slow
def test_mobilenet_on_a_photo() -> None:
    """Trained weights whose batch norm is folded already; ReLU6 saturates."""
    model = build_model("mobilenet_v2")
    load_weights(model, nets.shared("data/weights/mobilenet_v2_imagenet.safetensors"))
    for name in ("zebra.jpg", "elephant.jpg"):
        x = prepare(nets.shared(f"data/images/{name}"), recipe("mobilenet_v2")).pixels
        explainer = frpc.compile(model, (x,))
        top = explainer.predict(x).argmax(1)
        out = explainer(x, target=top)
        assert conservation(out.relevance, out.output.gather(1, top[:, None])[:, 0]) <= 1e-6
        assert name.removesuffix(".jpg") in class_names(1000)[int(top)].lower()
