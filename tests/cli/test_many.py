"""generate -o FOLDER: what is there stays, what is missing is drawn."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from trained_loras import save_lora

from zimage_lite.api import open_named
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.cli import run

Refused = Callable[..., str]
DRAW = ["generate", "--device", "cpu", "--steps", "1", "--prompts"]
SIZE = ["--width", "64", "--height", "64"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    colours = ("red", "blue", "green")
    path.write_text("\n".join(json.dumps({"prompt": f"a {name} circle", "seed": 4}) for name in colours))
    return path


@pytest.mark.slow
def test_a_second_run_draws_what_is_missing(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, single = tmp_path / "pictures", tmp_path / "x.png"
    assert run([*DRAW, str(lines), "-o", str(single)]) == 0
    assert run([*DRAW, str(lines), "-o", str(folder), "--json"]) == 0
    paths = [folder / f"0000{number}.png" for number in (1, 2, 3)]
    files = [path.read_bytes() for path in paths]
    assert files == [(tmp_path / f"x-{number}.png").read_bytes() for number in (1, 2, 3)]
    assert json.loads(capsys.readouterr().out)["drawn"] == 3
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    (folder / ".00003.png.99999999.partial").touch()  # of a run that was killed
    assert run([*DRAW, str(lines), "-o", str(folder), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["drawn"], found["kept"]) == (1, 2) and "2 of 3 pictures are there already" in said.err
    assert [path.read_bytes() for path in paths] == files and paths[0].stat().st_mtime_ns == before
    assert sorted(folder.iterdir()) == paths


@pytest.mark.slow
def test_a_picture_of_another_line_is_not_taken_for_one(lines: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "pictures"
    assert run([*DRAW, str(lines), "-o", str(folder)]) == 0
    lines.write_text(lines.read_text().replace("blue", "white"))
    said = refused(*DRAW, lines, "-o", folder)
    assert "00002.png was drawn otherwise: got prompt 'a blue circle', expected 'a white circle'" in said


def drawn_otherwise(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """What the first picture that is there differs by, as the last line says it."""
    capsys.readouterr()
    assert run([str(word) for word in command]) == 2
    found = re.search(r"00001.png was drawn otherwise: got (.*); name another folder", capsys.readouterr().err)
    assert found
    return found[1]


def test_all_that_decides_a_picture_is_compared(
    lines: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model, LoRA or ControlNet, and settings that the lines do not name; of the files what is in them."""
    folder, demo, lora = tmp_path / "pictures", open_named(DEMO, {}), tmp_path / "ink.safetensors"
    vae = model_folder(DEMO) / "vae"
    picture = tmp_path / "edges.png"
    Image.new("RGB", (64, 64)).save(picture)
    net = ["--control", "demo", "--control-image", str(picture)]
    save_lora(lora, demo.transformer.config)
    assert run([*DRAW, str(lines), "-o", str(folder), "--lora", f"{lora}:0.5", *net]) == 0
    there = {path: path.read_bytes() for path in folder.iterdir()}

    again = lora.rename(tmp_path / "renamed.safetensors")
    moved = shutil.copytree(model_folder(DEMO), tmp_path / "moved")
    same = [*DRAW, str(lines), "-o", str(folder), "--lora", f"{again}:0.5", "--model", str(moved), "--ram", "8GB"]
    capsys.readouterr()
    assert run([*same, *SIZE, *net, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 0

    draw, ink = [*DRAW, lines, "-o", folder], ["--lora", f"{again}:0.5"]
    assert drawn_otherwise(capsys, *draw, *net) == "loras ['ink'], expected []"
    assert drawn_otherwise(capsys, *draw, *net, "--lora", again) == "loras: strength 0.5, expected 1.0"
    assert drawn_otherwise(capsys, *draw, *ink) == "controls ['edges-8steps'], expected []"
    assert drawn_otherwise(capsys, *draw, *ink, *net, "--variation", 20) == "variation 0.0, expected 20.0"
    assert drawn_otherwise(capsys, *draw, "--model", tiny).startswith("model: sha256 ")
    assert (
        drawn_otherwise(capsys, *draw, *ink, *net, "--model", DEMO, "--vae", vae) == "parts: vae None, expected 'vae'"
    )
    save_lora(again, demo.transformer.config, seed=1)
    assert drawn_otherwise(capsys, *draw, *ink, *net).startswith("loras: sha256 ")
    assert {path: path.read_bytes() for path in folder.iterdir()} == there


def test_what_needs_one_process_is_refused(lines: Path, tmp_path: Path, refused: Refused) -> None:
    assert "previews" in refused(*DRAW, lines, "-o", tmp_path / "new", "--preview", "terminal")
    assert "--workers: got 'x'" in refused(*DRAW, lines, "-o", tmp_path / "new", "--workers", "x")


def test_a_fault_is_told_as_by_one_process(lines: Path, tmp_path: Path, refused: Refused) -> None:
    assert "nowhere" in refused(*DRAW, lines, "-o", tmp_path / "new", "--model", tmp_path / "nowhere")
    assert "--ram" in refused(*DRAW, lines, "-o", tmp_path / "new", "--ram", "100MB", code=3)
