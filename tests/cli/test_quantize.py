"""The verb quantize: what it prints, what it refuses, and what it replaces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    contents,
    conversions,
    files_below,
    single,
    source_weights,
    write_source,
    written,
)

from zimage_lite.cli import run
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import targets


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return conversions(model, ("q8_0", "q4_0"), tmp_path_factory.mktemp("outputs"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["q8_0", "int8", "f16"])
def test_progress_ends_at_the_total(model: Path, tmp_path: Path, target: str) -> None:
    reports: list[tuple[int, int]] = []
    quantize(model, tmp_path / "out", target, progress=lambda *report: reports.append(report))
    total = sum(
        t.nbytes for part in ("transformer", "text_encoder", "vae") for t in source_weights(model, part).values()
    )
    done = [report[0] for report in reports]
    assert {report[1] for report in reports} == {total}
    assert done == sorted(done) and done[0] > 0 and done[-1] == total


def test_json_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(model), "--to", "q8_0", "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    result = json.loads(line)
    assert [part["component"] for part in result["written"]] == ["transformer", "text_encoder", "vae"]
    assert [part["format"] for part in result["written"]] == ["q8_0", "q8_0", "keep"]
    for part in result["written"]:
        assert part["bytes"] == sum(file.stat().st_size for file in Path(part["path"]).parent.iterdir())
        assert part["source_bytes"] == sum(t.nbytes for t in source_weights(model, part["component"]).values())
    assert result["seconds"] >= 0 and result["peak_rss_bytes"] > 1e7
    assert str(tmp_path / "out") in captured.err


def test_unknown_formats_are_answered_with_the_known_ones(model: Path, tmp_path: Path, refused) -> None:
    line = refused("quantize", model, "--to", "q9_0", "-o", tmp_path / "out")
    assert "--to" in line and "'q9_0'" in line and all(target in line for target in targets())
    line = refused("quantize", model, "--to", "q8_0", "--text-encoder-to", "q9_0", "-o", tmp_path / "out")
    assert "--text-encoder-to" in line and all(target in line for target in (*targets(), "keep"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_text_encoder_to(model: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    assert run(["quantize", str(model), "--to", "q8_0", "--text-encoder-to", "keep", "-o", str(out)]) == 0
    assert files_below(out / "text_encoder") == files_below(model / "text_encoder")
    out = tmp_path / "q4_k_m"
    assert run(["quantize", str(model), "--to", "q8_0", "--text-encoder-to", "q4_k_m", "-o", str(out)]) == 0
    assert files_below(out / "text_encoder") == files_below(outputs["q4_0"] / "text_encoder")


@pytest.mark.parametrize("args", [("vae",), ("vae", "--component", "transformer")])
def test_a_vae_stays_as_it_is(model: Path, tmp_path: Path, refused, args: tuple[str, ...]) -> None:
    line = refused("quantize", single(model, "vae"), "--to", "q8_0", "-o", tmp_path / "out", *args[1:])
    assert str(single(model, "vae")) in line
    refused("quantize", model, "--to", "q8_0", "--component", "vae", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(model: Path, tmp_path: Path, refused) -> None:
    assert "--device cuda" in refused("quantize", model, "--to", "q8_0", "--device", "cuda", "-o", tmp_path / "out")


def test_sources_that_are_none(model: Path, tmp_path: Path, refused) -> None:
    assert "no such file" in refused("quantize", tmp_path / "none", "--to", "q8_0")
    assert "transformer" in refused("quantize", tmp_path, "--to", "q8_0", "-o", tmp_path / "out")
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    assert str(text) in refused("quantize", text, "--to", "q8_0", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.slow
def test_no_output_over_its_own_source(model: Path, tmp_path: Path, refused) -> None:
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(model, copy)
    link.symlink_to(copy)
    before = files_below(copy)
    file = single(copy)
    alone = ("--component", "transformer")
    for source, out, *more in (
        (copy, copy), (copy, tmp_path), (copy, link), (link, copy), (copy, copy / "transformer"), (file, file),
        (copy, file, *alone), (copy, link / "transformer" / file.name, *alone), (copy, copy, *alone),
    ):  # fmt: skip
        line = refused("quantize", source, "--to", "q8_0", "-o", out, "--overwrite", *more)
        assert str(out) in line
    assert files_below(copy) == before and {path.name for path in tmp_path.iterdir()} == {"copy", "link"}


@pytest.mark.slow
def test_an_existing_output_is_kept_unless_told_otherwise(model: Path, outputs, tmp_path: Path, refused) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.gguf"
    shutil.copytree(outputs["q4_0"], folder)
    (folder / ".DS_Store").touch()  # Finder's, of no worth
    file.write_text("old")
    commands = (
        (folder, outputs["q8_0"], ("quantize", model, "--to", "q8_0", "-o", folder)),
        (file, written(outputs, "q8_0"), ("quantize", single(model), "--to", "q8_0", "-o", file)),
    )
    for out, wanted, command in commands:
        before = files_below(tmp_path)
        assert f"{out} exists already" in refused(*command)
        assert files_below(tmp_path) == before
        assert run([*map(str, command), "--overwrite"]) == 0
        same = files_below if out.is_dir() else contents
        assert same(out) == same(wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file.gguf"}


def test_only_a_model_is_replaced_by_a_model(model: Path, tmp_path: Path, refused) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "letter.txt").write_text("dear all")
    assert str(letters) in refused("quantize", model, "--to", "q8_0", "-o", letters, "--overwrite")
    assert str(letters) in refused("quantize", single(model), "--to", "q8_0", "-o", letters, "--overwrite")
    assert files_below(tmp_path) == {"letters/letter.txt": b"dear all"}


def test_a_report_replaces_no_input_and_no_output(model: Path, tmp_path: Path, refused) -> None:
    copy, link, out = tmp_path / "copy", tmp_path / "link", tmp_path / "out.gguf"
    shutil.copytree(model, copy)
    link.symlink_to(copy)
    (old := tmp_path / "old.json").write_text("{}")
    before = files_below(tmp_path)
    for source, report, said, *more in (
        (copy, old, f"{old} exists already; choose another name with --report, or add --overwrite"),
        (copy, single(copy), "its own source", "--overwrite"),
        (single(copy), single(copy), "its own source", "--overwrite"),
        (copy, link / "transformer" / "config.json", "lies in a folder that is read", "--overwrite"),
        (link, copy / "report.json", "lies in a folder that is read"),
        (copy, out, f"lies in the output {out}"),
        (copy, tmp_path / "none" / "report.json", "choose another place with --report"),
    ):
        line = refused(
            "quantize", source, "--to", "q8_0", "--component", "transformer", "-o", out, "--report", report, *more
        )
        assert said in line, line
    assert files_below(tmp_path) == before
    command = ("quantize", copy, "--to", "q8_0", "--component", "transformer", "-o", out, "--report", old)
    assert run([*map(str, command), "--overwrite"]) == 0
    assert set(json.loads(old.read_text())["components"]) == {"transformer"}
