"""Every kind of net by every kind of method, exported and compared: relative L1 to the explainer at most 1e-5 in float32.

ONNX Runtime and torch.export answer for one target a sample and for several; AOTInductor, which compiles for a minute or more,
for one target of every net, and for every method on one net.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import frpc
from frpc.explainer.explainer import Explainer
from frpc.export import Report, aoti, onnx, open_file, torch_export, verify
from nets import built

pytestmark = [pytest.mark.export, pytest.mark.slow]

METHODS = {
    "frp": frpc.rules.FRP,
    "lrp-epsilon": frpc.rules.LRP,
    "epsilon-plus": frpc.rules.EpsilonPlus,
    "attn-lrp": frpc.rules.AttnLRP,
    "lid": frpc.rules.LID,
    "grad-cam": lambda: frpc.rules.Gradient(times_input=False),
}
SIZES = {
    "resnet18": 64, "resnet50": 64, "vgg16": 64, "alexnet": 64, "squeezenet1_0": 64, "mobilenet_v2": 64, "densenet121": 64,
    "inception_v3": 96, "googlenet": 64, "convnext_tiny": 64,
}  # fmt: skip
CAMS = {
    "resnet18": "layer4", "resnet50": "layer4", "vgg16": "features.29", "alexnet": "features.11", "squeezenet1_0": "features.12",
    "mobilenet_v2": "features.18", "densenet121": "features.denseblock4", "inception_v3": "Mixed_6e", "googlenet": "inception5b",
    "convnext_tiny": "features.7",
}  # fmt: skip
OTHERS = ("vit", "lstm", "bert")


class LastStep(nn.Module):
    """Two LSTM layers and a linear one on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 32, 2, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(x)
        return self.head(steps[:, -1])


def vit() -> tuple[nn.Module, Any]:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128
    )
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero as it is made
    return model.eval(), (torch.randn(1, 3, 32, 32),)


def lstm() -> tuple[nn.Module, Any]:
    return LastStep().eval(), (torch.randn(1, 12, 16),)


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, num_labels=5
    )
    ids = torch.randint(1, 500, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return transformers.BertForSequenceClassification(config).eval(), {"input_ids": ids, "attention_mask": mask}


def explainer_of(net: str, method: str, dtype: torch.dtype = torch.float32) -> tuple[Explainer, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    makers: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"vit": vit, "lstm": lstm, "bert": bert}
    if net in makers:
        model, example = makers[net]()
    else:
        model, example = built(net, dtype), (torch.randn(1, 3, SIZES[net], SIZES[net], dtype=dtype),)
    explainer = frpc.compile(model, example, rule=METHODS[method]())
    return explainer, tuple(example.values()) if isinstance(example, dict) else example


ATTENTION = ("vit", "bert")  # LRP shares out through weights, and has no rule for products of values; AttnLRP has one
CELLS = [
    (net, method)
    for net in (*SIZES, *OTHERS)
    for method in METHODS
    if (method != "grad-cam" or net in CAMS)
    and not (net in ATTENTION and method in ("lrp-epsilon", "epsilon-plus"))
    and (method != "attn-lrp" or net in ATTENTION)
]


ON_EDGES = {(net, "lid") for net in ("resnet50", "vgg16", "mobilenet_v2")}
"""Where every sample lies on an edge in float32: the part of the way on which a ReLU is open, (a+ + r+) / (|a| + |r|), is as
exact as a is against |a| + |r|, and behind fifty layers a itself is off by several roundings. Two float32 programs are as far
apart there as each is from float64, so that is what files are compared with."""


def check(report: Report, explainer: Explainer, net: str, method: str) -> None:
    if (net, method) in ON_EDGES and report.edges == report.samples:
        check_with_float64(Path(report.path), explainer, net, method, len(report.signature.outputs))
    else:
        assert report.error <= 1e-5
    if method == "frp":
        assert report.conservation is not None and report.conservation <= 1e-6
    print(report)


def check_with_float64(path: Path, explainer: Explainer, net: str, method: str, results: int) -> None:
    """The file is at most twice as far from float64 as its explainer is, and 1e-6."""
    exact, _ = explainer_of(net, method, torch.float64)
    run, signature = open_file(path)
    x = torch.randn(8, 3, SIZES[net], SIZES[net], generator=torch.Generator().manual_seed(1))
    target = torch.arange(8)
    if signature.question.targets == "several":
        target = torch.stack([target, target + 1], 1)
    expected = exact(x.double(), target=target)
    given = explainer(x, target=target)
    found = run(x, target)
    assert len(found) == results
    for file, own, true in zip(found, (given.output, given.relevance), (expected.output, expected.relevance), strict=False):
        assert relative_l1(file, true) <= 2 * relative_l1(own, true) + 1e-6


def relative_l1(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).abs().sum() / true.abs().sum())


@pytest.mark.parametrize("targets", ["one", "several"])
@pytest.mark.parametrize(("net", "method"), CELLS)
def test_onnx(net: str, method: str, targets: Any, tmp_path: Path) -> None:
    explainer, example = explainer_of(net, method)
    cam = CAMS[net] if method == "grad-cam" else ""
    onnx(explainer, tmp_path / "a.onnx", example, targets=targets, grad_cam=cam)
    check(verify(tmp_path / "a.onnx", explainer), explainer, net, method)


@pytest.mark.parametrize("targets", ["one", "several"])
@pytest.mark.parametrize(("net", "method"), CELLS)
def test_torch_export(net: str, method: str, targets: Any, tmp_path: Path) -> None:
    explainer, example = explainer_of(net, method)
    cam = CAMS[net] if method == "grad-cam" else ""
    torch_export(explainer, tmp_path / "a.pt2", example, targets=targets, grad_cam=cam)
    check(verify(tmp_path / "a.pt2", explainer), explainer, net, method)


@pytest.mark.parametrize(("net", "method"), sorted(ON_EDGES))
def test_rounding_alone_parts_them(net: str, method: str, tmp_path: Path) -> None:
    """In float64, of which ONNX Runtime has no convolutions, the same program is the same map."""
    explainer, example = explainer_of(net, method, torch.float64)
    torch_export(explainer, tmp_path / "a.pt2", example)
    report = verify(tmp_path / "a.pt2", explainer, bound=1e-10)
    assert report.error <= 1e-10


AOTI_CELLS = [(net, method) for net, method in CELLS if method == "frp" or net in ("squeezenet1_0", "lstm")]


@pytest.mark.parametrize(("net", "method"), AOTI_CELLS)
def test_aoti(net: str, method: str, tmp_path: Path) -> None:
    explainer, example = explainer_of(net, method)
    cam = CAMS[net] if method == "grad-cam" else ""
    aoti(explainer, tmp_path / "a.pt2", example, grad_cam=cam)
    check(verify(tmp_path / "a.pt2", explainer), explainer, net, method)
