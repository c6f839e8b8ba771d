"""Programs lowered onto kernels, in the interpreter: what they give beside what their ATen form gives, as JSON.

``TRITON_INTERPRET=1 python tests/kernel_programs.py NAME ...``.
"""

from __future__ import annotations

import functools
import json
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import frpc
import quick_export
from frpc.driver import pipeline
from frpc.driver.prepare import PreparedModel, prepare
from frpc.emit.plan import Query
from frpc.optimize.triton.lowering import count_launches, operators, use_kernels
from graphs import program, with_examples
from kernel_cases import pattern

aten = torch.ops.aten


class Convolutions(nn.Module):
    """What kernels replace in a convolutional net: ReLUs, max pooling, a residual block, strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.second, self.third = nn.Conv2d(7, 8, 3, padding=1, stride=2), nn.Conv2d(8, 33, 1)
        self.fourth, self.last = nn.Conv2d(33, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn(self.first(x))), 3, 2, 1)
        x = torch.relu(self.second(x))
        x = torch.relu(x + self.fourth(torch.relu(self.third(x))))
        return self.last(x.mean((2, 3)))


class Tokens(nn.Module):
    """A layer norm, a GELU and a SiLU between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 33), nn.Linear(33, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return nn.functional.silu(x).mean(1)


class Grouped(nn.Module):
    """A depthwise convolution, which its kernel declines, and winners that are read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.flat = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.flat(torch.relu(self.deep(torch.relu(self.flat(x)))))).sum((2, 3))


class Signal(nn.Module):
    """One dimension of space: columns of it have as many dimensions as images, and pooling sees it as an image of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(torch.relu(x), 2)
        return self.last(nn.functional.max_pool1d(torch.relu(self.first(x)), 3, 3).flatten(1))


class Shuffled(nn.Module):
    """Views that mix channels with rows lie between a ReLU and the convolution, or the pooling, whose relevance it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.third, self.last = nn.Conv2d(4, 8, 1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).reshape(-1, 16, 2, 6)
        x = torch.relu(self.second(x)).reshape(-1, 4, 4, 6)
        return self.last(torch.relu(self.third(nn.functional.max_pool2d(x, 2))).flatten(1))


class Squares(nn.Module):
    """RMS norms: a module with weights, one without, and one spelled out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bare = nn.RMSNorm(16, eps=1e-5), nn.RMSNorm(33, elementwise_affine=False)
        self.up, self.down, self.gamma = nn.Linear(16, 33), nn.Linear(33, 16), nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.bare(self.up(self.norm(x)))))
        return (self.gamma * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))).mean(1)


class Spelled(nn.Module):
    """Norms in forms that no kernel takes: spelled out with a quotient, of groups, of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.whole = nn.GroupNorm(1, 7), nn.LayerNorm([7, 16])

    def forward(self, x: Tensor) -> Tensor:
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x - x.mean(-1, keepdim=True)
        x = torch.relu(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5))
        return self.whole(self.groups(x)).mean(1)


class Convnext(nn.Module):
    """A block of ConvNeXt between its patches and its narrowing: layer norms over channels, a depthwise convolution, a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.deep, self.narrow = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, 1, 3, groups=8), nn.Conv2d(8, 8, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(8, eps=1e-6) for _ in range(3))
        self.up, self.down, self.last = nn.Linear(8, 33), nn.Linear(33, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.rand(8))

    def normed(self, x: Tensor, at: int) -> Tensor:
        return self.norms[at](x.permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.patches(x), 0).permute(0, 3, 1, 2)
        branch = self.down(nn.functional.gelu(self.up(self.normed(self.deep(x), 1)))) * self.scale
        x = x + branch.permute(0, 3, 1, 2)
        return self.last(self.narrow(self.normed(x, 2).permute(0, 3, 1, 2)).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolutions, whose relevance goes back through convolutions: to a GELU, to a ReLU, to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(3, 8, 3, 2, 1, output_padding=1)
        self.second, self.third = nn.ConvTranspose2d(8, 33, 2, 2), nn.ConvTranspose2d(33, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(nn.functional.gelu(self.first(x))))).mean((2, 3))


class Shut(nn.Module):
    """A net without constants whose ReLUs are shut in both channels at some positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(40, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).flatten(1))


def plain_net() -> nn.Module:
    """Convolutions with batch norm, ReLUs and pooling, one behind the other."""
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(8, 33, 3, padding=1), nn.ReLU(), nn.Conv2d(33, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(48, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (3, 11, 9)),
    "tokens": (Tokens, (7, 16)),
    "grouped": (Grouped, (4, 6, 5)),
    "signal": (Signal, (4, 18)),
    "shuffled": (Shuffled, (8, 4, 6)),
    "squares": (Squares, (7, 16)),
    "spelled": (Spelled, (7, 16)),
    "convnext": (Convnext, (3, 8, 12)),
    "decoder": (Decoder, (3, 3, 4)),
    "plain": (plain_net, (3, 8, 12)),
    "shut": (Shut, (3, 5, 4)),
}
OUTPUTS = dict.fromkeys(MODELS, 5) | {"tokens": 16, "grouped": 4, "squares": 16, "spelled": 16}


def with_weights(model: nn.Module) -> nn.Module:
    """Norms with weights and statistics of their own: at 1 and 0 they would hide what is forgotten."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            for tensor in (*part.parameters(), *(b for b in part.buffers() if b.is_floating_point())):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@functools.cache
def captured(name: str, device: str) -> PreparedModel:
    """A model's graph, captured once for all questions."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return prepare(with_weights(make()).to(device), (torch.randn(2, *shape, device=device),), None)


def programs(
    name: str, columns: bool, rule: frpc.rules.RuleSet, device: str = "cpu"
) -> tuple[fx.GraphModule, fx.GraphModule, list[str]]:
    """The optimized program, the same one on kernels, and what was refused."""
    compiled = pipeline.compile_query(captured(name, device), pipeline.CompileOptions(rules=rule), Query(columns=columns))
    plain = compiled.portable
    lowered = pipeline.copy_graph(plain)
    refused = use_kernels(lowered)
    lowered.graph.lint()
    return plain, lowered, [str(r) for r in refused]


def fused_norm() -> tuple[fx.GraphModule, fx.GraphModule]:
    """What a program for CUDA holds of an RMS norm, where PyTorch has the value in one call."""
    x, v = torch.randn(3, 7, 16), torch.randn(2, 3, 7, 16)

    def build(graph: fx.Graph, constant: Callable[[str, Tensor], fx.Node]) -> list[fx.Node]:
        a, relevance, gamma = graph.placeholder("x"), graph.placeholder("v"), constant("gamma", torch.rand(16) + 0.5)
        fused = graph.call_function(aten._fused_rms_norm.default, (a, [16], gamma, 1e-5))
        square = graph.call_function(aten.mean.dim, (graph.call_function(aten.mul.Tensor, (a, a)), [-1], True))
        scale = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Tensor, (square, 1e-5)),))
        coefficient = graph.call_function(aten.mul.Tensor, (scale, gamma))
        value = graph.call_function(operator.getitem, (fused, 0))
        return [value, graph.call_function(aten.mul.Tensor, (relevance, coefficient))]

    plain = with_examples(program(build), x, v)
    lowered = pipeline.copy_graph(plain)
    assert use_kernels(lowered) == []
    return plain, lowered


def infinite_columns() -> dict[str, Any]:
    """Two columns, the first from infinity. ATen gates one target by choice, columns by a product, which gives NaN."""
    results = {}
    x, seed = torch.randn(3, *MODELS["shut"][1]), torch.randn(2, 3, OUTPUTS["shut"])
    seed[0, :, 0] = float("inf")
    for columns in (False, True):
        plain, lowered, _ = programs("shut", columns, frpc.rules.FRP())
        with torch.no_grad(), np.errstate(invalid="ignore"):
            if columns:
                results["columns"] = lowered(x, seed)[1]
            else:
                results["aten"] = torch.stack([plain(x, s)[1] for s in seed])
                results["kernels"] = torch.stack([lowered(x, s)[1] for s in seed])
    aten_form = results.pop("aten")
    return {
        "model": "infinite",
        "kinds": pattern(aten_form[0]).unique().tolist(),
        "alike": [torch.equal(pattern(r), pattern(aten_form)) for r in results.values()],
        "finite": [relative(r[1], aten_form[1]) for r in results.values()],
    }


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().sum() / expected.double().abs().sum())


def main(name: str) -> None:
    rules = {"frp": frpc.rules.FRP(), "epsilon": frpc.rules.LRP(epsilon=1e-6)}
    for rule_name, rule in rules.items() if name == "convolutions" else [("frp", rules["frp"])]:
        for columns in (False, True):
            plain, lowered, refused = programs(name, columns, rule)
            torch.manual_seed(1)
            x = torch.randn(3, *MODELS[name][1])
            seed = torch.randn(*([2] if columns else []), 3, OUTPUTS[name])
            report({"model": name, "rule": rule_name, "columns": columns, "refused": refused}, plain, lowered, x, seed)


def report(line: dict[str, Any], plain: fx.GraphModule, lowered: fx.GraphModule, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected, got = plain(*inputs), lowered(*inputs)
    calls = [n.target for n in lowered.graph.nodes if n.op == "call_function"]
    line |= {
        "errors": [relative(a, b) for a, b in zip(got, expected, strict=True)],
        "launches": count_launches(lowered),
        "left": [str(target) for target in calls],
        "unlisted": [str(t) for t in calls if getattr(t, "namespace", "") == "frpc_kernels" and t not in operators()],
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quick_export.install()
    for chosen in sys.argv[1:]:
        if chosen == "fused":
            report({"model": "fused"}, *fused_norm(), torch.randn(3, 7, 16), torch.randn(2, 3, 7, 16))
        elif chosen == "infinite":
            print(json.dumps(infinite_columns()), flush=True)
        else:
            main(chosen)
