"""What is asked for, in every way of asking: options, lines of a file, Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_lite.api import load
from zimage_lite.cli import run
from zimage_lite.cli.requests import requests_of
from zimage_lite.config import ControlUse, GenerateOptions
from zimage_lite.errors import UserError
from zimage_lite.pictures.saving import recipe_of


def lines(folder: Path, *objects: dict[str, Any]) -> Path:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, objects)), encoding="utf-8")
    return folder / "a.jsonl"


def saved(path: Path) -> Path:
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def test_no_picture_is_replaced_by_what_is_made_of_it(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = saved(tmp_path / "fox.png").read_bytes()
    (tmp_path / "link.png").symlink_to("fox.png")
    (tmp_path / "Fox.png").hardlink_to("fox.png")  # another name, as where upper and lower case are the same
    for flags in (
        ["--image", "fox.png"],
        ["--image", saved(tmp_path / "a.png"), "--mask", "fox.png"],
        ["--control", "demo", "--control-image", tmp_path / "fox.png"],
        ["--reference", "fox.png"],
        ["--image", "link.png"],
        ["--image", "Fox.png"],
    ):
        told = refused("generate", "x", *flags, "-o", "fox.png")
        assert f"fox.png would be replaced, which {flags[-2]} names" in told
    flags = ["--image", "fox.png", "-o", "b.png", "--preview", "fox.png"]
    assert "fox.png would be replaced, which --image names" in refused("generate", "x", *flags)
    latents = ["--latents", "b.latents.safetensors", "--save-latents", "-o", "b.png"]
    assert "b.latents.safetensors would be replaced" in refused("generate", "x", *latents)
    assert (tmp_path / "fox.png").read_bytes() == before and not (tmp_path / "b.png").exists()


def test_pictures_of_all_lines_are_looked_at_first(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.png").write_text("no picture")
    fine = {"prompt": "a", "image": str(saved(tmp_path / "fox.png")), "mask": "none"}
    net = {"prompt": "b", "controls": ["demo"]}
    for wrong, said in (
        ({**net, "control_image": [str(tmp_path / "none.png")]}, "none.png: no such file"),
        ({**fine, "image": str(tmp_path / "text.png")}, "text.png: not a picture of a kind that can be read"),
        ({"prompt": "b", "references": ""}, "a picture without a name"),
    ):
        path = lines(tmp_path, fine, wrong)
        told = refused("generate", "--prompts", path, "--steps", "1", "-o", tmp_path / "drawn")
        assert "a.jsonl, line 2: " in told and said in told
    assert not (tmp_path / "drawn").exists()


def test_python_says_what_it_draws() -> None:
    demo = load()
    for wrong in ("a red fox", GenerateOptions("a red fox"), ["a red fox"]):
        for call in (demo.generate, demo.planned):
            with pytest.raises(TypeError, match=r"expected a list of requests: \[GenerateOptions\('a red fox'\)\]"):
                call(wrong)


def test_cfg_counts_from_one() -> None:
    """ComfyUI adds cfg times a difference to the negative side, diffusers guidance times it to the positive one."""
    assert GenerateOptions(cfg=1.0).guidance == 0.0
    assert GenerateOptions(cfg=4.1).guidance == 3.1
    assert GenerateOptions().guidance is None
    assert replace(GenerateOptions(cfg=5.0), prompt="x").guidance == 4.0
    with pytest.raises(UserError, match="one setting"):
        GenerateOptions(guidance=1.0, cfg=2.0)
    for wrong in (0.5, float("nan"), float("inf"), 10**400):
        with pytest.raises(UserError, match="--cfg"):
            GenerateOptions(cfg=wrong)


def test_a_line_has_its_own_settings(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"prompt": "a", "cfg": 3, "steps": 4},
        {"prompt": "b", "guidance": 0},
        {"prompt": "c", "negative": "d"},
    )
    a, b, c = requests_of([], path, {"guidance": 5.0, "steps": 9}, 1)
    assert (a.guidance, a.steps, b.guidance, b.steps, c.guidance, c.negative) == (2.0, 4, 0, 9, 5.0, "d")


def test_the_command_lines_settings_are_for_pictures_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "fox.png")
    saved(tmp_path / "cat.png")
    path = lines(tmp_path, {"prompt": "a", "image": "fox.png"}, {"prompt": "b", "image": "cat.png", "strength": 0.2})
    base = {"strength": 0.7, "mask": "hat.png", "cfg": 3.0}
    a, b = requests_of([], path, base, 1)
    assert (a.image, a.strength, a.mask, b.strength) == ("fox.png", 0.7, "hat.png", 0.2)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: --mask without a picture"):
        requests_of([], lines(tmp_path, {"prompt": "a"}), base, 1)
    with pytest.raises(UserError, match=r"^--mask without a picture"):
        requests_of(["a"], path, base, 1)


def test_a_random_seed_is_drawn_once_for_all_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path, {"prompt": "c"})
    a, b, c = requests_of(["a", "b"], path, {"seed": -1}, 1)
    assert a.seed == b.seed == c.seed


def test_a_line_has_its_own_picture_to_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.png")
    path = lines(
        tmp_path,
        {"prompt": "a", "control_image": "a.png"},
        {"prompt": "b", "control_image": ["a.png", "b.png"], "controls": ["x:0.5", {"path": "y", "scale": 1}],
         "control_from": ["canny", "map"], "control_end": 0.6},
        {"prompt": "c"},
        {"prompt": "d", "controls": []},
    )  # fmt: skip
    base = {"controls": ("net.safetensors:0.8",), "control_image": ("c.png",), "control_from": ("grey",)}
    a, b, c, d = requests_of([], path, base, 1)
    assert a.controls == c.controls == (ControlUse("net.safetensors", 0.8),)
    assert (a.followed, c.followed) == ([("a.png", "grey")], [("c.png", "grey")])
    assert b.controls == (ControlUse("x", 0.5), ControlUse("y", 1.0)) and b.control_end == 0.6
    assert b.followed == [("a.png", "canny"), ("b.png", "map")]
    assert d.controls == () and d.control_image is None


def test_one_picture_may_be_for_several_controls() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    asked = GenerateOptions(controls=["a", Path("b")], control_image=picture)
    assert [image is picture and made for image, made in asked.followed] == ["map", "map"]
    assert asked == replace(asked, prompt="") and hash(asked) != hash(replace(asked, control_image=picture.copy()))
    assert [use.scale for use in asked.controls] == [None, None]
    assert replace(asked, control_from=[]).followed == asked.followed  # none named is the usual one


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"controls": "a"}, "--control without a picture to follow; name one with --control-image"),
        ({"control_image": "a.png"}, "--control-image without a ControlNet; name one with --control FILE"),
        ({"controls": "a:-1", "control_image": "a.png"}, "a: scale: got -1.0, expected a number from 0 to 10"),
        ({"controls": ["a"], "control_image": ["a", "b"]}, "--control-image: got 2 times, expected once, or once for"),
        ({"controls": "a", "control_image": "a", "control_from": "depth"}, "--control-from: got 'depth', expected one"),
        (
            {"controls": "a", "control_image": "a", "control_start": 0.5, "control_end": 0.5},
            "--control-start and --con",
        ),
        ({"controls": ["a", "b"], "control_image": "a", "control_math": "diffusers"}, "diffusers has one ControlNet"),
        (
            {"controls": "a", "control_image": "a", "control_math": "mine"},
            "--control-math: got 'mine', expected one of",
        ),
        ({"controls": [{"path": "a", "size": 3}], "control_image": "a"}, "controls: got {'path': 'a', 'size': 3}"),
        ({"controls": 5, "control_image": "a"}, "controls: got 5, expected"),
        ({"controls": "", "control_image": "a"}, "a ControlNet without a path"),
    ],
)
def test_what_of_controls_is_refused(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        GenerateOptions("cat", **wrong)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"image": 5}, "image: got 5, expected a text"),
        ({"hires": "2x"}, "hires: got '2x', expected a number"),
        ({"strength": True}, "strength: got True, expected a number"),
        ({"width": 1.5}, "width: got 1.5, expected a whole number"),
        ({"outpaint": "8,0,0,0"}, "outpaint: got '8,0,0,0', expected a list"),
        ({"sizes": 5}, "sizes: got 5, expected one of prompt, seed, width"),
        ({"control_image": ["a.png", 3]}, r"control_image: got \['a.png', 3\], expected a text or a list of them"),
    ],
)
def test_a_value_of_another_kind(wrong: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"line 1: {line}"):
        requests_of([], lines(tmp_path, {"prompt": "a", **wrong}), {}, 1)


@pytest.mark.parametrize(
    "wrong", [{"cfg": 3, "guidance": 2}, {"cfg": 0}, {"steps": 0}, {"seed": "any"}, {"guidance": True}, {"cfg": "3"}]
)
def test_a_wrong_line_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
        requests_of([], lines(tmp_path, {"prompt": "a"}, {"prompt": "b", **wrong}), {}, 1)


def test_random_seeds(tmp_path: Path) -> None:
    """One draw a line, from which its images count up; what is drawn stays, whatever else changes."""
    path = lines(tmp_path, {"prompt": "x", "seed": "random"}, {"prompt": "y", "seed": -1}, {"prompt": "z"})
    seeds = [request.seed for request in requests_of([], path, {"seed": 3}, 2)]
    assert seeds[4:] == [3, 4]
    assert seeds[1] == seeds[0] + 1
    assert len({seeds[0], seeds[2], 3}) == 3
    drawn = GenerateOptions(seed=-1)
    assert 0 <= drawn.seed < 2**32
    assert replace(drawn, prompt="x").seed == drawn.seed


@pytest.mark.parametrize("seed", ["random", "RANDOM", "-1"])
def test_a_drawn_seed_is_said_and_kept(
    seed: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    size = ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]
    assert run(["generate", "x", "--model", str(tiny), "-o", str(out), "--seed", seed, "--json", *size]) == 0
    printed = capsys.readouterr()
    (drawn,) = json.loads(printed.out)["seeds"]
    assert f"{out}  seed {drawn}" in printed.err.splitlines()
    assert recipe_of(out)["seed"] == drawn


@pytest.mark.slow
def test_words_without_quotes(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--model", str(tiny), "--width", "64", "--height", "64", "--steps", "1", "-o", str(tmp_path / "x.png")]
    assert run(["generate", "a", "red", "fox", *more]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == ['note: these are 3 prompts, a picture each; for one picture, quote it: "a red fox"']
    assert run(["generate", "a red fox", "a cat", *more]) == 0
    assert "note:" not in capsys.readouterr().err


def test_requests_with_pictures_in_memory_are_told_apart() -> None:
    """By which picture it is: arrays have no hash, and compare by element."""
    picture, path = np.zeros((64, 64, 3), np.uint8), Path("fox.png")
    one = GenerateOptions("a", image=picture, mask=picture[..., 0], seed=2**40)
    assert one == replace(one, prompt="a") and hash(one) == hash(replace(one))
    others = {
        replace(one, image=picture.copy()),
        replace(one, seed=1),
        replace(one, image=path),
        replace(one, fit="pad"),
    }
    assert len({one, *others}) == 5
    assert GenerateOptions("a", image=path) == GenerateOptions("a", image=Path("fox.png"))


def test_numbers_of_any_sequence() -> None:
    given = GenerateOptions(
        sigmas=torch.tensor([1, 0.5, 0]), guidance_range=[0, 1], outpaint=np.array([0, 0, 8, 0]), image="fox.png"
    )
    assert (given.sigmas, given.guidance_range, given.outpaint) == ((1, 0.5, 0), (0, 1), (0, 0, 8, 0))
    hash(given)


@pytest.mark.parametrize(
    "wrong",
    [
        {"outpaint": ()}, {"outpaint": (1, 2)}, {"outpaint": 5}, {"outpaint": (8.0, 0, 0, 0)}, {"outpaint": "a"},
        {"guidance_range": (0,)}, {"guidance_range": None}, {"sigmas": 5}, {"sigmas": "1,0"}, {"sigmas": [1, None]},
    ],
)  # fmt: skip
def test_other_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')}: got"):
        GenerateOptions(image="fox.png", **wrong)
