"""Attention and transformer layers: whole blocks conserve, and an attention map is that of an attention matrix written out.

The attention matrix is a coefficient and the values it weighs carry (method §2): at one input, attention is then an affine
function of its input, so its relevance map is that function's Jacobian times the input, plus the constants' even share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frpc

B, T, E, H = 3, 5, 8, 2
SHAPE = (B, T, E)


class Model(nn.Module):
    """Some code around the parts of a model."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Pair(Model):
    """The same of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(self, x, y)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(function: Callable[..., Tensor], kind: type[Model] = Model, **parts: Any) -> nn.Module:
    """A model in float64 and evaluation mode, none of whose parameters is 0 or 1 throughout."""
    made = kind(function, **parts).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def explained(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of a random functional of the output, after checking that it sums to it; and the functional."""
    with torch.no_grad():
        output = module(*inputs)
    seed = randn(*output.shape, seed=2)
    explanation = frpc.compile(module, inputs)(*inputs, seed=seed)
    torch.testing.assert_close(explanation.output, output, rtol=1e-12, atol=1e-12)
    relevance = explanation.relevance
    maps = relevance if isinstance(relevance, tuple) else (relevance,)
    flat = torch.cat([m.flatten(1) for m in maps], 1)
    assert bool(torch.isfinite(flat).all())
    error = (flat.sum(1) - (seed * output).flatten(1).sum(1)).abs()
    assert bool((error <= 1e-12 * flat.abs().sum(1)).all()), "the map does not sum to the explained output"
    return flat.reshape(len(flat), -1), seed


# Whole layers -----------------------------------------------------------------------------------------------------------


def encoder_layer(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, **options)
    return model(lambda m, x: m.layer(x), layer=layer)


def attend(**options: Any) -> Callable[..., Tensor]:
    return lambda m, x: m.attention(x, x, x, **options)[0]


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.zeros(B, T, dtype=torch.bool)
PADDING[0, 3:] = True
PADDING[1, 1:] = True
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "norm last": encoder_layer,
    "norm first, GELU": lambda: encoder_layer(norm_first=True, activation="gelu"),
    "stack with a causal mask": lambda: model(
        lambda m, x: m.stack(x, mask=m.mask.to(x.dtype).masked_fill(m.mask, -math.inf), is_causal=True),
        stack=nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 1, enable_nested_tensor=False),
        mask=CAUSAL,
    ),
    "with weights": lambda: model(attend(), attention=nn.MultiheadAttention(E, H, batch_first=True)),
    "without weights": lambda: model(attend(need_weights=False), attention=nn.MultiheadAttention(E, H, batch_first=True)),
    "bool mask, with weights": lambda: model(
        lambda m, x: m.attention(x, x, x, attn_mask=m.mask)[0],
        attention=nn.MultiheadAttention(E, H, batch_first=True),
        mask=CAUSAL,
    ),
    "tokens first": lambda: model(
        lambda m, x: m.attention(y := x.transpose(0, 1), y, y, need_weights=False)[0].transpose(0, 1),
        attention=nn.MultiheadAttention(E, H),
    ),
    "bias and zero token": lambda: model(
        attend(), attention=nn.MultiheadAttention(E, H, add_bias_kv=True, add_zero_attn=True, batch_first=True)
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "norm last" else n for n in BLOCKS])
def test_blocks_conserve(name: str) -> None:
    explained(BLOCKS[name](), randn(*SHAPE))


def test_keys_of_another_input() -> None:
    """Cross attention: the values' input takes the relevance, and the queries' none."""
    attention = nn.MultiheadAttention(E, H, bias=False, kdim=6, vdim=6, batch_first=True)
    module = model(lambda m, x, y: m.attention(x, y, y, need_weights=False)[0], Pair, attention=attention)
    flat, _ = explained(module, randn(*SHAPE), randn(B, 4, 6, seed=3))
    assert bool((flat[:, : T * E] == 0).all())


def test_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 16, batch_first=True, norm_first=True)
    module = model(lambda m, x, y: m.layer(x, y, tgt_mask=m.mask, tgt_is_causal=True), Pair, layer=layer, mask=CAUSAL)
    explained(module, randn(*SHAPE), randn(B, 4, E, seed=3))


# The twin: attention matrices written out -------------------------------------------------------------------------------


def attention_matrix(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Row by row: `exp(score)` of the keys the mask leaves, divided by their sum; 0 where it leaves none."""
    weights = torch.zeros(*query.shape[:-1], key.shape[-2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                score = scale * key[b, h] @ query[b, h, t]
                if mask is not None:
                    allowed = mask.expand(*weights.shape)[b, h, t]
                    score = score.masked_fill(~allowed, -math.inf) if mask.dtype is torch.bool else score + allowed
                if bool((score > -math.inf).any()):
                    e = (score - score.max()).exp()
                    weights[b, h, t] = e / e.sum()
    return weights


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


ROWS = torch.ones(T, T, dtype=torch.bool).tril(-1)  # nothing is left for the first token
MASKS: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
    "full": (None, {}),
    "scale": (None, {"scale": 0.3}),
    "causal": (~CAUSAL, {"is_causal": True}),
    "bool mask": (~CAUSAL, {"attn_mask": ~CAUSAL}),
    "bool mask, an empty row": (ROWS, {"attn_mask": ROWS}),
    "added mask": (randn(H, T, T, seed=5), {"attn_mask": randn(H, T, T, seed=5)}),
    "added mask with minus infinity": (
        torch.zeros(T, T, dtype=torch.float64).masked_fill(~ROWS, -math.inf),
        {"attn_mask": torch.zeros(T, T, dtype=torch.float64).masked_fill(~ROWS, -math.inf)},
    ),
    "grouped queries": (None, {"enable_gqa": True}),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_matrix_is_a_coefficient(name: str) -> None:
    """`R = x * J^T seed`, J the Jacobian of `A v` with the attention matrix A held."""
    mask, options = MASKS[name]
    pairs = 1 if "enable_gqa" in options else H
    w = {"q": randn(E, E, seed=6), "k": randn(E, E // H * pairs, seed=7), "v": randn(E, E // H * pairs, seed=8)}

    def attention(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = heads(x @ m.q, H), heads(x @ m.k, pairs), heads(x @ m.v, pairs)
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)

    module, x = model(attention, **w), randn(*SHAPE)
    flat, seed = explained(module, x)
    key, value = (heads(x @ w[n], pairs).repeat_interleave(H // pairs, 1) for n in ("k", "v"))
    matrix = attention_matrix(heads(x @ w["q"], H), key, mask, options.get("scale", (E // H) ** -0.5))
    torch.testing.assert_close((matrix @ value).transpose(1, 2).flatten(2), module(x), rtol=1e-12, atol=1e-12)
    pulled = matrix.transpose(-1, -2) @ heads(seed, H)  # A^T seed, [B, H, T, E / H]
    shared = pulled.unflatten(1, (pairs, H // pairs)).sum(2).transpose(1, 2).flatten(2)
    expected = x * (shared @ w["v"].t())
    assert float((flat - expected.flatten(1)).abs().sum()) <= 1e-12 * float(expected.abs().sum())


# Batches and masks ------------------------------------------------------------------------------------------------------


def test_samples_do_not_see_each_other() -> None:
    """One program for every batch size; a sample's map does not depend on its neighbours."""
    module, x = encoder_layer(norm_first=True), randn(*SHAPE)
    explainer, seed = frpc.compile(module, (x,)), randn(*SHAPE, seed=2)
    together = explainer(x, seed=seed).relevance
    for i in range(B):
        alone = explainer(x[i : i + 1], seed=seed[i : i + 1]).relevance
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "without weights"])
def test_padding(weights: bool) -> None:
    """Padded keys carry nothing, and what a mask leaves out makes no NaN."""
    module = model(
        lambda m, x, padding: m.attention(x, x, x, key_padding_mask=padding, need_weights=weights)[0],
        Pair,
        attention=nn.MultiheadAttention(E, H, bias=False, batch_first=True),
    )
    flat, _ = explained(module, randn(*SHAPE), PADDING)
    assert bool((flat.reshape(SHAPE)[PADDING] == 0).all())
    assert bool((flat.reshape(SHAPE)[~PADDING] != 0).all())


MASKED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "filled": lambda m, x: x.masked_fill(m.mask, -math.inf).softmax(-1),
    "chosen": lambda m, x: torch.where(m.mask, -math.inf, x).softmax(-1),
    "added": lambda m, x: (x + torch.zeros(E, E).double().masked_fill(m.mask, -math.inf)).softmax(-1),
    "far below": lambda m, x: x.masked_fill(m.mask, torch.finfo(x.dtype).min).softmax(-1),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_scores_carried_through_a_softmax(name: str) -> None:
    """Where the softmax itself is explained, scores of minus infinity have no account."""
    mask = torch.ones(E, E, dtype=torch.bool).triu(1)
    flat, _ = explained(model(MASKED[name], mask=mask), randn(B, E, E))
    assert bool((flat != 0).any())
