"""Nets on a GPU: maps beside float64's and autograd's, times beside autograd's and Captum's, and other precisions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import frpc
from bench.case import CAPTUM, EXPLAIN, FORWARD, GRADIENT, OWN, Case, captum_way, gate, prepare_model
from bench.gpu.trying import Result, attempt, demand, distance, relevance
from bench.machine import Spread, interleave, peak_memory
from bench.nets import build, is_piecewise_linear

__all__ = ["bert", "bf16", "compared", "net", "no_worse", "times_gradient"]

ROUNDS = 5
SMOOTH = 1e-3  # float32: relative L1 distance of a transformer's map from float64's
WORSE = 2.0  # a map may be this many times as far from float64 as autograd's is in the same precision


class Bert(nn.Module):
    """BERT's classifier of two classes on embedded tokens ``[B, T, E]``."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        import transformers

        self.bert = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **sizes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.bert(inputs_embeds=x).logits
        return logits


def bert(batch: int, steps: int = 128, **sizes: int) -> tuple[nn.Module, Tensor]:
    from bench.coverage.subject import redraw

    torch.manual_seed(0)
    model = redraw(Bert(**sizes)).requires_grad_(False)
    return model, torch.randn(batch, steps, model.bert.config.hidden_size)


def net(
    device: str, name: str, batches: Sequence[int] = (1, 16), side: int | None = None, rounds: int = ROUNDS
) -> Iterator[Result]:
    """Checks a net's maps, then times them beside autograd's and Captum's."""
    for batch in batches:
        model, x = bert(batch) if name == "bert" else build(name, side, batch)
        yield from compared(f"{name}, batch {batch}", model, x, device, rounds)


def compared(what: str, model: nn.Module, x: Tensor, device: str, rounds: int) -> Iterator[Result]:
    """The gate of every benchmark, the map beside float64's where autograd has no such map, and the times."""
    case: list[Case] = []

    def right() -> Result:
        case.append(prepare_model(what, model, x, device))
        errors = gate(case[0])
        if not is_piecewise_linear(model):
            errors["map"] = distance(relevance(case[0].explainer, case[0].x, case[0].target), exact(case[0]))
            demand(errors["map"], SMOOTH, "distance from float64")
        refused = len(case[0].explainer.refusals)
        said = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        return {"errors": errors, "compile_seconds": case[0].compile_seconds, "refusals": refused, "line": f"{what}: {said}"}

    found = attempt(f"{what}: maps", right)
    yield found
    if found["status"] == "passed":
        yield attempt(f"{what}: time", lambda: priced(case[0], rounds))


def exact(case: Case) -> Tensor:
    """The map in float64, on ATen's operators."""
    twin = frpc.compile(copy.deepcopy(case.model).double(), backend="aten", mode="throughput")
    return relevance(twin, case.x.double(), case.target)


def priced(case: Case, rounds: int) -> Result:
    """Times and memory of every way."""
    ways = {
        FORWARD: case.forward,
        **({} if case.own is None else {OWN: case.own}),
        EXPLAIN: case.explain,
        GRADIENT: case.gradient,
    }
    ways |= captum_way(case)
    times = interleave(ways, rounds, case.name)
    seconds = {name: Spread.of(found).median for name, found in times.items()}
    figures = {name: {"seconds": seconds[name], "peak_bytes": peak_memory(way)} for name, way in ways.items()}
    said = ", ".join(f"{name} {1e3 * value:.3g} ms ({value / seconds[FORWARD]:.2f})" for name, value in seconds.items())
    memory = figures[EXPLAIN]["peak_bytes"] / max(1, figures[GRADIENT]["peak_bytes"])
    without = "" if CAPTUM in ways else "; Captum is not installed"
    return {"ways": figures, "line": f"{case.name}: {said}; {memory:.2f} of autograd's memory{without}"}


def bf16(device: str, name: str = "resnet50", batch: int = 4, side: int | None = None) -> Iterator[Result]:
    """Maps in bfloat16 and with convolutions in TF32, beside float64, as autograd's in the same precision."""
    model, x = build(name, side, batch)
    model, x = model.to(device), x.to(device)
    exactly = model.double()
    x64 = x.double()
    target = exactly(x64).argmax(1)
    true = times_gradient(exactly, x64, target)
    yield attempt("bfloat16", lambda: no_worse(copy.deepcopy(exactly).bfloat16(), x.bfloat16(), target, true))
    torch.backends.cudnn.allow_tf32 = True
    yield attempt("TF32 convolutions", lambda: no_worse(copy.deepcopy(exactly).float(), x, target, true))
    torch.backends.cudnn.allow_tf32 = False
    yield attempt("float32", lambda: no_worse(copy.deepcopy(exactly).float(), x, target, true))


def times_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)
    return gradient * x


def no_worse(model: nn.Module, x: Tensor, target: Tensor, true: Tensor) -> Result:
    """Local maps may be WORSE times as far from input times gradient in float64 as autograd's in the same precision."""
    explainer = frpc.compile(model, bias="separate")
    found = explainer(x, target=target)
    assert isinstance(found.relevance, Tensor)
    ours, theirs = distance(found.relevance, true), distance(times_gradient(model, x, target), true)
    values, logits = found.relevance.double().flatten(1), found.output.double().gather(1, target[:, None])[:, 0]
    off = float(((values.sum(1) + found.bias.double() - logits).abs() / values.abs().sum(1)).max())
    line = f"{x.dtype}: {ours:.1e} from float64, autograd {theirs:.1e}; account off by {off:.1e} of sum|V|"
    demand(ours, WORSE * theirs, f"distance from float64 ({line})")
    return {"ours": ours, "autograd": theirs, "account": off, "line": line}
