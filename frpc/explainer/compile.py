"""`frpc.compile`: a model and what is chosen for it become an explainer."""

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
    """Compiles a model into an explainer: its output and an account of it that sums to the output.

    Args:
        model: any module that ``torch.export`` captures. It is copied in evaluation mode; yours is not touched, and later
            changes to it do not reach the explainer.
        inputs: example inputs, batch first, a mapping of them for models called with keywords; with them everything is
            compiled now. Without, at the first call, and again for inputs of other shapes.
        rule: the rule set (:mod:`frpc.rules`); forward relevance propagation by default.
        method: instead of a rule set, a method by its name in the papers, e.g. ``"sig-lid-ig"``; ``frpc.methods()`` lists them.
        seed: where relevance starts at the output: ``"logit"`` (default), ``"probability"``, ``"contrastive"``, ... or a
            :class:`~frpc.rules.top.Top`.
        source: what relevance is spread over: ``"input"``, or module paths (``"model.embed_tokens"``), whose output is then
            explained. By default all floating-point inputs, and for integer inputs the embeddings they index.
        bias: where the constants' share goes: ``"uniform"`` over all cells (thesis eq. 3.7), ``"receptive_field"``, or
            ``"separate"``, beside the map. Rule sets that follow no constants leave what they absorb beside the map by default.
        strategy: how neurons of inner layers are answered (:meth:`Explainer.layer`, :meth:`Explainer.neurons`) where the
            question does not say: ``"auto"`` by cost, or ``"windows"``, ``"forward"`` or ``"transposed"``. Relevance of the
            input, for one target or K, is always one transposed pass.
        constant: module path patterns (``"layers.*.attn"``) whose results count as constants.
        output: which output to explain, for models that return several: a key, an attribute or a position; ``logits`` by
            default where there are any.
        backend: who runs the program: ``"aten"``, PyTorch's own operators; ``"triton"``, hand-written kernels on CUDA devices;
            ``"inductor"``, ``torch.compile``; ``"auto"`` takes kernels on CUDA and ``aten`` elsewhere
            (:mod:`frpc.optimize.backends.backends`).
        mode: ``"latency"`` makes a call short; ``"throughput"`` is for large batches: a third of the memory on a CPU, no
            recordings to replay on CUDA devices (:class:`frpc.optimize.backends.backends.Backend`).
        dtype: what the model computes in, e.g. ``torch.bfloat16``; inputs stay in the caller's type, and output and maps come
            in it, or in float64 if that is inside. What it costs stands in ``explainer.conservation``.
        verify: ``"first"`` holds every program against the model once, on the example inputs or at its first call: outputs,
            whether samples are treated apart, and whether its account balances (:mod:`frpc.driver.verify`). ``"always"`` does
            so, and checks the account of every call, which comes as ``explanation.conservation``; ``"never"`` runs nothing but
            the program.

    Raises:
        CaptureError: if ``torch.export`` cannot capture the model.
        BatchError: if the model does not treat samples apart, or does not give one result for each sample.
        CompileError: if the program's output is not the model's.
        ConservationError: if maps do not sum to what they explain by more than rounding can explain; names the wrong rule.
        SourceError: if no carried path leads from the sources to the output.
        UnsupportedOpError: if operators have no rule; names all of them.
        TrainingModeError: if the model cannot be evaluated deterministically.
        OptionError: for an unknown method, seed, policy or backend, a method beside a rule set, or a backend that is not
            to be had here.
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
    """Reads which rules are meant, and where relevance starts."""
    if method is None:
        return rule or FRP(), as_top(seed or "logit")
    if rule is not None:
        raise OptionError(f"Give rule= or method=, not both: method={method!r} already chooses a rule set.")
    found = method_named(method)
    return found.rules(), as_top(seed or found.top)


def _names(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (given,) if isinstance(given, str) else None if given is None else tuple(given)
