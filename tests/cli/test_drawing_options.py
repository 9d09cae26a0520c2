"""Pictures in, from the command line: what it writes, says and refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zimage_lite.cli import run
from zimage_lite.cli.compare import command as compare
from zimage_lite.config import GenerateOptions
from zimage_lite.pictures.saving import recipe_of

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "fox.png"
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def hole(fox: Path) -> Path:
    mask = Image.new("L", (70, 50))
    mask.paste(255, (20, 10, 60, 40))
    mask.save(fox.with_name("hole.png"))
    return fox.with_name("hole.png")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "image.png"


def generate(model: Path | str, out: Path, *args: object) -> int:
    own = ("generate", "cat", "--model", model, "-o", out, "--device", "cpu", "--steps", 2)
    return run([str(arg) for arg in (*own, *args)])


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def test_compare_takes_all_settings_of_an_image() -> None:
    assert {field.name for field in fields(GenerateOptions)} - {"prompt"} <= {option.name for option in compare.params}


def test_a_picture_keeps_its_size_and_what_the_mask_leaves(fox: Path, hole: Path, out: Path) -> None:
    assert generate("demo", out, "--image", fox, "--mask", hole, "--inpaint-area", "mask") == 0
    kept = pixels(hole)[..., 0] == 0
    assert (pixels(out)[kept] == pixels(fox)[kept]).all() and (pixels(out)[~kept] != pixels(fox)[~kept]).any()
    recipe = recipe_of(out)
    assert recipe["size"] == [70, 50] and recipe["width"] is None and recipe["inpaint_area"] == "mask"
    for name, path in (("image", fox), ("mask", hole)):
        assert recipe[name] == {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert "strength" not in recipe and "fit" not in recipe  # nothing that is as it is by default


@pytest.mark.slow
def test_what_is_transparent_is_drawn_anew(
    tiny: Path, fox: Path, hole: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, mask = Image.open(fox), Image.open(hole)
    picture.putalpha(Image.eval(mask, lambda white: 255 - white))
    picture.save(out.with_name("cut.png"))
    assert generate(tiny, out, "--image", out.with_name("cut.png")) == 0
    assert "note: 34 % of the picture is transparent and is drawn anew" in capsys.readouterr().err
    kept = pixels(hole)[..., 0] == 0
    assert (pixels(out)[kept] == pixels(fox)[kept]).all()
    assert generate(tiny, out, "--image", out.with_name("cut.png"), "--mask", "none") == 0
    assert (pixels(out)[kept] != pixels(fox)[kept]).any()


@pytest.mark.slow  # a picture each
@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("--outpaint", "8,0,24,5"), (102, 55)),
        (("--hires", "2x"), (128, 96)),  # of the 70x50 that it is, in whole tokens
        (("--width", 64, "--height", 96, "--fit", "pad"), (64, 96)),
        (("--sampler", "heun", "--schedule", "beta", "--variation", 2), (70, 50)),
        (("--sigmas", "0.8,0.4,0"), (70, 50)),
        (("--strength-mode", "diffusers", "--strength", 0.5), (64, 48)),
    ],
)
def test_sizes(tiny: Path, fox: Path, out: Path, options: tuple, size: tuple[int, int]) -> None:
    assert generate(tiny, out, "--image", fox, *options) == 0
    assert Image.open(out).size == size


@pytest.mark.slow
def test_lines_of_a_file_have_their_own(tiny: Path, fox: Path, hole: Path, out: Path) -> None:
    lines = [
        {"prompt": "cat", "image": str(fox), "strength": 0.5},
        {"prompt": "cat", "image": str(fox), "mask": str(hole), "sampler": "lcm"},
        {"prompt": "cat", "width": 64, "height": 48, "sigmas": [1, 0.5, 0], "guidance": 2, "guidance_range": [0, 0.5]},
        {"prompt": "cat", "width": 64, "height": 48, "hires": 1.5},
        {"prompt": "cat", "image": str(fox), "outpaint": [0, 0, 10, 0]},
    ]
    file = out.with_name("lines.jsonl")
    file.write_text("\n".join(map(json.dumps, lines)))
    args = ("generate", "--prompts", file, "--model", tiny, "-o", out, "--device", "cpu", "--steps", 2)
    assert run(list(map(str, args))) == 0
    sizes = [Image.open(out.with_name(f"image-{n}.png")).size for n in range(1, 6)]
    assert sizes == [(70, 50), (70, 50), (64, 48), (96, 64), (80, 50)]


@pytest.mark.slow
def test_latents_and_a_preview_are_kept(tiny: Path, out: Path) -> None:
    preview = out.with_name("preview.png")
    assert generate(tiny, out, "--width", 64, "--height", 48, "--save-latents", "--preview", preview) == 0
    latents = out.with_name("image.latents.safetensors")
    assert latents.exists() and Image.open(preview).size[0] <= 64
    again = out.with_name("again.png")
    assert generate(tiny, again, "--latents", latents, "--strength", 0.3) == 0
    assert Image.open(again).size == (64, 48)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--mask", "x.png"), "--mask without a picture; name one with --image"),
        (("--outpaint", "0,0,8,8"), "--outpaint without a picture; name one with --image"),
        (("--strength", 0.5), "--strength without a picture to start from; name one with --image"),
        (("--sigmas", "0.5,0.8,0"), "--sigmas: got (0.5, 0.8, 0.0), expected numbers from at most 1, falling to 0"),
        (("--sigmas", "1,a"), "--sigmas': got '1,a', expected some numbers with commas between them"),
        (("--outpaint", "1,2,3"), "--outpaint': got '1,2,3', expected 4 numbers with commas between them"),
        (("--hires", "0.5x"), "--hires: got 0.5, expected more than 1 and at most 8, such as 2x"),
        (("--guidance-range", "0.9,0.1"), "--guidance-range: got 0.9,0.1, expected two parts of the steps: 0,0.8"),
        (("--sampler", "ddim"), "'ddim' is not one of"),
        (("--image", "FOX", "--strength", 0), "--strength: got 0.0, expected a number from 0.01"),
        (("--image", "FOX", "--latents", "x"), "--image and --latents both say what to start from"),
        (("--image", "FOX", "--strength", 0.5, "--sigmas", "0.5,0"), "--strength and --sigmas both say where to start"),
        (("--image", "missing.png"), "missing.png: no such"),
        (("--image", "FOX", "--mask", "HOLE", "--hires", "2x"), "--hires does not go with --mask"),
        (("--latents", "FOX"), "not a safetensors file: expected what --save-latents wrote"),
        (("--preview", "x.jpg"), "--preview: got x.jpg, expected a name that ends in .png, or terminal"),
        (("--preview-decoder", "x"), "--preview-decoder without a preview"),
        (("--image", "FOX", "--inpaint-area", "mask"), "--inpaint-area mask: there is no mask"),
    ],
)
def test_what_is_refused(
    tiny: Path, fox: Path, hole: Path, out: Path, refused: Refused, options: tuple, line: str
) -> None:
    known = {"FOX": fox, "HOLE": hole}
    own = ("generate", "cat", "--model", tiny, "-o", out, "--device", "cpu", "--steps", 2)
    said = refused(*own, *(known.get(option, option) for option in options))
    assert line in said
    assert not out.exists()
