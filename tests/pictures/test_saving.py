"""Pictures on the disk: what they say of themselves, read back by us and by others' ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import a_recipe

from zimage_lite.errors import UserError
from zimage_lite.pictures.infotext import infotext
from zimage_lite.pictures.saving import KINDS, infotext_of, recipe_of, require_kind, save

RECIPE = a_recipe(loras=[{"name": "ink", "strength": 0.8, "sha256": "0" * 64}])


def ramp() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    return torch.stack([rows * 5, columns * 3, rows + columns], 2).to(torch.uint8)


@pytest.mark.parametrize("suffix", [*KINDS, ".PNG"])
def test_the_recipe_is_inside(suffix: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / f"a{suffix}", ramp()
    save(path, pixels, RECIPE)
    assert recipe_of(path) == RECIPE == recipe_of(path.read_bytes())
    assert infotext_of(path) == infotext(RECIPE)
    with Image.open(path) as picture:
        assert picture.format == KINDS[suffix.lower()][0] and picture.size == (64, 48)
        off = np.abs(np.asarray(picture.convert("RGB")).astype(int) - pixels.numpy().astype(int))
    assert off.max() == 0 if suffix.lower() == ".png" else off.mean() < 2
    assert [path] == list(tmp_path.iterdir())


def test_a_png_has_two_chunks(tmp_path: Path) -> None:
    """One called prompt would be taken for a graph of ComfyUI by Civitai and SD-Prompt-Reader."""
    save(tmp_path / "a.png", ramp(), RECIPE)
    text = Image.open(tmp_path / "a.png").text
    assert list(text) == ["parameters", "zimage_lite"]
    assert json.loads(text["zimage_lite"]) == RECIPE


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_comment_is_exifs(suffix: str, tmp_path: Path) -> None:
    """EXIF 2.3: eight bytes that name the code, then the text; programs for pictures read it as UTF-16. 0x0110 and
    0x010F would be taken for ComfyUI's."""
    save(tmp_path / f"a{suffix}", ramp(), RECIPE)
    with Image.open(tmp_path / f"a{suffix}") as picture:
        exif, raw = picture.getexif(), picture.info["exif"]
    comment = exif.get_ifd(0x8769)[0x9286]
    assert b"\x92\x86\0\x07" in raw  # of the type UNDEFINED, as the standard has it
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == infotext(RECIPE)
    assert not {0x0110, 0x010F} & exif.keys()


@pytest.mark.parametrize("suffix", KINDS)
def test_no_prompt_is_too_long_for_its_picture(suffix: str, tmp_path: Path) -> None:
    """A JPEG holds 64 kB of EXIF, and of a prompt 512 tokens are read."""
    long = "狐 " * 50_000
    save(tmp_path / f"a{suffix}", ramp(), {**RECIPE, "prompt": long})
    found = recipe_of(tmp_path / f"a{suffix}")
    assert long.startswith(found["prompt"]) and len(found["prompt"]) > 5000
    assert found["seed"] == 7


def test_pictures_of_others_say_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        assert recipe_of(tmp_path / name) == {}


@pytest.mark.parametrize("chunk", ["{", "[1]", '"x"', "null", "{}"])
def test_what_is_cut_or_not_ours_says_nothing(chunk: str, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("zimage_lite", chunk)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    assert recipe_of(tmp_path / "a.png") == {}


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    for source in (tmp_path / "a.png", b"\x89PNG\r\n\x1a\n\0\0"):
        with pytest.raises(UserError):
            recipe_of(source)


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt", ".png"])
def test_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"-o: got .*, expected a name that ends in \.png, \.jpg, \.jpeg, \.webp"):
        require_kind(Path(name))
