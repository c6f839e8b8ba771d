"""The suite ``transformers``: tiny models with random weights of the architectures that are used most.

Text models get token ids and a mask. What is explained is the score of a class, or the next-token scores ``[B, T, V]``. Names
end in ``-eager`` where attention is written out by the library instead of being one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.coverage.subject import SAMPLES, Inputs, Subject, redraw

__all__ = ["build", "names"]

WORDS, STEPS, CLASSES, SIDE = 60, 8, 4, 32
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**WIDE, "vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": False}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 32, "pad_token_id": 0}
SEEN = {**WIDE, "image_size": SIDE, "patch_size": 8}
PAIR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS, "decoder_start_token_id": 0}
ALBERT = {**TEXT, "embedding_size": 16}
DEBERTA = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
SWIN = {"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": WORDS, "use_mambapy": False}
WHISPER = {**PAIR, "vocab_size": WORDS, "num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
CLIP = {**WIDE, "projection_dim": 16}


class _Whisper(nn.Module):
    """Whisper's encoder with the pooling head its audio classifier has, without the classifier's other options."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
        self.score = nn.Linear(config.d_model, CLASSES)

    def forward(self, input_features: Tensor) -> Tensor:
        return self.score(self.encoder(input_features).last_hidden_state.mean(1))


def words(extra: tuple[str, ...] = ("attention_mask",)) -> Inputs:
    """Token ids without padding, a mask of ones, and ids for a decoder where one is there."""
    inputs = {"input_ids": torch.randint(3, WORDS, (SAMPLES, STEPS))}
    for name in extra:
        tokens = torch.randint(3, WORDS, (SAMPLES, STEPS - 2))
        inputs[name] = torch.ones(SAMPLES, STEPS, dtype=torch.int64) if name == "attention_mask" else tokens
    return inputs


def pixels() -> Inputs:
    return {"pixel_values": torch.randn(SAMPLES, 3, SIDE, SIDE)}


def sound() -> Inputs:
    return {"input_features": torch.randn(SAMPLES, 8, 32)}


def ids_alone() -> Inputs:
    return words(())


def both() -> Inputs:
    return words(("attention_mask", "decoder_input_ids"))


Entry = tuple[str, str, dict[str, Any], Callable[[], Inputs], dict[str, str]]
LOGITS, NONE = {"output": "logits"}, dict[str, str]()

ENTRIES: dict[str, Entry] = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT, words, LOGITS),
    "bert-eager": ("BertConfig", "BertForSequenceClassification", TEXT, words, LOGITS),
    "bert-masked-lm": ("BertConfig", "BertForMaskedLM", TEXT, words, LOGITS),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": WORDS}, words, LOGITS),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", TEXT, words, LOGITS),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", ALBERT, words, LOGITS),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", ALBERT, words, LOGITS),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", DEBERTA, words, LOGITS),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, words, LOGITS),
    "gpt2-eager": ("GPT2Config", "GPT2LMHeadModel", GPT, words, LOGITS),
    "gpt2-classifier": ("GPT2Config", "GPT2ForSequenceClassification", GPT, words, LOGITS),
    "opt": ("OPTConfig", "OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}, words, LOGITS),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, words, LOGITS),
    "llama-eager": ("LlamaConfig", "LlamaForCausalLM", GROUPED, words, LOGITS),
    "llama-classifier": ("LlamaConfig", "LlamaForSequenceClassification", GROUPED, words, LOGITS),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, words, LOGITS),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, words, LOGITS),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}, words, LOGITS),
    "phi": ("PhiConfig", "PhiForCausalLM", {**TEXT, "tie_word_embeddings": False}, words, LOGITS),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, both, LOGITS),
    "t5-encoder": ("T5Config", "T5EncoderModel", T5, words, {"output": "last_hidden_state"}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**PAIR, "vocab_size": WORDS}, both, LOGITS),
    "bart-classifier-encoder": ("BartConfig", "BartModel", {**PAIR, "vocab_size": WORDS}, both,
                                {"output": "encoder_last_hidden_state"}),
    "vit": ("ViTConfig", "ViTForImageClassification", SEEN, pixels, LOGITS),
    "vit-eager": ("ViTConfig", "ViTForImageClassification", SEEN, pixels, LOGITS),
    "deit": ("DeiTConfig", "DeiTForImageClassification", SEEN, pixels, LOGITS),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**SEEN, "mlp_ratio": 2}, pixels, LOGITS),
    "swin": ("SwinConfig", "SwinForImageClassification", SWIN, pixels, LOGITS),
    "clip-image": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**CLIP, "image_size": SIDE, "patch_size": 8}, pixels,
                   {"output": "image_embeds"}),
    "clip-text": ("CLIPTextConfig", "CLIPTextModelWithProjection",
                  {**CLIP, "vocab_size": WORDS, "max_position_embeddings": 32, "eos_token_id": 2}, words,
                  {"output": "text_embeds"}),
    "whisper-encoder": ("WhisperConfig", "", WHISPER, sound, NONE),
    "mamba": ("MambaConfig", "MambaForCausalLM", MAMBA, ids_alone, LOGITS),
}  # fmt: skip


def names() -> list[str]:
    return list(ENTRIES)


def build(name: str) -> Subject:
    config_class, model_class, sizes, inputs, options = ENTRIES[name]
    torch.manual_seed(0)
    written_out = {"attn_implementation": "eager"} if name.endswith("-eager") else {}  # else the library's own choice
    config = getattr(transformers, config_class)(**sizes, num_labels=CLASSES, **written_out)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = getattr(transformers, model_class)(config) if model_class else _Whisper(config)
    return Subject(redraw(model), inputs(), options)
