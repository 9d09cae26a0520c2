"""Modes, depths, transparency and profiles: each as Pillow or LittleCMS converts it, or as NumPy computes it."""

from __future__ import annotations

import struct
import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from icc_profiles import ADOBE_RGB, DISPLAY_P3, SRGB, cmyk_profile, grey_profile, rgb_profile
from picture_files import chunk, noise, png, saved
from PIL import Image, ImageCms

from zimage_lite.pictures import colours
from zimage_lite.pictures.reading import read

BASE = Image.fromarray(noise(31, 23))
DEEP = np.array([[0, 1, 127, 128, 129, 256, 257, 1000, 32767, 32768, 65407, 65535]], np.uint16)


@pytest.fixture(autouse=True)
def _narrow_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small pictures have several, and a last one that is not full."""
    monkeypatch.setattr(colours, "_BAND_PIXELS", 31 * 5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes(mode: str) -> None:
    image = BASE.convert(mode)
    found = read(image)
    assert found.alpha is None and np.array_equal(found.rgb, np.asarray(image.convert("RGB")))


def with_alpha(mode: str, alpha: np.ndarray) -> Image.Image:
    image = BASE.convert(mode[:-1])
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_modes_with_alpha(mode: str) -> None:
    image = with_alpha(mode, noise(31, 23, 1)[..., 0])
    found, expected = read(image), np.asarray(image.convert("LA" if mode == "La" else mode).convert("RGBA"))
    assert np.array_equal(found.rgb, expected[..., :3]) and np.array_equal(found.alpha, expected[..., 3])
    assert np.array_equal(found.alpha, noise(31, 23, 1)[..., 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_that_hides_nothing_is_none(mode: str) -> None:
    assert read(with_alpha(mode, np.full((23, 31), 255, np.uint8))).alpha is None


def test_white_of_16_bits_is_white() -> None:
    expected = np.rint(DEEP / 257).astype(np.uint8)
    assert expected[0, -1] == 255 and expected[0, 3] == 0 and expected[0, 4] == 1
    for image in (Image.fromarray(DEEP), Image.fromarray(DEEP.astype(np.int32))):
        assert np.array_equal(read(image).rgb, np.repeat(expected[..., None], 3, 2))
    for file in (saved(Image.fromarray(DEEP), "PNG"), saved(Image.fromarray(DEEP), "TIFF")):
        assert np.array_equal(read(file).rgb[..., 1], expected)
    pgm = b"P5 12 1 65535\n" + DEEP.astype(">u2").tobytes()
    assert np.array_equal(read(pgm).rgb[..., 2], expected)


def test_16_bits_of_colour() -> None:
    """Of these Pillow keeps the upper 8."""
    pixels = np.stack([DEEP, DEEP[:, ::-1], DEEP // 2], -1).astype(">u2")
    assert np.array_equal(read(png(12, 1, 16, 2, b"\0" + pixels.tobytes())).rgb, pixels // 256)


def test_32_bits() -> None:
    values = np.array([[0, 2**20, 2**30, 2**31 - 1, -5]], np.int32)
    assert read(Image.fromarray(values)).rgb[0, :, 0].tolist() == [0, 0, 128, 255, 0]


def test_floats_are_clipped() -> None:
    values = np.array([[0, 0.5, 1, 1.0001, 99, -3, np.nan, np.inf, -np.inf]], np.float32)
    for source in (Image.fromarray(values), saved(Image.fromarray(values), "TIFF")):
        assert read(source).rgb[0, :, 0].tolist() == [0, 128, 255, 255, 255, 0, 0, 255, 0]


def test_a_palette_with_transparency() -> None:
    palette = chunk(b"PLTE", bytes(range(12))) + chunk(b"tRNS", bytes([0, 77]))
    found = read(png(4, 1, 8, 3, bytes([0, 0, 1, 2, 3]), palette))
    assert found.rgb.ravel().tolist() == list(range(12)) and found.alpha.tolist() == [[0, 77, 255, 255]]


@pytest.mark.parametrize(
    ("depth", "kind", "key", "row", "alpha"),
    [
        (8, 0, [3], bytes([2, 3, 4]), [255, 0, 255]),
        (8, 2, [3, 4, 5], bytes([3, 4, 5, 3, 4, 6, 0, 0, 0]), [0, 255, 255]),
        (16, 0, [257], struct.pack(">3H", 257, 256, 258), [0, 255, 255]),
    ],
)
def test_a_colour_that_is_transparent(depth: int, kind: int, key: list[int], row: bytes, alpha: list[int]) -> None:
    found = read(png(3, 1, depth, kind, b"\0" + row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))))
    assert found.alpha.tolist() == [alpha]


def test_a_transparent_gif() -> None:
    image = Image.fromarray(noise(9, 9)[..., 0] // 64 * 64).convert("P")
    found = read(saved(image, "GIF", transparency=64))
    assert np.array_equal(found.alpha, np.where(np.asarray(image) == 64, 0, 255))


# --- Profiles

PROFILES = {
    "RGB": rgb_profile(ADOBE_RGB, 563 / 256),
    "P3": rgb_profile(DISPLAY_P3, 2.2),
    "L": grey_profile(1.8),
    "CMYK": cmyk_profile(),
}
_SRGB = ImageCms.createProfile("sRGB")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in PROFILES for kind in ("JPEG", "TIFF")] + [("P3", "PNG"), ("L", "PNG")]
)
def test_profiles_as_littlecms_converts(name: str, kind: str) -> None:
    image = BASE.convert("RGB" if name == "P3" else name)
    raw = saved(image, kind, icc_profile=PROFILES[name])
    image, profile = Image.open(BytesIO(raw)), ImageCms.ImageCmsProfile(BytesIO(PROFILES[name]))
    expected = np.asarray(ImageCms.profileToProfile(image, profile, _SRGB, outputMode="RGB")).astype(int)
    assert np.array_equal(read(raw).rgb, expected)
    assert np.abs(expected - np.asarray(image.convert("RGB"))).mean() > 5


def test_a_profile_as_its_numbers_say() -> None:
    """Greys and pale colours, which sRGB has too."""
    pixels = np.clip(noise(31, 23) // 4 + 100, 0, 255).astype(np.uint8)
    linear = (pixels / 255) ** 2.2 @ np.array(DISPLAY_P3).T @ np.linalg.inv(np.array(SRGB)).T
    expected = np.where(linear > 0.0031308, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    found = read(saved(Image.fromarray(pixels), "PNG", icc_profile=PROFILES["P3"])).rgb
    assert np.abs(found - expected).max() < 1  # of which half is rounding
    assert np.abs(pixels - expected).max() > 10


def test_alpha_and_palettes_keep_their_profile() -> None:
    rgba = noise(31, 23, 4)
    found = read(saved(Image.fromarray(rgba), "PNG", icc_profile=PROFILES["P3"]))
    opaque = saved(Image.fromarray(np.ascontiguousarray(rgba[..., :3])), "PNG", icc_profile=PROFILES["P3"])
    assert np.array_equal(found.alpha, rgba[..., 3]) and np.array_equal(found.rgb, read(opaque).rgb)
    palette = BASE.convert("P")
    found = read(saved(palette, "PNG", icc_profile=PROFILES["P3"]))
    assert np.array_equal(found.rgb, read(saved(palette.convert("RGB"), "PNG", icc_profile=PROFILES["P3"])).rgb)
    grey = Image.merge("LA", [BASE.convert("L"), Image.fromarray(rgba[..., 3])])
    found = read(saved(grey, "PNG", icc_profile=PROFILES["L"]))
    assert np.array_equal(found.rgb, read(saved(BASE.convert("L"), "PNG", icc_profile=PROFILES["L"])).rgb)


def test_srgb_that_says_so_stays_as_it_is() -> None:
    raw = saved(BASE, "PNG", icc_profile=ImageCms.ImageCmsProfile(_SRGB).tobytes())
    assert np.array_equal(read(raw).rgb, np.asarray(BASE))


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(200), PROFILES["P3"][:150], PROFILES["P3"][:128] + bytes(400), PROFILES["CMYK"], PROFILES["L"]],
    ids=["a byte", "zeros", "cut", "no tags", "of CMYK", "of grey"],
)
def test_broken_profiles_are_ignored(profile: bytes) -> None:
    assert np.array_equal(read(saved(BASE, "PNG", icc_profile=profile)).rgb, np.asarray(BASE))


def test_lab() -> None:
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(BASE, _SRGB, lab, outputMode="LAB")
    back = np.asarray(ImageCms.profileToProfile(image, lab, _SRGB, outputMode="RGB"))
    for source in (image, saved(image, "TIFF")):
        assert np.array_equal(read(source).rgb, back)
    assert np.abs(back.astype(int) - np.asarray(BASE)).mean() < 2


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside Pillow's own pixels: those that are returned, and copies of a band."""
    monkeypatch.setattr(colours, "_BAND_PIXELS", 1 << 14)
    image = Image.fromarray(noise(1000, 800, 4))
    image.info["icc_profile"] = PROFILES["P3"]
    tracemalloc.start()
    try:
        colours.converted(image, orientation=6)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1000 * 800 + 32 * (1 << 14)
    finally:
        tracemalloc.stop()
