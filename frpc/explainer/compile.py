"""`frpc.compile`: makes an explainer from a model and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from frpc.driver.pipeline import CompileOptions
from frpc.driver.programs import Programs
from frpc.driver.verify import check_verify
from frpc.emit.bias import check_policy
from frpc.emit.plan import Query, check_strategy
from frpc.errors import OptionError
from frpc.explainer.explainer import Explainer
from frpc.optimize.backends.backends import check_backend
from frpc.rules.sets.methods import method_named
from frpc.rules.sets.ruleset import FRP, RuleSet
from frpc.rules.top import Top, as_top

__all__ = ["compile"]


def compile(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    *,
    rule: RuleSet | None = None,
    method: str | None = None,
    seed: Top | str | None = None,
    source: str | Sequence[str] | None = None,
    bias: str | None = None,
    strategy: str = "auto",
    constant: Sequence[str] = (),
    output: str | int | None = None,
    backend: str = "auto",
    mode: str = "latency",
    dtype: torch.dtype | None = None,
    verify: str = "first",
) -> Explainer:
    """Compiles a model into an explainer, which returns the model's output and a relevance map that sums to it.

    Args:
        model: any module that ``torch.export`` can capture. It is copied in evaluation mode; yours is not changed, and later
            changes to it do not affect the explainer.
        inputs: example inputs, batch first; a mapping for models called with keywords. With them, the program for one target is
            compiled now; without them, at the first call, and again for inputs of other shapes.
        rule: the rule set (:mod:`frpc.rules`); forward relevance propagation by default.
        method: instead of a rule set, the name of a method, e.g. ``"sig-lid-ig"``; ``frpc.methods()`` lists them.
        seed: where relevance starts at the output: ``"logit"`` (default), ``"probability"``, ``"contrastive"``, ... or a
            :class:`~frpc.rules.top.Top`.
        source: what gets the relevance: ``"input"``, or module paths (``"model.embed_tokens"``), whose output is then
            explained. By default all floating-point inputs, and for integer inputs the embeddings they index.
        bias: where the constants' share goes: ``"uniform"`` over all cells (thesis eq. 3.7), ``"receptive_field"``, or
            ``"separate"``, returned separately. Rule sets that do not track constants default to ``"separate"``.
        strategy: how to compute maps of inner neurons (:meth:`Explainer.layer`, :meth:`Explainer.neurons`), unless the
            call says otherwise: ``"auto"`` by cost, or ``"windows"``, ``"forward"`` or ``"transposed"``. Relevance of the
            input, for one target or K, is always one transposed pass.
        constant: module path patterns (``"layers.*.attn"``) whose results are treated as constants.
        output: which output to explain, for models that return several: a key, an attribute or a position; ``logits`` by
            default, if there is one.
        backend: how the program runs: ``"aten"``, PyTorch's own operators; ``"triton"``, hand-written CUDA kernels;
            ``"inductor"``, ``torch.compile``; ``"auto"``, kernels on CUDA and ``aten`` elsewhere
            (:mod:`frpc.optimize.backends.backends`).
        mode: ``"latency"`` is for short calls; ``"throughput"`` is for large batches: a third of the memory on a CPU, no
            recordings to replay on CUDA devices (:class:`frpc.optimize.backends.backends.Backend`).
        dtype: the dtype the model computes in, e.g. ``torch.bfloat16``. Inputs keep their dtype; output and maps have the same
            dtype, or float64 if the model computes in float64. ``explainer.conservation`` has the resulting error.
        verify: ``"first"`` compares every program with the model once, on the example inputs or at its first call: outputs,
            independence of samples, and conservation (:mod:`frpc.driver.verify`). ``"always"`` also checks conservation at
            every call and returns the error as ``explanation.conservation``. ``"never"`` runs nothing but
            the program.

    Raises:
        CaptureError: if ``torch.export`` cannot capture the model.
        BatchError: if one sample affects the result of another, or the model does not return one result per sample.
        CompileError: if the program's output differs from the model's.
        ConservationError: if maps do not add up to the explained number, beyond rounding; names the wrong rule.
        SourceError: if no path carries relevance from the sources to the output.
        UnsupportedOpError: if operators have no rule; names all of them.
        TrainingModeError: if the model cannot be evaluated deterministically.
        OptionError: for an unknown method, seed, policy or backend, for both a method and a rule set, or for a backend that is
            not available.
    """
    rules, top = _rules_of(rule, method, seed)
    policy = check_policy(bias or ("uniform" if rules.account.constants else "separate"))
    if policy == "receptive_field" and not rules.account.constants:
        raise OptionError(f'bias="receptive_field": {rules.name} does not track constants, so there is nothing to distribute.')
    query = Query(bias=policy, top=top)
    options = CompileOptions(
        rules, _names(constant) or (), _names(source), output, check_backend(backend, mode), check_strategy(strategy)
    )
    explainer = Explainer(Programs(model, options, query, dtype, check_verify(verify)))
    if inputs is None:
        return explainer
    if isinstance(inputs, Mapping):
        return explainer.compile_for(**inputs)
    return explainer.compile_for(*([inputs] if isinstance(inputs, Tensor) else inputs))


def _rules_of(rule: RuleSet | None, method: str | None, seed: Top | str | None) -> tuple[RuleSet, Top]:
    """Returns the rule set, and where relevance starts."""
    if method is None:
        return rule or FRP(), as_top(seed or "logit")
    if rule is not None:
        raise OptionError(f"Give rule= or method=, not both: method={method!r} already chooses a rule set.")
    found = method_named(method)
    return found.rules(), as_top(seed or found.top)


def _names(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (given,) if isinstance(given, str) else None if given is None else tuple(given)
