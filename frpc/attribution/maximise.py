"""Activation maximisation: an input that excites a channel, a neuron or a class. The one place that uses autograd.

The objective is climbed from noise on the model's captured graph, cut behind the layer: no hooks, and the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from frpc.core.snapshot import snapshot
from frpc.driver.prepare import prepare
from frpc.errors import InputError, LayerNameError, OptionError, ShapeError, TargetError, nearest
from frpc.explainer.explainer import Explainer

__all__ = ["Feature", "feature"]


@dataclass(frozen=True, eq=False)
class Feature:
    """An input that excites what was asked for.

    Attributes:
        image: ``[1, ...]`` like one input.
        activations: of what was asked for, before each step and after the last, ``[steps + 1]``.
    """

    image: Tensor
    activations: Tensor


def feature(
    model: nn.Module,
    layer: str | None = None,
    *,
    channel: int | None = None,
    neuron: Sequence[int] | None = None,
    class_: int | None = None,
    size: Sequence[int] = (3, 224, 224),
    start: Tensor | None = None,
    steps: int = 256,
    rate: float = 0.05,
    l2: float = 1e-4,
    tv: float = 1e-3,
    jitter: int | None = None,
    seed: int = 0,
    bounds: tuple[Tensor | float, Tensor | float] | None = None,
    progress: bool = False,
) -> Feature:
    """``argmax over x of a(x) - l2 |x|^2 - tv sum |grad x|``, by Adam from noise; a is what is to be excited.

    Args:
        model: any module that ``torch.export`` captures, or an explainer of it.
        layer: module path for ``channel`` and ``neuron``.
        channel: a is the mean over the channel's places.
        neuron: a is one neuron ``(c, i, j)``, ``(c,)`` in linear layers.
        class_: a is a class's score at the model's output.
        size: of one input, where there is no ``start``.
        start: where to begin, ``[1, ...]``; by default noise of deviation 0.01.
        steps, rate: of Adam.
        l2, tv: weights of the penalties; sums over elements, and over neighbours along rows and columns.
        jitter: pixels by which pictures are rolled at random in each step, at most; by default a 28th of the shorter
            side (8 of 224), and 0 for a neuron, whose place counts.
        seed: of noise and jitter.
        bounds: lowest and highest input, to be kept in every step: numbers, or tensors that broadcast to a sample.
        progress: show a progress bar.

    Exact when: never; a local maximum. What a ReLU holds at 0 in the beginning has no slope: ask for the layer before it.

    Units: ``image`` is a model's input; undo the preprocessing to see it.

    Raises:
        OptionError: unless just one of channel, neuron and class is given, or for no steps.
        LayerNameError: if no layer has that path.
        TargetError: for a channel, neuron or class that the layer does not have.

    Source: Erhan et al. 2009; Simonyan et al. 2014, section 2 (classes, L2); Mahendran & Vedaldi 2016 (total variation, jitter);
    S 2.1.4, 31.
    """
    index = _asked(layer, channel, neuron, class_)
    if steps < 1:
        raise OptionError(f"steps={steps}: give at least 1.")
    generator = torch.Generator().manual_seed(seed)
    x = _start(model, size, start, generator)
    part = _up_to(model, x, layer)
    _check(part, x, index, layer)
    adam = torch.optim.Adam([x], lr=rate)
    axes = [axis for axis in (2, 3) if axis < x.dim()]
    usual = min(x.shape[axis] for axis in axes) // 28 if axes and neuron is None else 0
    reach = usual if jitter is None else jitter
    activations = []
    for _ in _steps(steps, progress):
        move = torch.randint(-reach, reach + 1, [len(axes)], generator=generator).tolist() if axes else []
        activation = part(x.roll(move, axes) if axes else x)[(0, *index)].mean()
        variation = sum((x.diff(dim=axis).abs().sum() for axis in axes), x.new_zeros([]))
        (slope,) = torch.autograd.grad(l2 * (x**2).sum() + tv * variation - activation, x)
        x.grad = slope
        adam.step()
        with torch.no_grad():
            if bounds is not None:
                low, high = (torch.as_tensor(bound).to(x) for bound in bounds)
                x.copy_(torch.minimum(torch.maximum(x, low), high))
        activations.append(activation.detach())
    x = x.detach()
    activations.append(part(x)[(0, *index)].mean())
    return Feature(x, torch.stack(activations))


def _asked(layer: str | None, channel: int | None, neuron: Sequence[int] | None, class_: int | None) -> tuple[int, ...]:
    """The place in the layer's output, or in the model's."""
    given = {"channel": channel, "neuron": neuron, "class_": class_}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise OptionError(f"Give one of channel=, neuron= and class_= ({' and '.join(names) or 'none'} given).")
    if (layer is None) != (class_ is not None):
        raise OptionError("channel= and neuron= need a layer; class_= is for the model's output and needs none.")
    return tuple(neuron) if neuron is not None else (channel if channel is not None else class_,)  # type: ignore[return-value]


def _start(model: nn.Module, size: Sequence[int], start: Tensor | None, generator: torch.Generator) -> Tensor:
    net = model.model if isinstance(model, Explainer) else model
    like: Any = next(net.parameters(), torch.zeros([]))
    if start is None:
        start = 0.01 * torch.randn([1, *size], generator=generator, dtype=torch.float64)
    elif not start.is_floating_point():
        raise InputError(f"start is {start.dtype}; give a floating-point tensor.")
    elif start.dim() == 0 or start.shape[0] != 1:
        raise ShapeError(f"start has shape {list(start.shape)}; give one input, [1, ...].")
    return start.detach().clone().to(dtype=like.dtype, device=like.device).requires_grad_(True)


def _up_to(model: nn.Module, x: Tensor, layer: str | None) -> fx.GraphModule:
    """The model's graph from the input to a layer's output, its parameters frozen."""
    net = model.model if isinstance(model, Explainer) else snapshot(model)
    whole = prepare(net, (x.detach(),), None, apart=False).captured.graph_module
    if layer is None:
        return whole
    named = {name: node for node in whole.graph.nodes for name in node.meta.get("layers", ())}
    if layer not in named:
        raise LayerNameError(f"{type(net).__name__} has no layer {layer!r}; {nearest(layer, list(named))}.")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is named[layer]:
            break
    graph.output(copies[named[layer]])
    return fx.GraphModule(whole, graph)


def _check(part: fx.GraphModule, x: Tensor, index: tuple[int, ...], layer: str | None) -> None:
    """Raises an error for an index that is not in the output."""
    with torch.no_grad():
        sizes = list(part(x).shape[1:])
    where = layer or "the model's output"
    if len(index) not in (1, len(sizes)):
        raise TargetError(f"{where} has shape {['B', *sizes]}: give a neuron as a tuple of {len(sizes)} ints, not {index}.")
    for place, count in zip(index, sizes, strict=False):
        if not 0 <= place < count:
            raise TargetError(f"{place} is out of range: {where} has shape {['B', *sizes]}, with indices 0 to {count - 1}.")


def _steps(steps: int, progress: bool) -> Any:
    if not progress:
        return range(steps)
    from rich.progress import track

    return track(range(steps), "activation maximisation", transient=True)
