"""Pictures on the disk: what they say of themselves, read back by us and by others' ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_lite.errors import UserError
from zimage_lite.pictures.saving import KINDS, recipe_of, require_kind, save

RECIPE = {"prompt": 'a red fox, 你好 "quoted"\nand a line', "seed": 7, "guidance": 0.0}


def ramp() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    return torch.stack([rows * 5, columns * 3, rows + columns], 2).to(torch.uint8)


@pytest.mark.parametrize("suffix", [*KINDS, ".PNG"])
def test_the_recipe_is_inside(suffix: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / f"a{suffix}", ramp()
    save(path, pixels, RECIPE)
    found = recipe_of(path)
    assert {key: str(value) for key, value in found.items()} == {key: str(value) for key, value in RECIPE.items()}
    with Image.open(path) as picture:
        assert picture.format == KINDS[suffix.lower()][0] and picture.size == (64, 48)
        off = np.abs(np.asarray(picture.convert("RGB")).astype(int) - pixels.numpy().astype(int))
    assert off.max() == 0 if suffix.lower() == ".png" else off.mean() < 2
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_comment_is_exifs(suffix: str, tmp_path: Path) -> None:
    """EXIF 2.3: eight bytes that name the code, then the text; programs for pictures read it as UTF-16."""
    save(tmp_path / f"a{suffix}", ramp(), RECIPE)
    with Image.open(tmp_path / f"a{suffix}") as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert json.loads(comment[8:].decode("utf-16-be")) == RECIPE


@pytest.mark.parametrize("suffix", KINDS)
def test_no_prompt_is_too_long_for_its_picture(suffix: str, tmp_path: Path) -> None:
    """A JPEG holds 64 kB of EXIF, and of a prompt 512 tokens are read."""
    long = "狐 " * 50_000
    save(tmp_path / f"a{suffix}", ramp(), {**RECIPE, "prompt": long})
    found = recipe_of(tmp_path / f"a{suffix}")
    assert long.startswith(found["prompt"]) and len(found["prompt"]) > 10_000
    assert str(found["seed"]) == "7"


def test_pictures_of_others_say_nothing(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        assert recipe_of(tmp_path / name) == {}


@pytest.mark.parametrize("name", ["a.bmp", "a", "a.png.txt", ".png"])
def test_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"-o: got .*, expected a name that ends in \.png, \.jpg, \.jpeg, \.webp"):
        require_kind(Path(name))
