"""--like: what a picture says of itself is drawn again, and what is named beside it wins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from recipes import a_recipe

from zimage_lite.cli import run
from zimage_lite.cli.like import Liked, liked
from zimage_lite.config import ControlUse, Lora
from zimage_lite.errors import UserError
from zimage_lite.pictures.saving import recipe_of, save

Refused = Callable[..., str]


def picture(folder: Path, **changes: object) -> Path:
    save(folder / "like.png", torch.zeros(48, 64, 3, dtype=torch.uint8), a_recipe(**changes))
    return folder / "like.png"


def of_a1111(folder: Path, text: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 48)).save(folder / "like.png", pnginfo=info)
    return folder / "like.png"


def like(path: Path, lora_dir: Path | None = None, **given: object) -> Liked:
    return liked(path, given, set(given), lora_dir)


def notes(found: Liked) -> list[str]:
    return list(found.notes("Z-Image-Turbo-q4_k_m"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_the_same_picture_again(suffix: str, tiny: Path, tmp_path: Path) -> None:
    first, again = tmp_path / f"first{suffix}", tmp_path / "again.png"
    own = ["--width", "64", "--height", "48", "--steps", "2", "--seed", "9", "--sampler", "res_multistep"]
    more = ["--cfg", "3", "--negative", "red", "--guidance-range", "0,0.5", "--device", "cpu", "--model", str(tiny)]
    assert run(["generate", "a fox", "-o", str(first), *own, *more]) == 0
    assert run(["generate", "--like", str(first), "-o", str(again), *more[-4:]]) == 0
    assert recipe_of(again) == recipe_of(first)
    if suffix == ".png":
        assert np.array_equal(Image.open(again), Image.open(first))


def test_what_is_given_beside_it_wins(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = picture(tmp_path, sampler="heun", guidance=3.0), tmp_path / "out.png"
    more = ["--width", "64", "--height", "64", "--steps", "1", "--cfg", "1", "--seed", "0", "--device", "cpu"]
    assert run(["generate", "a cat", "--like", str(path), "-o", str(out), "--model", str(tiny), *more]) == 0
    found = recipe_of(out)
    wanted = {"prompt": "a cat", "size": [64, 64], "steps": 1, "seed": 0, "sampler": "heun", "guidance": 0.0}
    assert {name: found[name] for name in wanted} == wanted
    assert f"note: {path} was drawn by Z-Image-Turbo-q4_k_m; this is tiny" in capsys.readouterr().err.splitlines()


def test_controls_are_asked_at_its_scales(tmp_path: Path) -> None:
    path = picture(tmp_path, controls=[{"name": "a", "scale": 0.5}, {"name": "b", "scale": 0.7}])
    (tmp_path / "a.safetensors").write_bytes(b"")
    own, other = str(tmp_path / "a.safetensors"), str(tmp_path / "c.gguf")
    found = like(path, controls=(own, f"{other}:1.5"))
    assert found.settings["controls"] == (ControlUse(own, 0.5), ControlUse(other, 1.5))
    assert notes(found) == [f"{path} was drawn with the ControlNet b; this is c"]
    assert like(path, controls=(own,)).settings["controls"] == (ControlUse(own),)  # none says which of them it is


def test_levels_give_way_to_what_they_replace(tmp_path: Path) -> None:
    path = picture(tmp_path, sigmas=[0.9, 0.5, 0.0])
    assert like(path).settings["sigmas"] == [0.9, 0.5, 0.0]
    assert "sigmas" not in like(path, steps=4).settings


def test_pictures_that_it_was_made_from_are_named(tmp_path: Path) -> None:
    fox = {"name": "fox.png", "sha256": "0" * 64}
    path = picture(tmp_path, image=fox, mask="none", strength=0.4, width=None, height=None)
    with pytest.raises(UserError, match=r"made from fox\.png; name it with --image"):
        like(path)
    (tmp_path / "fox.png").write_bytes(b"other")
    found = like(path, image=str(tmp_path / "fox.png"))
    assert found.settings["strength"] == 0.4 and found.settings["mask"] == "none"
    assert notes(found) == [f"{path} was made from another --image: fox.png"]


@pytest.mark.parametrize("place", ["beside", "here"])
def test_what_lies_beside_it_is_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of all kinds, as they were; all of several, or none."""
    there = tmp_path / place
    there.mkdir()
    monkeypatch.chdir(there if place == "here" else tmp_path)
    said = {name: {"name": f"{name}.png", "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in "abcd"}
    for name in said:
        (there / f"{name}.png").write_bytes(name.encode())
    sources = {"image": said["a"], "mask": said["b"], "control_image": [said["c"], said["d"]]}
    path = picture(there if place == "beside" else tmp_path, **sources)
    found = like(path)
    a, b, c, d = (str(there / f"{name}.png") if place == "beside" else f"{name}.png" for name in said)
    wanted = {"image": a, "mask": b, "control_image": [c, d]}
    assert {name: found.settings[name] for name in sources} == wanted and not notes(found)
    (there / "d.png").write_bytes(b"other")
    with pytest.raises(UserError, match=r"made from c\.png and d\.png; name it with --control-image"):
        like(path)


def test_loras_are_found_by_name(tmp_path: Path) -> None:
    lora = {"name": "ink", "strength": -0.5, "sha256": "0" * 64, "blocks": {"layers.0": 0.0}}
    path = picture(tmp_path, loras=[lora])
    with pytest.raises(UserError, match="drawn with the LoRA ink; say where it lies with --lora-dir"):
        like(path)
    (tmp_path / "ink.safetensors").write_bytes(b"other")
    found = like(path, tmp_path)
    (own,) = found.settings["loras"]
    assert own == Lora(str(tmp_path / "ink.safetensors"), -0.5, {"layers.0": 0.0})
    assert notes(found) == [f"{own.path} is not the ink that {path} was drawn with"]
    assert like(path, loras=("mine",)).settings["loras"] == ("mine",)


def test_a_lora_in_a_folder_of_peft_is_known_by_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "loras" / "ink"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    found = like(picture(tmp_path, loras=[{"name": "ink", "strength": 1.0, "sha256": sha256}]), folder.parent)
    assert found.settings["loras"] == (Lora(str(folder), 1.0),) and not notes(found)


A1111 = """a cat <lora:ink:0.7>
Negative prompt: dog
Steps: 20, Sampler: UniPC, CFG scale: 7, Seed: 5, Size: 1000x768, Denoising strength: 0.4, Model: sdxl"""


def test_a_text_of_a1111(tmp_path: Path) -> None:
    path = of_a1111(tmp_path, A1111)
    with pytest.raises(UserError, match="its prompt names LoRAs; say where they lie with --lora-dir"):
        like(path)
    found = like(path, tmp_path)
    assert found.prompts == ("a cat <lora:ink:0.7>",)  # looked up as in any other prompt
    wanted = {"negative": "dog", "steps": 20, "guidance": 6.0, "seed": 5, "width": 992, "height": 768, "loras": ()}
    assert found.settings == wanted
    assert notes(found) == [
        f"{path} was drawn by sdxl; this is Z-Image-Turbo-q4_k_m",
        "width 1000 is no multiple of 16: 992 is drawn",
        f"unipc is not known here, and {path} is drawn without it",
    ]
    assert like(path, loras=("mine",)).prompts == ("a cat",)


def test_no_picture(tmp_path: Path, refused: Refused) -> None:
    missing = tmp_path / "none.png"
    assert refused("generate", "--like", missing) == f"error: {missing}: no such file"
    assert "this is a folder" in refused("generate", "--like", tmp_path)


def test_a_picture_that_says_nothing(tmp_path: Path, refused: Refused) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert "a.png: it does not say how it was drawn" in refused("generate", "--like", tmp_path / "a.png")
    assert "b.png" in refused("generate", "x", "--like", tmp_path / "b.png")
