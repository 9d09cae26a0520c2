"""Folders of pictures: captions, sizes, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zimage_lite.errors import UserError
from zimage_lite.train.dataset import bucket, examples_in, fingerprint


def picture(path: Path, size: tuple[int, int] = (32, 32), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), value, np.uint8)).save(path)
    return path


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 64))
def test_a_size_is_near_the_pictures_own(size: tuple[int, int], sixteens: int) -> None:
    resolution = 16 * sixteens
    width, height = bucket(size, resolution)
    assert width % 16 == height % 16 == 0 and min(width, height) >= 16
    assert width * height <= max(resolution**2, 16 * max(width, height))  # what is very long is one row of patches
    assert all(found <= max(own, 16) + 8 for found, own in zip((width, height), size, strict=True))


def test_known_shapes() -> None:
    assert bucket((1000, 1000), 512) == (512, 512)
    assert bucket((1920, 1080), 512) == (672, 384)
    assert bucket((300, 200), 512) == (304, 192)


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    for name, caption in (("b.png", "a  red\nfox\n"), ("a.jpg", "\ufeffGlimm, a fox")):
        picture(tmp_path / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "._a.jpg").write_bytes(b"as macOS leaves beside a.jpg on other disks")
    found = examples_in(tmp_path, "glimm")
    assert [(one.path.name, one.caption) for one in found] == [("a.jpg", "Glimm, a fox"), ("b.png", "glimm, a red fox")]


def test_a_trigger_is_caption_enough(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    assert [one.caption for one in examples_in(tmp_path, "glimm")] == ["glimm"]


@pytest.mark.parametrize(("of_picture", "of_caption"), [("file_name", "text"), ("image_path", "caption")])
def test_captions_are_read_from_json_lines(tmp_path: Path, of_picture: str, of_caption: str) -> None:
    picture(tmp_path / "some" / "a.png")
    picture(tmp_path / "not-listed.png")
    line = json.dumps({of_picture: "some/a.png", of_caption: "a red fox"})
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n\n", encoding="utf-8")
    assert [(one.path.name, one.caption) for one in examples_in(tmp_path)] == [("a.png", "a red fox")]


def test_a_fingerprint_tells_pictures_and_captions_apart(tmp_path: Path) -> None:
    def of(value: int, caption: str) -> str:
        picture(tmp_path / "a.png", value=value).with_suffix(".txt").write_text(caption, encoding="utf-8")
        return fingerprint(examples_in(tmp_path))

    found = [of(0, "a"), of(1, "a"), of(0, "b"), of(0, "a")]
    assert len(set(found)) == 3 and found[0] == found[3]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no pictures in it"),
        ({"a.png": None}, "a.png: no caption; write what it shows to a.txt"),
        ({"a.png": None, "b.png": None}, "a.png: no caption, and 1 more"),
        ({"a.png": None, "a.txt": b"\xff\xfe"}, "a.txt: not text in UTF-8"),
        ({"x.jsonl": b"{", "a.png": None}, "line 1: not JSON"),
        ({"x.jsonl": b"[1]", "a.png": None}, "line 1: got"),
        ({"x.jsonl": b'{"text": "a"}', "a.png": None}, "line 1: got"),
        ({"x.jsonl": b'{"file_name": "b.png", "text": "a"}'}, "line 1: no such picture: got b.png"),
        ({"x.jsonl": b"", "y.jsonl": b""}, "2 JSON Lines files"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, files: dict[str, bytes | None], told: str) -> None:
    for name, content in files.items():
        if content is None:
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        examples_in(tmp_path)
    assert told in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        examples_in(tmp_path / "none")
