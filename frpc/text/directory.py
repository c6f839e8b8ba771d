"""A folder with a transformers model: configuration, tokenizer, and weights that are never pickles.

Nothing is fetched and no code in the folder runs: only architectures that the installed library itself has, only safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frpc.errors import DeviceError, ModelNameError, WeightsError, require

__all__ = ["TextModel", "library", "load"]

CONVERT = (
    'convert it once, where you trust it: python -c "from transformers import AutoModelFor{kind} as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}', safe_serialization=True)\""
)
KINDS = {"ForSequenceClassification": "SequenceClassification", "ForCausalLM": "CausalLM", "LMHeadModel": "CausalLM"}
CLOSED = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class TextModel:
    """A model in eval mode with its tokenizer.

    Attributes:
        name: the folder's name.
        architecture: the class, e.g. ``BertForSequenceClassification``.
        model: the model.
        tokenizer: its tokenizer.
    """

    name: str
    architecture: str
    model: nn.Module
    tokenizer: Any


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TextModel:
    """Loads a sequence classifier or a causal language model.

    Raises:
        PackageError: transformers is not installed.
        WeightsError: no such folder, no configuration, no tokenizer, no safetensors file, or one that does not fit.
        ModelNameError: an architecture that is neither, or that only code in the folder defines.
        DeviceError: no such device.
    """
    folder = Path(folder)
    config = _config(folder)
    architecture, kind = _architecture(config, folder)
    _check_weights(folder, kind)
    place = _device(device)
    installed = library()
    _check_known(installed, config, architecture)
    try:
        tokenizer = installed.AutoTokenizer.from_pretrained(folder, **CLOSED)
        _check_tokenizer(tokenizer, folder)
        loader = getattr(installed, f"AutoModelFor{kind}")
        model, report = loader.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **CLOSED)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise WeightsError(f"transformers cannot load {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise WeightsError(f"{folder} does not contain all weights of {architecture}; missing: {shown}")
    if model.config.pad_token_id is None:  # classifiers on decoders look for the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return TextModel(folder.resolve().name, architecture, model.to(device=place, dtype=dtype).eval(), tokenizer)


def library() -> Any:
    """The transformers package.

    Raises:
        PackageError: it is not installed.
    """
    return require("transformers", "text", "Loading a model of the transformers library")


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise WeightsError(
            f"{folder} {what}; give a folder with config.json, tokenizer files and model.safetensors. "
            "frpc downloads nothing: download the model first, e.g. with `hf download NAME --local-dir FOLDER`."
        )
    try:
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder} has no config.json, so it is not a transformers model") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(read, dict):
        raise WeightsError(f"{folder / 'config.json'} is not a model configuration")
    return read


def _architecture(config: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The class in the configuration, and which of the library's loaders makes it."""
    named = config.get("architectures") or []
    for architecture in named:
        for ending, kind in KINDS.items():
            if str(architecture).endswith(ending):
                return str(architecture), kind
    raise ModelNameError(
        f"{folder} contains {', '.join(map(str, named)) or 'no named architecture'}; texts can be explained for sequence "
        "classifiers (...ForSequenceClassification) and causal language models (...ForCausalLM, ...LMHeadModel)."
    )


def _check_weights(folder: Path, kind: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not pickles:
        raise WeightsError(f"{folder} contains no safetensors file")
    raise WeightsError(
        f"{folder} contains no safetensors file, only {', '.join(pickles)}, a pickle; opening a pickle can run code.\n"
        f"  Fix: {CONVERT.format(kind=kind, folder=folder)}"
    )


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises an error for an empty tokenizer: without its files the library makes one without any words."""
    files = sorted({name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)})
    if files and not any((folder / name).is_file() for name in files):
        raise WeightsError(
            f"{folder} contains no tokenizer: none of {', '.join(files)} exists. Without one every word is unknown.\n"
            "  Fix: copy the tokenizer files of the model into the folder, or write them:  "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )
    if files and tokenizer.vocab_size <= len(set(tokenizer.all_special_ids)):
        raise WeightsError(f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but no words.")


def _check_known(transformers: Any, config: dict[str, Any], architecture: str) -> None:
    """Raises an error for models that only code in the folder defines."""
    if not hasattr(transformers, architecture):
        own = "; its code in the folder (auto_map) is not run" if "auto_map" in config else ""
        raise ModelNameError(f"transformers {transformers.__version__} has no {architecture}{own}.")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"the device {name!r} is not available:  {str(error).splitlines()[0]}") from error
    return device
