"""From a text to its explanation: tokenize, compile if needed, choose the targets, compute the relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frpc.driver.explanation import Explanation
from frpc.errors import InputError
from frpc.explainer.compile import compile
from frpc.explainer.explainer import Explainer
from frpc.text.questions import Question, Wanted, questions, seed_of
from frpc.text.record import TextExplanation, of
from frpc.text.tokens import Reading, encode, listed

__all__ = ["explain"]

Inputs = dict[str, Tensor] | tuple[Tensor]


def explain(
    model: nn.Module,
    tokenizer: Any = None,
    text: str | Sequence[str] | None = None,
    *,
    target: Wanted | list[Wanted] = "auto",
    ids: Tensor | None = None,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    special: bool = True,
    added: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Explains a text classifier or a language model, token by token: ``sum of tokens (+ constants) == output``.

    Give ``tokenizer`` and ``text`` for a model of the transformers library, or ``ids`` and ``tokens`` for any model that takes
    one tensor of token numbers.

    Args:
        model: an explainer, or a model, which is then compiled for these inputs. A transformers model is compiled without
            its cache of keys and values.
        tokenizer: of the transformers library; pairs of texts are not supported.
        text: one, or several, which become one batch, padded at the end.
        target: "auto" or None for the strongest class, or for the likeliest next token after the text's last one; a class
            or token by number or name; ``(t, v)`` for entry v at position t of an output ``[B, T, V]``. A list asks for
            several, from one forward pass.
        ids: ``[T]`` or ``[B, T]``.
        tokens: the strings of ``ids``, a list for each sample (one list for one sample).
        labels: names of the outputs; by default those of the model's configuration.
        max_length: maximum number of tokens; by default what tokenizer and model allow. Longer texts are cut, with a remark.
        special: whether tokens that the tokenizer added are shown.
        added: with ``tokens``: which strings the tokenizer added, e.g. ``["[CLS]", "[SEP]"]``.
        options: for :func:`frpc.compile`, where a model is given.

    Returns:
        One :class:`TextExplanation` for each text, in a list if several came; for a list of targets, a list of them for each.

    Raises:
        InputError: nothing to explain, or texts and tokens mixed.
        TargetError: a target that the model does not have.

    Exact when: always, to rounding; see ``TextExplanation.error``.
    """
    inputs, readings, single = _read(model, tokenizer, text, ids, tokens, max_length, added)
    inputs = _moved(inputs, model)
    explainer = _compiled(model, inputs, options)
    wanted = target if isinstance(target, list) else [target]
    if not wanted:
        raise InputError("Give at least one target.")
    with torch.no_grad():
        output = explainer.predict(**inputs) if isinstance(inputs, dict) else explainer.predict(*inputs)
        asked = questions(output, readings, wanted, labels or _labels(model, output), tokenizer)
        answer = _answer(explainer, inputs, seed_of(asked, output))
    found = _texts(answer, readings, asked, explainer.bias_policy, special)
    each = found if isinstance(target, list) else [row[0] for row in found]
    return each[0] if single else each


def _texts(
    answer: Explanation, readings: Sequence[Reading], asked: Sequence[Sequence[Question]], policy: str, special: bool
) -> list[list[TextExplanation]]:
    return [
        [
            of(answer, reading, question, sample=sample, column=column, policy=policy, special=special)
            for column, question in enumerate(asked[sample])
        ]
        for sample, reading in enumerate(readings)
    ]


def _read(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str] | None,
    ids: Tensor | None,
    tokens: Sequence[str] | Sequence[Sequence[str]] | None,
    max_length: int | None,
    added: Sequence[str],
) -> tuple[Inputs, list[Reading], bool]:
    """The model's inputs, what they mean, and whether a single text was given."""
    if tokenizer is not None and text is not None and ids is None and tokens is None:
        single = isinstance(text, str)
        limits = [n for n in (max_length, _positions(model)) if n is not None]
        encoded, readings = encode(tokenizer, [text] if isinstance(text, str) else text, min(limits, default=None))
        return encoded, readings, single
    if ids is not None and tokens is not None and text is None and tokenizer is None:
        return _listed(ids, tokens, added)
    raise InputError("Give tokenizer and text, or ids= and tokens=.")


def _listed(
    ids: Tensor, tokens: Sequence[str] | Sequence[Sequence[str]], added: Sequence[str]
) -> tuple[Inputs, list[Reading], bool]:
    single = bool(tokens) and isinstance(tokens[0], str)
    rows: list[Any] = [tokens] if single else list(tokens)
    batch = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if batch.dim() != 2 or [len(row) for row in rows] != [batch.shape[1]] * batch.shape[0]:
        raise InputError(f"ids {list(ids.shape)} and tokens do not match: give one string for each id, as one list per sample.")
    return (batch,), [listed(row, special=added) for row in rows], single


def _positions(model: nn.Module) -> int | None:
    """The number of positions of a transformers model, if its configuration has it."""
    count = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def _labels(model: nn.Module, output: Tensor) -> list[str] | None:
    """The class names in a transformers model's configuration."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if output.dim() != 2 or not names or len(names) != output.shape[1]:
        return None
    return [str(names[index]) for index in range(len(names))]


def _moved(inputs: Inputs, model: nn.Module) -> Inputs:
    """The inputs on the model's device."""
    held = model.model if isinstance(model, Explainer) else model
    device = next((tensor.device for tensor in [*held.parameters(), *held.buffers()]), torch.device("cpu"))
    if isinstance(inputs, dict):
        return {name: x.to(device) for name, x in inputs.items()}
    return (inputs[0].to(device),)


def _compiled(model: nn.Module, inputs: Inputs, options: dict[str, Any]) -> Explainer:
    if isinstance(model, Explainer):
        if options:
            raise InputError(f"{', '.join(options)}: options for compiling, but the explainer is already compiled.")
        return model
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if config is None or not cached:
        return compile(model, inputs, **options)
    config.use_cache = False  # a cache of keys and values would be an unneeded output; frpc keeps a copy of the model
    try:
        return compile(model, inputs, **options)
    finally:
        config.use_cache = cached


def _answer(explainer: Explainer, inputs: Inputs, seed: Tensor) -> Explanation:
    return explainer(**inputs, seed=seed) if isinstance(inputs, dict) else explainer(*inputs, seed=seed)
