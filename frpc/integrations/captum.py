"""Captum's calling convention: ``from frpc.integrations.captum import FRP`` in place of ``from captum.attr import
IntegratedGradients``.

``FRP(model).attribute(inputs, baselines, target, ...)`` takes and returns the same as Captum's methods. Captum
itself is not needed, and its ``NoiseTunnel`` and metrics accept these objects like its own. The model is copied in
evaluation mode at the first call, and again if its weights have changed since (except by writes through ``.data``, which torch
does not count).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from frpc import rules
from frpc.attribution.repeat import points
from frpc.errors import BatchError, CaptureError, OptionError
from frpc.explainer.compile import compile
from frpc.explainer.explainer import Explainer
from frpc.integrations.arguments import (
    Arranged,
    AttributeCall,
    Baselines,
    Inputs,
    Targets,
    joined,
    live,
    module_of,
    read,
    versions,
    wrapped,
)
from frpc.rules.sets.ruleset import RuleSet

__all__ = [
    "FRP",
    "LID",
    "LRP",
    "Deconvolution",
    "DeepLift",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Propagation",
    "Saliency",
]

_KEPT = 16  # programs: arguments that are compiled in may be others at every call
Result: TypeAlias = Any  # what the inputs were, a tensor or a tuple of them; with return_convergence_delta beside [B]


class Propagation:
    """Base of all methods: a model, and one program for each arrangement of arguments.

    Args:
        forward_func: a module, its ``forward``, or a function of tensors that returns ``[B, ...]``.
        rule: how relevance is distributed.
        increments: how it is distributed if there are baselines; the same by default.
    """

    multiplies_by_inputs = True

    def __init__(self, forward_func: Callable[..., Any], rule: RuleSet, increments: RuleSet | None = None) -> None:
        self.forward_func = forward_func
        self._model = module_of(forward_func)
        self._rules = (rule, increments or rule)
        self._weights: tuple[Any, ...] = ()
        self._explainers: dict[Any, Explainer] = {}

    def has_convergence_delta(self) -> bool:
        """Says whether attributions are to sum to something."""
        return self.multiplies_by_inputs

    def compute_convergence_delta(
        self, attributions: Inputs, start_point: Baselines, end_point: Inputs, target: Targets = None,
        additional_forward_args: Any = None,
    ) -> Tensor:  # fmt: skip
        """``sum R - (f(x) - f(x_ref))`` for each sample, ``[B]``; used by Captum's ``NoiseTunnel``."""
        asked = self._settled(read(end_point, start_point, target, additional_forward_args, True))
        return self._delta(asked, attributions if isinstance(attributions, tuple) else (attributions,))

    def _explainer(self, asked: AttributeCall) -> Explainer:
        """Finds or makes the explainer for arguments arranged like these, of the weights as they are now."""
        weights = versions(self._model)
        if weights != self._weights:
            self._explainers, self._weights = {}, weights
        layout = asked.layout
        if layout not in self._explainers:
            sources = [f"sources.{position}" for position in range(len(asked.inputs))]
            rule = self._rules[bool(asked.references)]
            self._explainers[layout] = compile(Arranged(self._model, asked), rule=rule, source=sources)
            while len(self._explainers) > _KEPT:
                del self._explainers[next(iter(self._explainers))]
        return self._explainers[layout]

    def _settled(self, asked: AttributeCall) -> AttributeCall:
        """The question in a form that a program answers.

        A further tensor with as many rows as there are samples may have none of the samples' own, such as the edges ``[2, E]`` of
        a graph beside two samples. The model then does not treat its rows apart, which capturing it finds out.
        """
        if not any(asked.batched):
            return asked
        held = replace(asked, held=True)
        if held.layout in self._explainers:
            return held
        try:
            self._explainer(asked).compiled(*asked.tensors)
        except (BatchError, CaptureError):
            del self._explainers[asked.layout]
            self._explainer(held).compiled(*held.tensors)
            return held
        return asked

    def _explained(self, asked: AttributeCall, current: bool = False) -> tuple[Tensor, ...]:
        """Explains the function as it is now.

        It may depend on more than weights, on a variable or an attribute that has changed since it was captured. So it is run
        once, and captured again if it gives something else than the program.

        Args:
            asked: the question.
            current: the program is known to be the function as it is.
        """
        explainer = self._explainer(asked)
        found = explainer(*asked.tensors, **_functional(explainer, asked))
        if not current and not explainer.agrees_with(live(self._model, asked), asked.tensors, found.output):
            self._explainers = {}
            explainer = self._explainer(asked)  # whose first call holds it against the function
            found = explainer(*asked.tensors, **_functional(explainer, asked))
        return found.relevance if isinstance(found.relevance, tuple) else (found.relevance,)

    def _delta(self, asked: AttributeCall, attributions: Sequence[Tensor]) -> Tensor:
        explainer = self._explainer(asked)
        output = explainer.predict(*asked.tensors)
        if asked.references:
            output = output - explainer.predict(*asked.at_reference().tensors)
        functional = explainer.seed_for(*asked.tensors, **_functional(explainer, asked))
        explained = (functional * output).double().reshape(asked.count, -1).sum(1)
        total = sum((r.double().reshape(asked.count, -1).sum(1) for r in attributions), torch.zeros_like(explained))
        return (total - explained).to(output.dtype)

    def _attribute(self, asked: AttributeCall, like: Inputs, size: int | None, delta: bool) -> Result:
        """Explains the parts of a batch; gives a tuple for a tuple."""
        found = [(self._explained(part), part) for part in self._settled(asked).parts(size)]
        attributions = joined([maps for maps, _ in found])
        result = attributions if isinstance(like, tuple) else attributions[0]
        return (result, torch.cat([self._delta(part, maps) for maps, part in found])) if delta else result


def _functional(explainer: Explainer, asked: AttributeCall) -> dict[str, Any]:
    """The target, or the seed that tuples for each sample stand for."""
    if not isinstance(asked.target, list):
        return {"target": asked.target}
    rows = {index: explainer.seed_for(*asked.tensors, target=index)[:1] for index in set(asked.target)}
    return {"seed": torch.cat([rows[index] for index in asked.target])}


class _FromReference(Propagation):
    """Methods that compare the input with a baseline."""

    @wrapped
    def attribute(
        self, inputs: Inputs, baselines: Baselines = None, target: Targets = None, additional_forward_args: Any = None,
        internal_batch_size: int | None = None, return_convergence_delta: bool = False,
    ) -> Result:  # fmt: skip
        """Shares ``f(x) - f(baseline)`` among the inputs; arguments as for :meth:`FRP.attribute`, baselines zero by default."""
        asked = read(inputs, baselines, target, additional_forward_args, True)
        return self._attribute(asked, inputs, internal_batch_size, return_convergence_delta)


class _OfInput(Propagation):
    """Methods that look at the input alone."""

    @wrapped
    def attribute(self, inputs: Inputs, target: Targets = None, additional_forward_args: Any = None) -> Result:
        """Returns tensors like the inputs; arguments as for :meth:`FRP.attribute`."""
        return self._attribute(read(inputs, None, target, additional_forward_args, False), inputs, None, False)


class FRP(Propagation):
    """Shares the whole output, constants included; with baselines, what changed since them.

    ``FRP(model).attribute(x, target=3)`` sums to ``f(x)[3]``; ``attribute(x, baselines, target=3)`` is :class:`LID` and sums to
    ``f(x)[3] - f(baselines)[3]``.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func, rules.FRP(), rules.LID())

    @wrapped
    def attribute(
        self, inputs: Inputs, baselines: Baselines = None, target: Targets = None, additional_forward_args: Any = None,
        internal_batch_size: int | None = None, return_convergence_delta: bool = False,
    ) -> Result:  # fmt: skip
        """Returns tensors like the inputs that sum to the explained number.

        Args:
            inputs: a tensor or a tuple of them, batch first.
            baselines: what the inputs are compared with: a number, a tensor like one sample or like the batch, or a tuple with
                one for each input. None explains the whole output; unlike ``0``, which leaves out ``f(0)``.
            target: an int or a tuple of ints for all samples; a list of either, or a tensor ``[B]``, with one for each; None for
                models with one output.
            additional_forward_args: passed to the model behind the inputs and not explained. Tensors with a row for each sample
                go with their samples; others (edges of a graph, a mask for all) are compiled into the program.
            internal_batch_size: how many samples run at one time; all by default.
            return_convergence_delta: return ``(attributions, delta)``.

        Shapes: attributions like ``inputs``; ``delta [B]``: ``sum R - (f(x) - f(baseline))``, without baselines ``sum R - f(x)``.

        Exact when: always; ``delta`` is the rounding.

        Raises:
            InputError: for arguments that do not fit; each kind has its own class in :mod:`frpc.errors`.
        """
        asked = read(inputs, baselines, target, additional_forward_args, baselines is not None)
        return self._attribute(asked, inputs, internal_batch_size, return_convergence_delta)


class LID(_FromReference):
    """Layer-wise increment decomposition, exact: sums to ``f(x) - f(baseline)`` at every layer (:class:`frpc.rules.LID`)."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func, rules.LID())


class DeepLift(_FromReference):
    """DeepLIFT with the rescale rule, for functional and reused activations and every operator too."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model, rules.DeepLift())


class InputXGradient(_OfInput):
    """``x dy/dx``."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func, rules.Gradient())

    def has_convergence_delta(self) -> bool:
        """Nothing is conserved."""
        return False


class Saliency(Propagation):
    """``|dy/dx|``; ``abs=False`` keeps the sign."""

    multiplies_by_inputs = False

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func, rules.Gradient(times_input=False))

    @wrapped
    def attribute(self, inputs: Inputs, target: Targets = None, abs: bool = True, additional_forward_args: Any = None) -> Result:
        """Returns tensors like the inputs; arguments as for :meth:`FRP.attribute`."""
        found = self._attribute(read(inputs, None, target, additional_forward_args, False), inputs, None, False)
        if not abs:
            return found
        return tuple(g.abs() for g in found) if isinstance(found, tuple) else found.abs()


class GuidedBackprop(_OfInput):
    """Gradients, of which every ReLU passes only the positive part; functional and reused ReLUs too."""

    multiplies_by_inputs = False

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model, rules.GuidedBackprop())


class Deconvolution(_OfInput):
    """Gradients that are rectified at every ReLU."""

    multiplies_by_inputs = False

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model, rules.Deconvnet())


class LRP(Propagation):
    """Layer-wise relevance propagation, by the epsilon rule unless another rule set is given.

    Raises:
        OptionError: where layers carry Captum's rules in ``layer.rule``, which frpc does not read.
    """

    def __init__(self, model: Callable[..., Any], rule: RuleSet | None = None) -> None:
        super().__init__(model, rule or rules.LRP(1e-9))
        marked = [name for name, part in self._model.named_modules() if getattr(part, "rule", None) is not None]
        if marked:
            raise OptionError(
                f"{', '.join(marked[:5])} carries a rule of Captum's in .rule, which frpc does not read. Give a rule set: "
                "frpc.captum.LRP(model, rule=frpc.rules.EpsilonPlus()); rules by layer: frpc.rules.sets.compose."
            )

    @wrapped
    def attribute(
        self, inputs: Inputs, target: Targets = None, additional_forward_args: Any = None, return_convergence_delta: bool = False
    ) -> Result:
        """Returns tensors like the inputs; arguments as for :meth:`FRP.attribute`; ``delta`` is Captum's, ``f(x) - sum R``."""
        asked = read(inputs, None, target, additional_forward_args, False)
        found = self._attribute(asked, inputs, None, return_convergence_delta)
        return (found[0], -found[1]) if return_convergence_delta else found


class IntegratedGradients(Propagation):
    """``(x - baseline) * mean of df/dx`` on the path between, by a quadrature, as in Captum; :class:`LID` needs no steps.

    Source: Sundararajan et al. 2017.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__(forward_func, rules.Gradient(times_input=False))

    @wrapped
    def attribute(
        self, inputs: Inputs, baselines: Baselines = None, target: Targets = None, additional_forward_args: Any = None,
        n_steps: int = 50, method: str = "gausslegendre", internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Result:  # fmt: skip
        """Returns tensors like the inputs.

        Args:
            inputs, baselines, target, additional_forward_args, internal_batch_size, return_convergence_delta: as for
                :meth:`FRP.attribute`; baselines zero by default.
            n_steps: points on the path; one runs at a time.
            method: a quadrature of :func:`frpc.repeat.integrated_gradients`.
        """
        asked = self._settled(read(inputs, baselines, target, additional_forward_args, True))
        places, weights = points(method, n_steps)
        found = []
        for part in asked.parts(internal_batch_size):
            means = [torch.zeros_like(x) for x in part.inputs]
            for step, (place, weight) in enumerate(zip(places.tolist(), weights.tolist(), strict=True)):
                along = tuple(there + place * (x - there) for x, there in zip(part.inputs, part.references, strict=True))
                gradients = self._explained(replace(part, inputs=along, references=()), current=step > 0)
                means = [mean + weight * gradient for mean, gradient in zip(means, gradients, strict=True)]
            found.append(tuple(m * (x - t) for m, x, t in zip(means, part.inputs, part.references, strict=True)))
        attributions = joined(found)
        result = attributions if isinstance(inputs, tuple) else attributions[0]
        return (result, self._delta(asked, attributions)) if return_convergence_delta else result
