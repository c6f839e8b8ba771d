"""What is tried on a GPU beside the tests: ``python -m bench.gpu.checks NAME FILE [NET]``, one JSON line for each thing tried.

Every check says what it compares with: float64 on the CPU or the GPU, autograd, or the same program run alone. Products are in
full float32 unless a check is about another precision, for PyTorch lets cuDNN's convolutions run in TF32.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frpc
from bench.case import MAP_BOUND
from bench.gpu.compared import ROUNDS, bf16, net
from bench.gpu.streams import graphs
from bench.gpu.trying import Result, attempt, demand, distance, relevance, small_net
from bench.nets import build
from bench.neurons import RESIDUAL_BOUND, UpTo

__all__ = ["CHECKS", "first", "kernels", "main", "maps"]

SMALL = 1e-5  # float32: relative L1 distance of a small net's map from float64's


def first(device: str) -> Iterator[Result]:
    """A small net on each backend and in each mode, beside float64 on the CPU."""
    model, x, target = small_net(), torch.randn(3, 3, 24, 24), torch.tensor([1, 5, 7])
    expected = relevance(frpc.compile(copy.deepcopy(model).double()), x.double(), target)
    for backend in ("aten", "triton", "auto"):
        for mode in ("throughput", "latency"):

            def work(backend: Any = backend, mode: Any = mode) -> Result:
                explainer = frpc.compile(copy.deepcopy(model).to(device), backend=backend, mode=mode)
                error = max(distance(relevance(explainer, x.to(device), target.to(device)), expected) for _ in range(3))
                demand(error, SMALL, "distance from float64")
                return {"error": error, "line": f"{backend}, {mode}: {error:.1e} from float64"}

            yield attempt(f"{backend}, {mode}", work)


def kernels(device: str, batch: int = 16, rounds: int = ROUNDS) -> Iterator[Result]:
    """Every kernel at a few layers; ``python -m bench kernels`` takes all of them."""
    from bench import kernels as suite

    top = suite.ceilings(rounds)
    yield {"what": "ceilings", "status": "passed", **top,
           "line": f"ceilings: {top['flops'] / 1e12:.0f} TFLOP/s in TF32, {top['bytes'] / 1e9:.0f} GB/s"}  # fmt: skip
    chosen = (suite.CONVOLUTIONS[0], suite.CONVOLUTIONS[-1]), suite.POOLS[:1], suite.NORMS[:1], suite.WINDOWS[-1:]
    for task in suite.tasks(batch, device, *chosen):

        def work(task: Any = task) -> Result:
            found = suite.measure(task, rounds, top)
            share = max(found["of_peak_flops"], found["of_peak_bandwidth"])
            faster = found["faster"]["median"]
            return {
                **found,
                "line": f"{task.kernel} {task.precision} at {task.where}: {faster:.2f} x ATen, {share:.0%} of a ceiling",
            }

        yield attempt(f"{task.kernel} {task.precision} at {task.where}", work)


def maps(
    device: str, name: str = "vgg16", layer: str = "features.28", side: int = 224, seconds: float = 25.0
) -> Iterator[Result]:
    """Maps of a layer's neurons: their sums, some beside autograd, and how fast the layer streams."""
    model, x = build(name, side)
    model, x = model.to(device), x.to(device)
    held = frpc.compile(model, bias="separate").layer(layer, x)

    def account() -> Result:
        block = next(iter(held.blocks()))
        residual = float(block.residual().max())
        demand(residual, RESIDUAL_BOUND, "sum of a map less its neuron's value")
        return {"residual": residual, "line": f"{held!r}; worst residual of a block {residual:.1e}"}

    def beside_autograd() -> Result:
        part = UpTo(model, model.get_submodule(layer))
        chance = torch.Generator().manual_seed(0)
        picked = [[int(torch.randint(n, (1,), generator=chance)) for n in held.values.shape[1:]] for _ in range(5)]
        error = max(distance(held[tuple(index)], neuron_map(part, x, index)) for index in picked)
        demand(error, MAP_BOUND, "distance from input times gradient")
        return {"error": error, "line": f"5 neurons: {error:.1e} from input times gradient"}

    def streamed() -> Result:
        neurons, start = 0, time.perf_counter()
        for block in held.blocks():
            neurons += block.values.numel()
            if device == "cuda":
                torch.cuda.synchronize()
            if time.perf_counter() - start > seconds:
                break
        took = time.perf_counter() - start
        return {"neurons": neurons, "seconds": took, "line": f"{neurons:,} of {len(held):,} neurons in {took:.1f} s"}

    yield attempt("account", account)
    yield attempt("beside autograd", beside_autograd)
    yield attempt("streaming", streamed)


def neuron_map(part: nn.Module, x: Tensor, index: Sequence[int]) -> Tensor:
    """Input times gradient of one neuron, summed over the input's channels, ``[H, W]``."""
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(part(leaf)[0][tuple(index)], leaf)
    return (gradient * x)[0].sum(0)


# ---- one of them, in this process -------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., Iterator[Result]]] = {
    "first": first, "graphs": graphs, "net": net, "bf16": bf16, "kernels": kernels, "maps": maps,
}  # fmt: skip


def main(name: str, file: Path, words: Sequence[str], device: str = "cuda") -> None:
    """Runs a check and writes each result as soon as it is there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for result in CHECKS[name](device, *words):
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(result) + "\n")
        print(f"{result['status']}: {result.get('line') or result['what'] + ': ' + result.get('reason', '')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
