"""Reading a picture safely, and turning it into what an ImageNet model expects."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from frpc.errors import ImageError

if TYPE_CHECKING:
    from torchvision.transforms._presets import ImageClassification

__all__ = ["IMAGENET", "Picture", "Recipe", "prepare", "read_image"]


@dataclass(frozen=True)
class Recipe:
    """How a picture becomes an input: resize the shorter side, cut the centre, subtract the mean, divide by std."""

    resize: int
    crop: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resampling: str = "bilinear"

    @classmethod
    def of(cls, preset: ImageClassification) -> Recipe:
        """The recipe published with torchvision weights, ``weights.transforms()``."""
        return cls(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            mean=(preset.mean[0], preset.mean[1], preset.mean[2]),
            std=(preset.std[0], preset.std[1], preset.std[2]),
            resampling=preset.interpolation.value,
        )


IMAGENET = Recipe(resize=256, crop=224)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the model sees it.

    Attributes:
        path: the file it was read from.
        pixels: float32 ``[1, 3, H, W]``, normalised: the model's input.
        crop: the same region as a PIL image, for display.
    """

    path: Path
    pixels: Tensor
    crop: Image.Image


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The whole file decoded as RGB: upright by its EXIF tag, transparency over white, the first frame of several.

    Args:
        path: the file; with ``content``, only its name in messages.
        content: the file's bytes, if they were read before.

    Raises:
        ImageError: missing, a folder, unreadable, not an image, truncated, absurdly large, or with 32-bit pixels,
            whose range is unknown.
    """
    path = Path(path)
    image = _decode(path, content)
    if image.mode in ("I", "F"):
        raise ImageError(f"{path} has 32-bit pixels of unknown range; save it as an 8-bit or 16-bit image")
    if image.mode.startswith("I;16"):
        # Pillow would cut 16-bit values off at 255, which turns the picture white.
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def prepare(path: str | Path, recipe: Recipe = IMAGENET, content: bytes | None = None) -> Picture:
    """Reads a file (or ``content``), applies the recipe; equals torchvision's ``ImageClassification`` preset on the same picture.

    Raises:
        ImageError: see :func:`read_image`; also a picture so elongated that resizing it would not fit in memory.
    """
    image = read_image(path, content)
    crop = _resize_and_crop(image, recipe, Path(path))
    values = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(recipe.crop, recipe.crop, 3)
    scaled = values.permute(2, 0, 1).contiguous().float() / 255  # [3, H, W]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (recipe.mean, recipe.std))
    return Picture(Path(path), ((scaled - mean) / std)[None], crop)


def _decode(path: Path, content: bytes | None) -> Image.Image:
    """The upright first frame, completely read."""
    try:
        if content is None and path.is_dir():
            raise ImageError(f"{path} is a folder; give one image file")
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ImageError(f"no such image file: {path}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error}") from error
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: zlib.error, struct.error, IndexError
        raise ImageError(f"cannot read {path}, it is truncated, damaged or locked: {error}") from error


def _resize_and_crop(image: Image.Image, recipe: Recipe, path: Path) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long_after = int(recipe.resize * long / short)
    if long_after > 100 * recipe.resize:
        raise ImageError(f"{path} is {width} x {height}: too narrow for a {recipe.crop} x {recipe.crop} crop; crop it first")
    size = (recipe.resize, long_after) if width <= height else (long_after, recipe.resize)
    resized = image if image.size == size else image.resize(size, Image.Resampling[recipe.resampling.upper()])
    left, top = (round((side - recipe.crop) / 2) for side in size)
    return resized.crop((left, top, left + recipe.crop, top + recipe.crop))
