"""torchvision's classifiers by name, their classes, and trained weights from safetensors files, never from pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from frpc.errors import ModelNameError, TargetError, WeightsError, nearest
from frpc.integrations.images import Recipe

__all__ = [
    "build_model",
    "class_index",
    "class_names",
    "download_weights",
    "fit_weights",
    "load_weights",
    "read_weights",
    "recipe",
]

PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar"}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save, new and old
CONVERT = (
    'convert it once, where you trust it: python -c "import torch, safetensors.torch as s; '
    "d = torch.load('{name}', weights_only=True); "
    "s.save_file({{k: v.clone() for k, v in d.items()}}, '{stem}.safetensors')\""
)
SHOWN = 12
# torchvision's DenseNet files are older than torch's ban on dots in module names: norm.1.weight is now norm1.weight.
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
# Heads that only training uses: torchvision's files hold them, the models here are built without them.
TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def build_model(name: str) -> nn.Module:
    """An untrained torchvision classifier in eval mode.

    googlenet and inception_v3 come without their auxiliary heads, and with the input transform that torchvision's own
    weights were trained with.

    Raises:
        ModelNameError: torchvision has no classifier of that name.
    """
    import torchvision  # here, because it takes a second to import

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelNameError(f"torchvision has no classifier named {name!r}; {nearest(name, known)}")
    special = {"aux_logits": False, "transform_input": True, "init_weights": False} if name in TRAINING_HEADS else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **special)
    return model.eval()


def recipe(name: str, *, default: bool = False) -> Recipe:
    """The preprocessing torchvision published with a model: that of its DEFAULT weights, or of its first ones."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    return Recipe.of((published.DEFAULT if default else next(iter(published))).transforms())


def class_names(outputs: int) -> list[str]:
    """ImageNet's class names for 1000 outputs, else "class 0", "class 1", ..."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES) if outputs == 1000 else [f"class {index}" for index in range(outputs)]


def class_index(text: str, names: Sequence[str]) -> int:
    """The class that ``text`` means: a number, or a name in any case.

    Raises:
        TargetError: out of range, no such name (with the nearest), or a name that several classes share.
    """
    if re.fullmatch(r"[+-]?\d+", text.strip()):
        if 0 <= (index := int(text)) < len(names):
            return index
        raise TargetError(f"target {index} is out of range: the model has classes 0 to {len(names) - 1}")
    lowered = [name.lower() for name in names]
    found = [index for index, name in enumerate(lowered) if name == text.strip().lower()]
    if not found:
        raise TargetError(f"there is no class named {text!r}; {nearest(text.lower(), lowered)}")
    if len(found) > 1:
        raise TargetError(f"the classes {', '.join(map(str, found))} are all named {text!r}; give the number")
    return found[0]


def load_weights(model: nn.Module, path: str | Path, *, unused: Sequence[str] = ()) -> None:
    """Reads a safetensors file and copies it into the model.

    Raises:
        WeightsError: see :func:`read_weights` and :func:`fit_weights`.
    """
    fit_weights(model, read_weights(path), source=Path(path).name, unused=unused)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: missing, truncated, or a pickle, which could run code and is never opened.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise WeightsError(f"{path} is a folder; give one safetensors file")
        with path.open("rb") as file:
            start = file.read(4)
        if path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
            raise WeightsError(
                f"{path} is a pickle, and opening a pickle can run code; frpc reads only safetensors.\n"
                f"  Fix: {CONVERT.format(name=path.name, stem=path.stem)}"
            )
        return safetensors.torch.load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is truncated: {error}") from error
    except FileNotFoundError as error:
        raise WeightsError(f"no such weights file: {path}") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], *, source: str = "the file", unused: Sequence[str] = ()) -> None:
    """Copies weights into the model's parameters and buffers, all or none.

    Args:
        model: changed in place.
        weights: one tensor for each entry of the model's state dict. ``num_batches_tracked`` may be missing: it
            counts training steps and is never read in eval mode.
        source: names the weights in messages.
        unused: prefixes of entries to leave out.

    Raises:
        WeightsError: entries that are missing, unexpected, of another shape or kind, or not finite; all at once.
    """
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(unused))}
    given = {OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in used.items()}
    # A state dict contains its format version, and torchvision's MNASNet does not accept one without.
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    differing, infinite = [], []
    for name in given.keys() & wanted.keys():
        has, needs = given[name], wanted[name]
        if has.shape != needs.shape or has.is_floating_point() != needs.is_floating_point():
            differing.append(f"{name} (file {_describe(has)}, model {_describe(needs)})")
        elif has.is_floating_point() and not torch.isfinite(has).all():
            infinite.append(name)
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or kind": sorted(differing)}
    problems["with NaN or Inf"] = sorted(infinite)
    if any(problems.values()):
        raise WeightsError(_misfit(source, type(model).__name__, problems, set(wanted)))
    for name, tensor in given.items():
        wanted[name] = tensor
    model.load_state_dict(wanted)


def download_weights(name: str, *, progress: bool = True) -> dict[str, Tensor]:
    """torchvision's DEFAULT weights, from its cache or its server.

    torchvision publishes them as pickles; they are compared with their published hash and read by torch's restricted
    reader (``weights_only``), which builds tensors and runs nothing.

    Raises:
        WeightsError: no network, or a damaged download.
    """
    from torchvision.models import get_model_weights

    published = get_model_weights(name).DEFAULT
    try:
        state: Mapping[str, Any] = published.get_state_dict(progress=progress, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        file = published.url.rsplit("/", 1)[-1]
        raise WeightsError(
            f"cannot get torchvision's weights from {published.url}: {error}\n"
            f"  Fix: download that file on a machine with network access, and {CONVERT.format(name=file, stem=Path(file).stem)}; "
            f"then pass --weights {Path(file).stem}.safetensors"
        ) from error
    return dict(state)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _misfit(source: str, model: str, problems: Mapping[str, Sequence[str]], wanted: set[str]) -> str:
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items() if names)
    lines = [f"{source} does not fit {model}: {counts}."]
    for kind, names in problems.items():
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {kind}: {', '.join(names[:SHOWN])}{more}")
    for prefix in ("module.", "model.", "net.", "backbone."):
        if any(name.removeprefix(prefix) in wanted for name in problems["unexpected"] if name.startswith(prefix)):
            lines.append(f"  Fix: strip the prefix {prefix!r} from the names in the file")
    return "\n".join(lines)
