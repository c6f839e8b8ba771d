"""Programs lowered onto kernels, in the interpreter: what they give beside what their ATen form gives, as JSON.

``TRITON_INTERPRET=1 python tests/kernel_programs.py NAME``.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, fx, nn

import frpc
from frpc import pipeline
from frpc.kernel_lowering import count_launches, use_kernels
from frpc.plan import Query


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


MODELS = {"convolutions": (Convolutions, (3, 11, 9)), "tokens": (Tokens, (7, 16)), "grouped": (Grouped, (4, 6, 5))}

OUTPUTS = {"convolutions": 5, "tokens": 16, "grouped": 4}


def programs(
    name: str, columns: bool, rule: frpc.rules.RuleSet, device: str = "cpu"
) -> tuple[fx.GraphModule, fx.GraphModule, list[str]]:
    """The optimized program, the same one on kernels, and what was refused."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    front = pipeline.front(make().eval().to(device), (torch.randn(2, *shape, device=device),), None)
    compiled = pipeline.compile_query(front, pipeline.Choice(rules=rule), Query(columns=columns))
    plain = next(stage.program for stage in compiled.stages if stage.name == "optimize")
    lowered = pipeline.copy_graph(plain)
    refused = use_kernels(lowered)
    lowered.graph.lint()
    return plain, lowered, [str(r) for r in refused]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().sum() / expected.double().abs().sum())


def main(name: str) -> None:
    rules = {"frp": frpc.rules.FRP(), "epsilon": frpc.rules.LRP(epsilon=1e-6)}
    for rule_name, rule in rules.items() if name == "convolutions" else [("frp", rules["frp"])]:
        for columns in (False, True):
            plain, lowered, refused = programs(name, columns, rule)
            x = torch.randn(3, *MODELS[name][1])
            seed = torch.randn(*([2] if columns else []), 3, OUTPUTS[name])
            with torch.no_grad():
                expected, got = plain(x, seed), lowered(x, seed)
            line = {
                "rule": rule_name,
                "columns": columns,
                "errors": [relative(a, b) for a, b in zip(got, expected, strict=True)],
                "launches": count_launches(lowered),
                "refused": refused,
                "left": [str(n.target) for n in lowered.graph.nodes if n.op == "call_function"],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
