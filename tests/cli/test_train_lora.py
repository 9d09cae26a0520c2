"""`zimage-lite train-lora`: what it writes and says, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from zimage_lite.cli import run
from zimage_lite.pipeline.drawing import Pipeline


def train(model: Path, lessons: Path, out: Path, *options: str) -> int:
    return run(["train-lora", str(lessons), "--model", str(model), "-o", str(out), "--device", "cpu", *options])


@pytest.mark.slow
def test_it_says_what_it_did(pupil: Path, lessons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my.safetensors"
    few = ("--steps", "2", "--rank", "2", "--resolution", "64", "--json")
    assert train(pupil, lessons, out, *few) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["lora"] == str(out) and said["steps"] == 2 and 0 < said["loss"] < 10
    for verb in (["inspect"], ["generate", "x", "--model", str(pupil), "--device", "cpu", "--lora"]):
        assert run([*verb, str(tmp_path / "my.training" / "state.safetensors")]) == 2
        assert "the state of a training, for train-lora --resume, not a LoRA" in capsys.readouterr().err
    assert said["measured"]["peak_rss_bytes"] > 0 < said["planned_ram_bytes"]
    assert "3 pictures, 2 steps; planned: " in captured.err and captured.err.count("planned") == 1
    assert train(pupil, lessons, out, *few) == 2  # not in the place of what is there
    assert "exists already" in capsys.readouterr().err
    assert train(pupil, lessons, out, *few, "--resume") == 2
    assert "training has ended; for more --steps, go on with --resume --overwrite" in capsys.readouterr().err
    assert train(pupil, lessons, out, "--steps", "3", *few[2:], "--resume", "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


def test_an_optimizer_that_is_not_installed(
    pupil: Path, lessons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage_lite.train.optimizer.find_spec", lambda name: None)
    assert train(pupil, lessons, tmp_path / "my.safetensors", "--optimizer", "adamw8bit") == 2
    line = (
        "error: --optimizer adamw8bit needs bitsandbytes: got none; pip install bitsandbytes, or use --optimizer adamw"
    )
    assert line in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--steps", "0"), "--steps: got 0, expected 1 to a million"),
        (("--rank", "1000"), "--rank: got 1000"),
        (("--rate", "nan"), "--rate: got nan"),
        (("--batch", "0"), "--batch: got 0"),
        (("--resolution", "100"), "--resolution: got 100, expected a multiple of 16"),
        (("--seed", "-1"), "--seed: got -1"),
        (("--every", "0"), "--every: got 0"),
        (("--preserve", "dog"), "--preserve puts its word in the place of the trigger; name the --trigger, too"),
        (("--trigger", "bow", "--preserve", "Bow"), "--preserve: got Bow, expected another word than the trigger"),
        (("--preserve-prompts", "none.txt"), "none.txt: cannot be read (No such file or directory)"),
        (("--preserve-weight", "0"), "--preserve-weight: got 0.0, expected above 0"),
        (("--resume",), "--resume: no "),
        (("--ram", "many"), "not a size"),
        (("--assistant", "none.safetensors"), "none.safetensors"),
    ],
)
def test_what_cannot_be_is_refused(
    pupil: Path, lessons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    assert train(pupil, lessons, tmp_path / "my.safetensors", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_file_is_refused(pupil: Path, lessons: Path, tmp_path: Path) -> None:
    assert train(pupil, lessons, tmp_path / "my.gguf") == 2


def test_too_little_memory_is_refused_before_anything_is_read(
    pupil: Path, lessons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(pupil, lessons, tmp_path / "my.safetensors", "--ram", "50MB") == 3
    assert "does not fit --ram" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_samples_take_no_more_than_training(
    pupil: Path, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where blocks could be re-encoded for them, whose loops take 200 MB: what a refusal named did not do then."""
    monkeypatch.setattr("zimage_lite.pipeline.backends.cpu_int8_is_faster", lambda: True)
    assert run(["quantize", str(pupil), "--to", "q8_0", "-o", str(tmp_path / "small")]) == 0
    made = []
    monkeypatch.setattr(Pipeline, "require_fit", lambda self, requests: made.append(self.choice.compute.int8))
    few = ("--steps", "1", "--rank", "2", "--resolution", "64")
    assert train(tmp_path / "small", lessons, tmp_path / "my.safetensors", *few) == 0
    assert made == [False]


@pytest.mark.slow
def test_a_full_disk(
    pupil: Path, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    few = ("--steps", "1", "--rank", "2", "--resolution", "64")
    assert train(pupil, lessons, tmp_path / "my.safetensors", *few) == 2
    assert "state.safetensors: the disk is full; free some space" in capsys.readouterr().err
