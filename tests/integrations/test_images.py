"""Reading pictures: equal to torchvision's own preprocessing, and every damaged file is a clear error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frpc.errors import ImageError
from frpc.integrations.images import Recipe, prepare, read_image

SIZES = {"landscape": (90, 60), "portrait": (33, 71), "square": (256, 256), "tiny": (3, 2)}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["squeezenet1_0", "inception_v3", "efficientnet_b1"])
def test_prepare_equals_torchvision(tmp_path: Path, size, name):
    from torchvision.models import get_model_weights

    preset = next(iter(get_model_weights(name))).transforms()
    image = noise(*size)
    image.save(tmp_path / "x.png")
    picture = prepare(tmp_path / "x.png", Recipe.of(preset))
    assert picture.pixels.dtype == torch.float32
    torch.testing.assert_close(picture.pixels[0], preset(image), rtol=0, atol=1e-6)
    assert picture.crop.size == (preset.crop_size[0], preset.crop_size[0])


def test_exif_orientation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees for display
    noise(40, 20).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)


def test_transparency_is_laid_over_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_range(tmp_path: Path):
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert [read_image(tmp_path / "deep.png").getpixel((i, 0))[0] for i in range(3)] == pytest.approx([0, 128, 255], abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode):
    suffix = "tiff" if mode == "CMYK" else "png"
    noise(8, 6).convert(mode).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert (image.mode, image.size) == ("RGB", (8, 6))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise(64, 48).save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", "not an image"),
    "text": (b"this is no picture at all", "not an image"),
    "half a png": (encoded("PNG")[:3000], "truncated"),
    "half a jpeg": (encoded("JPEG")[:900], "truncated"),
    "header only": (encoded("PNG")[:40], "not an image"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path: Path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / "bad.png")


def test_missing_folder_and_unusable(tmp_path: Path):
    with pytest.raises(ImageError, match=r"no such image file: .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match="32-bit pixels"):
        read_image(tmp_path / "f.tiff")
    noise(1, 500).save(tmp_path / "thread.png")
    with pytest.raises(ImageError, match="too narrow"):
        prepare(tmp_path / "thread.png")


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch):
    noise(40, 40).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "x.png")


def test_random_damage_is_always_an_image_error(tmp_path: Path):
    random = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "BMP"):
        for _ in range(25):
            data = bytearray(encoded(kind))
            for place in random.integers(0, 200, 4):
                data[place] = random.integers(256)
            (tmp_path / "x").write_bytes(data)
            try:
                read_image(tmp_path / "x")
            except ImageError:
                refused += 1
    assert refused > 10
