"""Programs written for Captum, with one line changed; and Captum itself on the nets for which it is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import built, error, mlp, randn, size
from frpc.integrations.captum import (
    FRP,
    LRP,
    Deconvolution,
    GuidedBackprop,
    InputXGradient,
    Saliency,
)
from places import DATA

TOY = """
{line}

class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.relu, self.lin2 = nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
        with torch.no_grad():
            self.lin1.weight.copy_(torch.arange(-4.0, 5.0).view(3, 3))
            self.lin1.bias.zero_()
            self.lin2.weight.copy_(torch.arange(-3.0, 3.0).view(2, 3))
            self.lin2.bias.fill_(1.0)

    def forward(self, input):
        return self.lin2(self.relu(self.lin1(input)))

model = ToyModel().double().eval()
input, baseline = torch.rand(2, 3, dtype=torch.double), torch.zeros(2, 3, dtype=torch.double)
method = Method(model)
attributions, delta = method.attribute(input, baseline, target=0, return_convergence_delta=True)
result = attributions, delta
"""

TABLE = """
{line}

class Passengers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.sigmoid1 = nn.Linear(12, 12), nn.Sigmoid()
        self.linear2, self.sigmoid2 = nn.Linear(12, 8), nn.Sigmoid()
        self.linear3, self.softmax = nn.Linear(8, 2), nn.Softmax(dim=1)

    def forward(self, x):
        return self.softmax(self.linear3(self.sigmoid2(self.linear2(self.sigmoid1(self.linear1(x))))))

net = Passengers().double()
method = Method(net)
test_input = torch.randn(40, 12, dtype=torch.double).requires_grad_()
attr, delta = method.attribute(test_input, target=1, baselines=0, return_convergence_delta=True)
importances = attr.detach().numpy().mean(axis=0)
assert importances.shape == (12,)
result = attr, delta
"""

SEVERAL = """
{line}

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.relu = nn.ReLU()

    def forward(self, input1, input2, additional, scale=1):
        return self.relu(self.a(input1) + self.b(input2)) * scale + additional

net = Toy().double()
inputs = (torch.randn(5, 3, dtype=torch.double), torch.randn(5, 2, dtype=torch.double))
more = torch.randn(5, 4, dtype=torch.double)
method = Method(net)
attr, delta = method.attribute(inputs, baselines=(0, 0), target=[0, 1, 2, 3, 0], additional_forward_args=(more, 2),
                               return_convergence_delta=True)
result = attr[0], attr[1], delta
"""

PHOTOS = """
{line}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.pool1, self.conv2, self.pool2 = nn.Conv2d(3, 6, 5), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.AvgPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.relu1, self.relu2, self.relu3, self.relu4 = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.pool2(self.relu2(self.conv2(self.pool1(self.relu1(self.conv1(x))))))
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(x.view(-1, 16 * 5 * 5))))))

net = Net().double().eval()
images, labels = photos()
input = images[:1].requires_grad_()

def attribute_image_features(algorithm, input, **kwargs):
    net.zero_grad()
    return algorithm.attribute(input, target=labels[0], **kwargs)

method = Method(net)
attr, delta = attribute_image_features(method, input, baselines=input * 0, return_convergence_delta=True)
picture = np.transpose(attr.squeeze(0).cpu().detach().numpy(), (1, 2, 0))
assert picture.shape == (32, 32, 3)
result = attr, delta
"""

PROGRAMS = {"two layers": TOY, "a table": TABLE, "several inputs": SEVERAL, "photos": PHOTOS}


def photos() -> tuple[Tensor, Tensor]:
    """CIFAR-10 where it is, else noise of its shape."""
    file = DATA / "cifar10" / "cifar10_small_5000_1000.npz"
    if not file.is_file():
        return torch.randn(2, 3, 32, 32, dtype=torch.double), torch.tensor([3, 5])
    with np.load(file) as data:
        images = next(data[name] for name in data.files if data[name].ndim == 4 and len(data[name]) == 1000)[:2]
    images = np.ascontiguousarray(images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images / 127.5 - 1), torch.tensor([3, 5])


def ran(name: str, line: str) -> tuple[Tensor, ...]:
    """Runs a program with that import line."""
    torch.manual_seed(0)
    names: dict[str, object] = {"torch": torch, "nn": nn, "np": np, "photos": photos}
    exec(PROGRAMS[name].format(line=line), names)
    return tuple(t.detach() for t in names["result"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "method"), [*((name, "FRP") for name in PROGRAMS), ("a table", "IntegratedGradients")])
def test_programs_with_one_line_changed(name, method):
    """The last thing that they compute is what the sum misses."""
    *attributions, delta = ran(name, f"from frpc.integrations.captum import {method} as Method")
    bound = 1e-2 if method == "IntegratedGradients" else 1e-12
    assert float((delta.abs() / size(tuple(attributions))).max()) <= bound


# Captum centres what it passes through a softmax, as in "a table"; the way from the reference needs no such correction
PAIRS = [(n, m) for n in PROGRAMS for m in ("DeepLift", "IntegratedGradients") if (n, m) != ("a table", "DeepLift")]
peer = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning")]


class TestPeer:
    """The same programs with Captum's line, and Captum's tools on frpc's objects."""

    pytestmark = peer

    @pytest.mark.parametrize(("name", "method"), PAIRS)
    def test_the_same_numbers(self, name, method):
        pytest.importorskip("captum")
        lines = f"import frpc; Method = frpc.captum.{method}", f"from captum.attr import {method} as Method"
        ours, theirs = (ran(name, line) for line in lines)
        assert all(error(a, b) <= 1e-8 for a, b in zip(ours[:-1], theirs[:-1], strict=True))
        if method == "IntegratedGradients":  # the same quadrature lacks the same; Captum's weights are float32
            assert float((ours[-1] - theirs[-1]).abs().max()) <= 1e-8

    @pytest.mark.parametrize("kind", [InputXGradient, Saliency, GuidedBackprop, Deconvolution])
    def test_the_same_gradients(self, kind):
        attr = pytest.importorskip("captum.attr")
        model, x = built(lambda: mlp(True)), randn(3, 6, seed=3)
        theirs = getattr(attr, kind.__name__)(model).attribute(x.clone().requires_grad_(), target=[0, 1, 1]).detach()
        assert error(kind(model).attribute(x, target=[0, 1, 1]), theirs) <= 1e-12

    def test_the_same_lrp(self):
        attr = pytest.importorskip("captum.attr")
        model, x = built(lambda: mlp(True)), randn(3, 6, seed=3)
        theirs, delta = attr.LRP(model).attribute(x, 1, return_convergence_delta=True)
        ours, own = LRP(model).attribute(x, 1, return_convergence_delta=True)
        assert error(ours, theirs.detach()) <= 1e-6 and float((own - delta).abs().max()) <= 1e-6

    @pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
    def test_noise_tunnel(self, kind):
        attr = pytest.importorskip("captum.attr")
        model, x = built(lambda: mlp(True)), randn(3, 6, seed=3)
        arguments = {"nt_type": kind, "nt_samples": 4, "stdevs": 0.1, "target": 1, "baselines": 0}
        found = []
        for method in (FRP(model), attr.DeepLift(model)):  # LID and the rescale rule are the same here
            torch.manual_seed(0)
            found.append(attr.NoiseTunnel(method).attribute(x, **arguments, return_convergence_delta=True))
        assert error(found[0][0], found[1][0].detach()) <= 1e-8 and found[0][1].shape == (12,)
        assert float(found[0][1].abs().max()) <= 1e-12

    def test_metrics(self):
        metrics = pytest.importorskip("captum.metrics")
        model, x = built(lambda: mlp(True)), randn(3, 6, seed=3)
        method = FRP(model)
        assert metrics.sensitivity_max(method.attribute, x, target=1).shape == (3,)
        found = metrics.infidelity(model, lambda x: (0.01 * torch.ones_like(x),) * 2, x, method.attribute(x, 0, 1), target=1)
        assert found.shape == (3,) and bool(torch.isfinite(found).all())


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"trained weights and photos are not at {DATA}")
def test_a_photo_by_a_trained_network():
    """SqueezeNet in float32, as Captum's tutorial on ResNet has it: the predicted class against a black picture."""
    from frpc.integrations.images import prepare
    from frpc.integrations.torchvision import build_model, load_weights

    model = build_model("squeezenet1_0")
    load_weights(model, DATA / "weights" / "squeezenet1_0_imagenet.safetensors")
    x = prepare(DATA / "images" / "zebra.jpg").pixels
    predicted = model(x).argmax(1)
    found, delta = FRP(model).attribute(x, baselines=x * 0, target=predicted, return_convergence_delta=True)
    assert float(delta.abs() / found.abs().sum()) <= 1e-6
