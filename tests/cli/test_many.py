"""generate -o FOLDER: what is there stays, what is missing is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_lite.cli import run

Refused = Callable[..., str]
DRAW = ["generate", "--device", "cpu", "--steps", "1", "--prompts"]


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


def test_a_picture_of_another_line_is_not_taken_for_one(lines: Path, tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "pictures"
    assert run([*DRAW, str(lines), "-o", str(folder)]) == 0
    lines.write_text(lines.read_text().replace("blue", "white"))
    said = refused(*DRAW, lines, "-o", folder)
    assert "00002.png was drawn otherwise: got prompt 'a blue circle', expected 'a white circle'" in said


def test_what_needs_one_process_is_refused(lines: Path, tmp_path: Path, refused: Refused) -> None:
    assert "previews" in refused(*DRAW, lines, "-o", tmp_path / "new", "--preview", "terminal")
    assert "--workers: got 'x'" in refused(*DRAW, lines, "-o", tmp_path / "new", "--workers", "x")


def test_a_fault_is_told_as_by_one_process(lines: Path, tmp_path: Path, refused: Refused) -> None:
    assert "nowhere" in refused(*DRAW, lines, "-o", tmp_path / "new", "--model", tmp_path / "nowhere")
    assert "--ram" in refused(*DRAW, lines, "-o", tmp_path / "new", "--ram", "100MB", code=3)
