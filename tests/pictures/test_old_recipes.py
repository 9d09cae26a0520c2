"""Pictures of the first version, whose chunks were texts, one for each setting."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_lite.pictures.recipe import settings
from zimage_lite.pictures.saving import recipe_of

OLD = {
    "prompt": "你好 cat", "seed": 5, "steps": 2, "size": "128x96", "guidance": 0.0, "negative": "", "shift": 3.0,
    "sampler": "heun", "sigmas": "0.8,0.4,0", "image": "fox.png (0123456789)", "mask": "none", "hires": "2.0",
    "loras": "ink:0.8 (0123456789), b:-1 (abcdef0123, layers.0-9 x 2, noise_refiner x 0)",
    "model": "synthetic:q4_0 (random weights: the picture is noise)", "format": "q4_0", "version": "zimage-lite 0.1.0",
}  # fmt: skip


def check(path: Path) -> None:
    found = recipe_of(path)
    assert settings(found) == {
        "prompt": "你好 cat", "seed": 5, "steps": 2, "guidance": 0.0, "negative": "", "shift": 3.0, "sampler": "heun",
        "sigmas": [0.8, 0.4, 0], "hires": 2.0,
    }  # fmt: skip
    assert found["image"] == {"name": "fox.png", "sha256": "0123456789"} and found["mask"] == "none"
    assert found["loras"] == [
        {"name": "ink", "strength": 0.8, "sha256": "0123456789"},
        {
            "name": "b",
            "strength": -1.0,
            "sha256": "abcdef0123",
            "blocks": {"layers.0-9": 2.0, "noise_refiner": 0.0},
        },
    ]
    assert found["model"] == {"name": "synthetic:q4_0", "format": "q4_0", "synthetic": True}


def test_png(tmp_path: Path) -> None:
    info = PngInfo()
    for key, value in OLD.items():
        info.add_itxt(key, str(value))
    Image.new("RGB", (128, 96)).save(tmp_path / "a.png", pnginfo=info)
    check(tmp_path / "a.png")


def test_jpeg_and_webp(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + json.dumps(OLD, ensure_ascii=False).encode("utf-16-be")}
    for name in ("a.jpg", "a.webp"):
        Image.new("RGB", (128, 96)).save(tmp_path / name, exif=exif)
        check(tmp_path / name)


def test_the_size_is_what_was_asked_for(tmp_path: Path) -> None:
    for hires, size in ((None, [128, 96]), ("2.0", [64, 48])):
        plain = {name: value for name, value in OLD.items() if name not in ("image", "mask", "hires")}
        info = PngInfo()
        for key, value in {**plain, **({"hires": hires} if hires else {})}.items():
            info.add_itxt(key, str(value))
        Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=info)
        found = recipe_of(tmp_path / "a.png")
        assert [found["width"], found["height"]] == size and found["size"] == [128, 96]
