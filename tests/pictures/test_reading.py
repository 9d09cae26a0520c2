"""What people have as a picture -> pixels, against Pillow's own conversions and plain NumPy."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import noise, saved
from PIL import Image, ImageOps

from zimage_lite.errors import UserError
from zimage_lite.pictures.reading import MAX_PIXELS, Picture, read

RGB = noise(31, 23)
RGBA = noise(31, 23, 4)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG", "WEBP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"])
def test_files_by_path_by_bytes_and_opened(kind: str, tmp_path: Path) -> None:
    """The name says nothing."""
    raw = saved(Image.fromarray(RGB), kind)
    (tmp_path / "a.txt").write_bytes(raw)
    expected = np.asarray(Image.open(BytesIO(raw)).convert("RGB"))
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt"), raw, Image.open(BytesIO(raw))):
        found = read(source)
        assert found.alpha is None and np.array_equal(found.rgb, expected)
        assert found.rgb.flags.writeable and found.rgb.flags.c_contiguous and found.size == expected.shape[1::-1]
    assert read(tmp_path / "a.txt").name == str(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = saved(Image.fromarray(RGB), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(raw))))
    assert np.array_equal(read(raw).rgb, upright)
    assert (upright.shape == RGB.shape) == (orientation not in range(5, 9))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_alpha_turns_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = saved(Image.fromarray(RGBA), "PNG", exif=exif)
    found, upright = read(raw), np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(raw))))
    assert np.array_equal(found.alpha, upright[..., 3]) and np.array_equal(found.rgb, upright[..., :3])


def frames(kind: str, **options: Any) -> bytes:
    first, second = (Image.fromarray(noise(16, 16, seed=seed)) for seed in (1, 2))
    return saved(first, kind, save_all=True, append_images=[second], **options)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_of_animations_the_first_frame(kind: str, options: dict[str, Any]) -> None:
    raw = frames(kind, **options)
    assert Image.open(BytesIO(raw)).n_frames == 2
    expected = np.asarray(Image.open(BytesIO(raw)).convert("RGB"))
    assert np.array_equal(read(raw).rgb, expected)
    assert np.abs(expected.astype(int) - noise(16, 16, seed=1)).mean() < 20  # a GIF has 256 colours


def test_a_picture_of_pillows_stays_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(BytesIO(saved(Image.fromarray(RGBA), "PNG", exif=exif)))
    assert read(opened).size == (23, 31)
    assert opened.size == (31, 23) and opened.mode == "RGBA" and opened.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    "source",
    [RGB, RGB / 255, (RGB / 255).astype(np.float16), torch.from_numpy(RGB), torch.from_numpy(RGB).double() / 255,
     RGB.astype(np.uint16) * 257, torch.from_numpy(RGB).float().div(255).requires_grad_(),
     torch.from_numpy(RGB).div(255).bfloat16()],
)  # fmt: skip
def test_arrays_and_tensors(source: Any) -> None:
    found = read(source)
    assert np.array_equal(found.rgb, RGB) and found.alpha is None and not np.shares_memory(found.rgb, RGB)


def test_arrays_of_one_plane_and_of_four() -> None:
    grey, both = read(RGB[..., 0]), read(RGBA)
    assert all(np.array_equal(grey.rgb[..., channel], RGB[..., 0]) for channel in range(3))
    assert np.array_equal(both.rgb, RGBA[..., :3]) and np.array_equal(both.alpha, RGBA[..., 3])
    assert np.array_equal(read(RGB[..., 0] > 99).rgb[..., 1], np.where(RGB[..., 0] > 99, 255, 0))
    assert read(np.array([[-1.0, 0.5, 7.0, np.inf, -np.inf]])).rgb[0, :, 0].tolist() == [0, 128, 255, 255, 0]


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (np.zeros((3, 8, 9), np.uint8), "uint8 of shape (3, 8, 9)"),
        (torch.zeros(1, 8, 9, 3), "float32 of shape (1, 8, 9, 3)"),
        (torch.zeros(8, 9, 3, dtype=torch.int64), "int64 of shape (8, 9, 3)"),
        (np.zeros((8, 9, 3), complex), "complex128"),
        (None, "object of shape ()"),
        ({"a": 1}, "object of shape ()"),
    ],
)
def test_arrays_of_something_else_are_refused(source: Any, got: str) -> None:
    with pytest.raises(UserError, match=r"^the picture: got .*, expected a path, bytes, .*height, width, 3") as raised:
        read(source)
    assert got in str(raised.value)


def test_arrays_of_no_numbers_are_refused() -> None:
    for source in (np.full((8, 9, 3), np.nan, np.float32), torch.full((8, 9, 3), np.nan, dtype=torch.bfloat16)):
        with pytest.raises(UserError, match=r"^the picture: holds NaN: expected floats from 0 to 1"):
            read(source)


def test_a_picture_without_a_name() -> None:
    for name in ("", " "):
        with pytest.raises(UserError, match="a picture without a name: expected a file"):
            read(name)


def test_arrays_are_limited_too() -> None:
    with pytest.raises(UserError, match=f"too large: got {MAX_PIXELS + 1} x 1 pixels, expected at most 100 million"):
        read(np.broadcast_to(np.uint8(0), (1, MAX_PIXELS + 1)))
    with pytest.raises(UserError, match="it has no pixels: got 9 x 0, expected 1 x 1 or more"):
        read(np.zeros((0, 9, 3)))


def test_on_a_ground() -> None:
    """Against Pillow's alpha_composite, which rounds in its own way."""
    for grey in (0, 255):
        ground = Image.new("RGBA", (31, 23), (grey, grey, grey, 255))
        expected = np.asarray(Image.alpha_composite(ground, Image.fromarray(RGBA)))[..., :3]
        found = Picture(RGBA[..., :3], RGBA[..., 3]).on(grey)
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert Picture(RGB).on(grey) is RGB
