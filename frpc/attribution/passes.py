"""Many passes about one question: variants of the samples, in batches that fit the memory limit, with a progress bar.

Perturbation methods ask for forward passes, averages of gradients for transposed ones. Variants and samples form one long list;
what comes back does not depend on how it is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from frpc.core.sizes import human_bytes
from frpc.driver.running import peak_bytes
from frpc.driver.targets import Target
from frpc.errors import InputError, MemoryLimitError, OptionError
from frpc.explainer.compile import compile
from frpc.explainer.explainer import Explainer
from frpc.rules import Gradient
from frpc.rules.references import Reference, ReferenceLike, as_reference
from frpc.rules.top import Logit, SoftmaxTaylor, Top

__all__ = ["MEMORY_LIMIT", "Asked", "Score", "ask", "start_of"]

Score = Literal["logit", "probability"]
Make = Callable[[Tensor, Tensor], Tensor]
MEMORY_LIMIT = 4 * 10**9
_TOPS: dict[Score, Top] = {"logit": Logit(), "probability": SoftmaxTaylor()}  # multipliers are the gradients of these numbers


@dataclass(frozen=True, eq=False)
class Asked:
    """One number of the output for each sample, or K, ready to be asked of many variants of the samples.

    Attributes:
        explainer: answers.
        x: the samples, ``[B, ...]``.
        functional: ``[B, *O]``, or ``[B, K, *O]`` with columns.
        columns: whether there are K numbers a sample.
        of: whether they are scores or probabilities.
    """

    explainer: Explainer
    x: Tensor
    functional: Tensor
    columns: bool
    of: Score

    def score(self, output: Tensor, samples: Tensor) -> Tensor:
        """The numbers of variants ``[n, *O]`` of ``samples``: ``[n]`` or ``[n, K]``."""
        if self.of == "probability":
            output = torch.softmax(output, 1 + _classes(output.dim() - 1))
        chosen = self.functional[samples] * (output.unsqueeze(1) if self.columns else output)
        return chosen.flatten(2 if self.columns else 1).sum(-1) if chosen.dim() > 1 + self.columns else chosen

    def pulled(self, variants: Tensor, samples: Tensor) -> Tensor:
        """One transposed pass: ``[n, ...]`` like the input or ``[n, K, ...]``."""
        relevance = self.explainer(variants, seed=self.functional[samples]).relevance
        assert isinstance(relevance, Tensor)
        return relevance

    def batches(self, count: int, size: int, title: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        """Which variant of which sample runs when, for ``count`` variants of each; a title asks for a progress bar."""
        samples, device = len(self.x), self.x.device
        starts: Any = range(0, count * samples, size)
        if title:
            from rich.progress import track

            starts = track(starts, title, transient=True)
        for start in starts:
            flat = torch.arange(start, min(start + size, count * samples), device=device)
            yield flat // samples, flat % samples

    def scores(self, count: int, make: Make, size: int, title: str = "") -> Tensor:
        """Forward passes: the numbers of ``make(variants, samples)``, ``[B, count]`` or ``[B, K, count]``."""
        found = [
            self.score(self.explainer.predict(make(variants, samples)), samples)
            for variants, samples in self.batches(count, size, title)
        ]
        return torch.cat(found).unflatten(0, (count, len(self.x))).movedim(0, -1)

    def sums(self, count: int, term: Make, size: int, title: str = "") -> Tensor:
        """Sums ``term(variants, samples)`` over the variants of each sample."""
        total: Tensor | None = None
        for variants, samples in self.batches(count, size, title):
            part = term(variants, samples)
            total = part.new_zeros([len(self.x), *part.shape[1:]]) if total is None else total
            total.index_add_(0, samples, part)
        assert total is not None
        return total

    def batch_size(self, count: int, given: int | None, limit: int, pulls: bool) -> int:
        """How many of ``count`` variants of each sample run at one time.

        Raises:
            OptionError: for a given size below 1.
            MemoryLimitError: if one variant alone does not fit.
        """
        if given is not None and given < 1:
            raise OptionError(f"internal_batch_size={given}: give at least 1.")
        explainer, total = self.explainer, count * len(self.x)
        program = explainer.compiled(self.x).program if pulls else explainer.forward_graph(self.x)
        if not isinstance(_first_batch(program), torch.SymInt):
            return len(self.x)  # captured with its batch fixed, which samples alone have
        if given is not None:
            return min(given, total)
        one = peak_bytes(program) * (self.functional.shape[1] if self.columns else 1)
        if one > limit:
            raise MemoryLimitError(
                f"One sample needs {human_bytes(one)}, but the limit is {human_bytes(limit)}. Raise memory_limit."
            )
        return min(total, limit // max(one, 1))


def ask(
    explainer: Explainer | nn.Module,
    x: Tensor,
    target: Target | None,
    seed: Tensor | None,
    of: Score | None,
    gradients: bool,
) -> Asked:
    """Reads what is asked: an explainer or a model, samples, and a target or a seed.

    Raises:
        OptionError: for an unknown ``of``, or rules that are no gradients where gradients are averaged.
        InputError: for an input that is not a floating-point tensor, or a target that does not fit.
    """
    if of not in (None, *_TOPS):
        raise OptionError(f"of={of!r} is unknown; choose {' or '.join(_TOPS)}.")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x is {kind}; give one floating-point tensor, batch first.")
    if not isinstance(explainer, Explainer):
        explainer = compile(explainer, rule=Gradient(times_input=False), seed=_TOPS[of or "logit"])
    if gradients:
        explainer, of = _gradients(explainer, of)
    functional, columns = explainer.functional_for(x, target=target, seed=seed)
    sizes = functional.shape[2 if columns else 1 :]
    if of == "probability" and (not sizes or sizes[_classes(len(sizes))] < 2):
        raise OptionError('of="probability": the model returns one number, whose softmax is always 1. Use of="logit".')
    return Asked(explainer, x.detach(), functional.movedim(0, 1) if columns else functional, columns, of or "logit")


def _classes(dimensions: int) -> int:
    """Which dimension of one sample's output the classes lie along: ``[C]``, ``[T, C]``, ``[C, H, W]``."""
    return dimensions - 1 if dimensions <= 2 else 0


def _gradients(explainer: Explainer, of: Score | None) -> tuple[Explainer, Score]:
    """An explainer that returns gradients alone, of the score or of the probability, whichever its top stands for."""
    rules, top = explainer.rules, explainer.top
    if not isinstance(rules, Gradient) and rules.account.gives != "multiplier":
        raise OptionError(
            f"{rules.name} gives relevance, but this function averages gradients. Pass the model itself, or compile it with "
            "rule=frpc.rules.Gradient(times_input=False)."
        )
    meant = next((kind for kind, start in _TOPS.items() if start == top), None)
    if of is None and meant is None:
        raise OptionError(f'{type(top).__name__} is not the gradient of a number; use of="logit" or of="probability".')
    chosen = of or meant or "logit"
    if rules.account.gives == "multiplier" and chosen == meant:
        return explainer, chosen
    plain = dataclasses.replace(rules, times_input=False) if isinstance(rules, Gradient) else rules
    return explainer.with_rules(plain, _TOPS[chosen]), chosen


def _first_batch(program: fx.GraphModule) -> Any:
    return program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]


def start_of(x: Tensor, reference: ReferenceLike | Reference) -> Tensor:
    """One reference for every sample: ``[1, ...]``, or ``[B, ...]`` where it is made of the samples.

    Raises:
        OptionError: for several.
        ShapeError: for one that does not look like a sample.
    """
    given = as_reference(reference)
    if given.kind == "blur":
        return given.blur(x)
    found = given.tensors(x.shape[1:], x.dtype, x.device, "x")
    if len(found) > 1:
        raise OptionError(
            f"{len(found)} references given; this function takes one. frpc.repeat.expected_gradients averages over several."
        )
    return found[0]
