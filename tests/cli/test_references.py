"""generate --reference, and what remembers and refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import make_checkpoint
from PIL import Image

from zimage_lite.cli import run
from zimage_lite.pictures.saving import recipe_of


@pytest.fixture(scope="module")
def tiny_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-omni"
    make_checkpoint(folder, "tiny-omni")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures, in which commands run."""
    rng = np.random.default_rng(1)
    for name, size in (("a.png", (64, 80)), ("b.png", (96, 64))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_picture_says_what_it_saw_and_is_drawn_again(tiny_omni: Path, here: Path) -> None:
    common = ["--model", str(tiny_omni), "--steps", "1"]
    both = ["--reference", "a.png", "--reference", "b.png"]
    assert run(["generate", "a fox", *common, *both, "-o", "one.png"]) == 0
    assert [said["name"] for said in recipe_of(here / "one.png")["references"]] == ["a.png", "b.png"]
    assert run(["generate", "--like", "one.png", "--model", str(tiny_omni), "-o", "again.png"]) == 0
    lines = [{"prompt": "a fox", "references": ["a.png", "b.png"]}, {"prompt": "a fox", "references": "b.png"}]
    (here / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(["generate", "--prompts", "lines.jsonl", *common, "-o", "line.png"]) == 0
    assert (here / "one.png").read_bytes() == (here / "again.png").read_bytes()
    assert Image.open("one.png").size == (96, 64)
    pixels = [np.asarray(Image.open(here / f"{name}.png")) for name in ("one", "line-1", "line-2")]
    assert np.array_equal(pixels[0], pixels[1]) and not np.array_equal(pixels[0], pixels[2])
    (here / "b.png").unlink()
    assert run(["generate", "--like", "one.png", "--model", str(tiny_omni), "-o", "lost.png"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reference", "a.png"], "demo sees no pictures beside the prompt, so it takes no --reference"),
        (["--reference", "a.png"] * 4, "--reference: got 4 times, expected at most 3 times"),
        (["--reference", "a.png", "--control", "demo", "--control-image", "a.png"], "--control does not go with"),
        (["--model", "demo", "--siglip", "x.safetensors"], "so it has no use for a vision tower"),
    ],
)
def test_refusals(here: Path, refused: Callable[..., str], options: list[str], said: str) -> None:
    assert said in refused("generate", "a fox", *options, notes=said.startswith("demo sees"))
    assert not list(here.glob("image*"))


def test_an_omni_refuses_what_it_cannot(tiny_omni: Path, here: Path, refused: Callable[..., str]) -> None:
    there = here / "blind"
    there.mkdir()
    for folder in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler"):
        (there / folder).symlink_to(tiny_omni / folder)
    assert "has no vision tower" in refused("generate", "x", "--model", there, "--reference", "a.png")
    Image.new("RGB", (40, 80)).save("small.png")
    assert "small.png: a reference of this shape" in refused(
        "generate", "x", "--model", tiny_omni, "--reference", "small.png"
    )
    for model in (("--model", tiny_omni), ("--reference", "a.png")):
        assert "LoRAs are not trained on Omni" in refused("plan", "--train", "--gpu", "RTX 4060 Laptop", *model)
    control = ["--control", "synthetic:2.1/int8", "--control-image", "a.png"]
    assert "there are no ControlNets for Omni" in refused("generate", "x", "--model", tiny_omni, *control)


def test_inspect_tells_it(tiny_omni: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tiny_omni, tiny_omni / "transformer"):
        assert run(["inspect", str(place)]) == 0
        assert "transformer: Z-Image Omni transformer, " in capsys.readouterr().out


def test_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--gpu", "RTX 4060 Laptop", "--json"]
    assert run([*command, "--reference", "a.png", "--width", "512", "--height", "512"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert run([*command, "--width", "512", "--height", "512"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert seen["model"].startswith("Z-Image-Omni") and plain["model"].startswith("Z-Image-Turbo")
    assert [phase["phase"] for phase in seen["phases"]] == ["picture", "look", "encode", "denoise", "decode"]
    assert list(seen["phases"][1]["homes"]) == [f"encoder.layers.{i}" for i in range(27)]
    assert seen["phases"][3]["total_ms"][0] > plain["phases"][1]["total_ms"][0]
