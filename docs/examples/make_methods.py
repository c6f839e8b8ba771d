"""Writes docs/methods.md: every method by name, from the table in :mod:`frpc.rules.sets.methods`.

Run it after changing a method: ``python docs/examples/make_methods.py``. A test compares the page with :func:`render`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import frpc
from frpc.rules.top import TOPS

__all__ = ["render"]

PAGE = Path(__file__).parents[1] / "methods.md"
HEAD = """\
# Methods

<!-- made by docs/examples/make_methods.py from frpc.methods() and the tables of that script; edit those, then run it again -->

This page lists the methods by name, with what each sums to, what it costs and when to use it. To choose one,
see [which method to start with](index.md#common-questions).

A propagation method is made of three choices: a linear map for each operator (the rule set), where relevance starts at the output
(the *top*), and whether values or increments are explained. frpc compiles every method into the same kind of program. So each of
them can be printed, runs without autograd, takes K targets, and explains inner layers and single neurons.

```python
import torch

import frpc

model = frpc.demo.load_digit_net()
digits, labels = frpc.demo.load_digits()
x = digits.float() / 255

explainer = frpc.compile(model, (x,), method="sig-lid-ig")  # by name, or by its parts:
same = frpc.compile(model, (x,), rule=frpc.rules.LID(reference="zero"), seed="softmax_integrated")
found = explainer(x, target=labels)
assert torch.equal(found.relevance, same(x, target=labels).relevance)

assert explainer(x, target=labels, seed="logit").bias.abs().max() < 1e-4  # exact: the sum is f(x) - f(x_ref)
```

The part of the explained number that the map does not contain is in `bias`: with `frp` the constants' share, if it is kept
separate; with the LRP family what biases and stabilizers absorb; with LID-Taylor what the first-order approximation misses.

![Two classes of one cat photo by five methods](figures/methods.png)

SqueezeNet's two strongest classes for this photo, each explained at four layers whose maps are resized and added
(`frpc.multiscale`), and by Grad-CAM. Methods that start from a logit give nearly the same map for both cats. `sig-lid-ig` starts
from the probability, so evidence for one class is evidence against the other. Each map has its own unit: the line below it says
which value full colour stands for. `frpc explain --compare frp,lid-ig,sig-lid-ig,epsilon-plus,grad-cam` makes such a sheet of
your photos.

## Propagation

*Cost*: **T** is one transposed pass, which costs about as much as a forward pass; **V** is one more forward pass, with other
weights. All methods also need the model's own forward pass. A fixed reference is propagated once, when the program is compiled.

*Direction*: with `both`, the method can also be pushed forward from the input, for many neurons at once; `transposed` methods can
only be pulled back from the output.

*Source*: **L** is the LID paper (Chen et al., Acta Automatica Sinica 50(10), 2024), **S** is a survey (Si et al., Representation
visualization of convolutional neural networks, Acta Automatica Sinica 48(8), 2022), and *thesis* is the thesis that introduced
forward relevance propagation ([mathematics](mathematics.md)). After L and S, a number with a dot is a section, one without is an
equation; numbers of the thesis are equations.

The authors of LRP hold patents on LRP.
"""

RULE_SETS = """\
**Layers with weights**, for the LRP family, are convolutions and matrix products in which one factor consists of
parameters: `linear`, `matmul`, `bmm`, `addmm`, `baddbmm`, `einsum`, with the parameters on either side. Numeric factors (`alpha`)
belong to the weights. `beta C` is the bias, or a separate summand if C comes from the input. If both factors come from the input
(attention), a rule for weights is an error; `attn-lrp` has a rule for products. A rule for the first layer is an error if no
layer with weights reads the input.

**`deeplift-reveal-cancel`** applies to every elementwise activation, with its parameters, that is the only reader of a layer with
weights. Other activations (after a residual sum, or after a layer that something else reads) get the rescale rule;
`explainer.refusals` lists them. For a quadratic function, such as the inner part of `Hardswish`, both rules agree.

**Ties.** If elements are equal, gradients are those of PyTorch: `amax` and `maximum` share evenly, `max` along a dimension and
max pools give everything to the first. Forward relevance propagation and LRP give everything to the first. Increments (LID,
DeepLIFT) share evenly among elements that are equal up to rounding, for example in a max pool over a blank reference, where all
elements of a window are the same number. For this, a reference that is known at compile time is computed in float64 and rounded
once. A blurred reference, and several references, are computed in the model's own dtype when the program runs; there, rounding
errors may choose the winner.

A rule set is an object. You can set its parameters and choose where it is used:

```python
from torch.ops import aten

rules = frpc.rules
mixed = rules.compose(
    {"conv1": rules.Flat(), aten.max_pool2d: rules.WinnerTakesAll()},
    default=rules.compose({"conv*": rules.ZPlus()}, default=rules.LRP(epsilon=1e-6)),
)
explainer = frpc.compile(model, (x,), rule=mixed)
print(explainer.table())  # which rule each node got
```

`frpc.rules` also has `EpsilonGammaBox(low=, high=)`, `ZBox(low=, high=)`, `WSquare()` and `Flat()`, which need bounds or are
meant for the first layer; `Gate()` and `Half()` for products; and `LID(reference=, steps=)`, where `steps=None` is the exact
average over the path from the reference and `steps=10` is the average over 10 points that the paper uses.

## Gradients, and where autograd stops

Some methods use gradients: `gradient`, `gradient-input`, `guided-backprop`, `deconvnet`, `rectified-gradient`, `lrp-taylor`, the
gradients in `frpc.repeat`, `frpc.cam` and `frpc.perturb`, and the methods of `frpc.captum` that are named after gradients. Their
gradients are those of autograd:

- No gradient goes through `x.detach()`, `x.data` or what is computed under `torch.no_grad()`. A straight-through estimator,
  `x + (q(x) - x).detach()`, has the gradient of `x`. An inner layer after a `detach` has a gradient, as in Captum.
- A `torch.autograd.Function` defines its own backward, which `torch.export` does not record. If the gradient would go through
  one, compiling raises `UnsupportedOpError`, which names the function and its line.
- A derivative that is infinite or undefined (`sqrt` at 0) raises `NonFiniteError`, which names the operator and its line. No map
  contains NaN.

All other rule sets (FRP, LID, DeepLIFT, the LRP family) explain values. `detach` does not change a value, so for them it is a
copy; for an `autograd.Function` they explain the forward. """

TOPS_HEAD = """\
## Where relevance starts

`seed=` chooses the start, when compiling or when calling. `w` is 1 at the target and 0 elsewhere. For methods that explain
increments, replace `z` by `dz`.
"""

OTHERS_HEAD = """\
## Built on the compiled programs

These methods use several transposed passes, an activation map, or forward passes only. `n` is a number you choose, `C` the number
of channels.
"""

OTHERS: tuple[Sequence[str], ...] = (
    ("`frpc.repeat.integrated_gradients`", "(x - x_ref) mean of dy/dx on the path", "Sundararajan 2017", "n (T + V)",
     "f(x) - f(x_ref), as n grows", "what changed since a reference, by gradients; satisfies the authors' axioms"),
    ("`frpc.repeat.smoothgrad`", "mean of dy/dx at noisy copies", "Smilkov 2017", "n (T + V)", "nothing",
     "gradients with less noise"),
    ("`frpc.repeat.expected_gradients`", "integrated gradients, averaged over references", "Erion 2021", "n (T + V)",
     "f(x) - mean f(x_ref)", "several references at once"),
    ("`frpc.cam.cam`", "sum w_k A_k", "S 28", "T", "the score, times places", "nets that end in global average pooling"),
    ("`frpc.cam.grad_cam`", "ReLU(sum mean(dy/dA_k) A_k)", "S 29, 30", "T", "nothing", "where in the picture, coarsely"),
    ("`frpc.cam.grad_cam_plus_plus`", "the same with weights for each place", "Chattopadhay 2018", "T", "nothing",
     "several objects of one class"),
    ("`frpc.cam.layer_cam`", "ReLU(sum ReLU(dy/dA) A)", "Jiang 2021", "T", "nothing", "finer layers than the last"),
    ("`frpc.cam.guided_grad_cam`", "guided backprop times Grad-CAM", "Selvaraju 2017", "2 T", "nothing",
     "detail, where a class is"),
    ("`frpc.cam.score_cam`", "sum of y(x masked by A_k) A_k", "Wang 2020", "C V", "nothing", "maps without gradients"),
    ("`frpc.multiscale`", "channel sums of several layers, resized and added", "L 3.3", "T", "see its layers",
     "a map with detail that is still easy to read"),
    ("`frpc.perturb.occlusion`", "y(x) - y(x with a patch covered)", "S 2.1.1; Zeiler 2014", "n V", "nothing",
     "what happens if a part is missing"),
    ("`frpc.perturb.rise`", "mean of y(x mask) mask", "Petsiuk 2018; S 2.1.1", "n V", "nothing", "the same, for any model"),
    ("`frpc.perturb.meaningful_perturbation`", "the smallest mask that lowers y", "Fong 2017; S 2.1.1", "n (T + V)", "nothing",
     "the part that is needed"),
    ("`frpc.feature`", "the input that excites a neuron most", "S 2.1.4", "n (T + V)", "nothing", "what a channel looks for"),
    ("`frpc.baselines`", "LIME, KernelSHAP, by Captum", "Ribeiro 2016; Lundberg 2017", "n V", "see the papers", "comparison"),
)  # fmt: skip


def render() -> str:
    """Returns the page."""
    propagation = [(f"`{m.name}`", m.formula, m.source, m.direction, m.conserves, m.cost, m.use) for m in frpc.methods()]
    tops = [(f'`"{name}"`', top.formula, top.source) for name, top in TOPS.items()]
    parts = [
        HEAD,
        table(("method", "formula", "source", "direction", "sums to", "cost", "when to use"), propagation),
        RULE_SETS,
        TOPS_HEAD,
        table(("seed", "relevance of the logits", "source"), tops),
        OTHERS_HEAD,
        table(("function", "formula", "source", "cost", "sums to", "when to use"), OTHERS),
    ]
    return "\n".join(parts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
