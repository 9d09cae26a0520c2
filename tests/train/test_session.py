"""Trainings that are stopped, killed and taken up again, and the files that they write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import killed_at
from lessons import FEW, goal_of, pipeline_of, session_of
from marking import always
from oracles import relative_error
from safetensors import safe_open
from safetensors.torch import load_file

from zimage_lite import GenerateOptions, Lora
from zimage_lite.cli import run
from zimage_lite.cli.train_lora import stopping
from zimage_lite.errors import UserError
from zimage_lite.plan import training
from zimage_lite.train.session import Session

pytestmark = pytest.mark.slow  # whole trainings


@pytest.fixture(scope="module")
def whole(pupil: Path, lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps in one go, with pictures on the way."""
    out = tmp_path_factory.mktemp("whole") / "my.safetensors"
    assert session_of(pupil, goal_of(lessons, out, prompts=("a blob", "two <blobs>"))).run(silent)
    return out


def silent(*_: object) -> None:
    pass


SEVEN = ("--trigger", "blob", "--steps", "7", "--rank", "4", "--rate", "1e-3", "--batch", "2", "--resolution", "64")
DRAWN = 4  # files that are written before the first step: what is preserved, and the list of it
TENSORS = 2 * 2 * 7
MOMENTS = {
    "as captions are encoded": ("pipeline.drawing:Pipeline.encode", 1),
    "as what is preserved is drawn": ("train.prior:save", 2),
    "as pictures are encoded": ("pipeline.drawing:Pipeline.encode_pictures", 2),
    "before the first step": ("train.trainer:gradients", 1),
    "between two steps": ("train.trainer:gradients", 3),
    "within a step": ("train.optimizer:AdamW.step", 5),
    "as the state is written": ("checkpoint.output:_rename", DRAWN + 5),
    "as the LoRA is written": ("checkpoint.writer:TensorWriter.write", TENSORS + TENSORS // 2),
    "as samples are drawn": ("train.session:save", 2),
    "as the file gets its name": ("checkpoint.output:_rename", DRAWN + 13),
}


def command(model: Path, lessons: Path, out: Path) -> list[str]:
    kept = model.parent / "kept.txt"
    kept.write_text("a fox\na hare\n\na hedgehog\n", encoding="utf-8")
    given = ["train-lora", lessons, "--model", model, "-o", out, "--preserve-prompts", kept, "--device", "cpu"]
    return [*map(str, given), *SEVEN, "--every", "3", "--sample", "a blob"]


@pytest.fixture(scope="module")
def never_killed(pupil: Path, lessons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("never") / "my.safetensors"
    assert run(command(pupil, lessons, out)) == 0
    return out


@pytest.mark.parametrize("moment", always("as the state is written", of=MOMENTS))
def test_killed_and_resumed_it_writes_the_same_file(
    pupil: Path, lessons: Path, never_killed: Path, tmp_path: Path, moment: str
) -> None:
    """By a real SIGKILL of `zimage-lite train-lora`."""
    out = tmp_path / "my.safetensors"
    where, number = MOMENTS[moment]
    assert killed_at(f"zimage_lite.{where}", number, *command(pupil, lessons, out))
    assert not out.exists()
    resume = ["--resume"] if (tmp_path / "my.training" / "state.safetensors").exists() else []
    assert run([*command(pupil, lessons, out), *resume]) == 0
    assert out.read_bytes() == never_killed.read_bytes()
    assert not list(tmp_path.rglob(".*.partial"))


@pytest.mark.parametrize("step", always(2, of=range(1, 7)))
def test_stopped_it_goes_on_from_that_step(pupil: Path, lessons: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """On Ctrl-C, which comes within a step."""
    goal, first = goal_of(lessons, tmp_path / "my.safetensors"), list[int]()

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "train" and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with stopping() as stop:
        session = session_of(pupil, goal)
        assert not session.run(interrupt, stop)
    assert session.done.step == step and not goal.out.exists()
    again = session_of(pupil, goal, resume=True)
    assert again.run(lambda phase, done, total: first.append(done) if phase == "train" else None)
    assert first[0] == step + 1
    assert goal.out.read_bytes() == whole.read_bytes()


def test_a_lora_that_another_program_has_open_stops_nothing(
    pupil: Path, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows it cannot be deleted then, and somebody may well try one."""
    goal, unlink = goal_of(lessons, tmp_path / "my.safetensors", every=1), Path.unlink

    def held(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step-000001.safetensors":
            raise PermissionError(13, "being used by another process")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    assert session_of(pupil, goal).run(silent)
    left = sorted(int(file.stem[-6:]) for file in goal.folder.glob("step-*.safetensors"))
    assert left == [1, 4, 5, 6, 7]


def interrupting(step: int) -> Callable[[str, int, int], None]:
    def progress(phase: str, done: int, total: int) -> None:
        if phase == "train" and done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.full_size
def test_in_8_bits_it_goes_on_alike(pupil: Path, lessons: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    one, two = (goal_of(lessons, file, replace(FEW, optimizer="adamw8bit", steps=4), 2) for file in files)
    assert session_of(pupil, one).run(silent)
    with pytest.raises(KeyboardInterrupt):
        session_of(pupil, two).run(interrupting(3))
    assert session_of(pupil, two, resume=True).run(silent)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": 5}, "rank"),
        ({"seed": 1}, "seed"),
        ({"trigger": "x"}, "trigger"),
        ({"rate_schedule": "cosine"}, "rate_schedule"),
    ],
)
def test_another_training_is_not_taken_up(
    pupil: Path, lessons: Path, whole: Path, change: dict[str, Any], told: str
) -> None:
    goal = goal_of(lessons, whole, replace(FEW, **change), prompts=("a blob", "two <blobs>"))
    session = Session(pipeline_of(pupil), goal, resume=True, overwrite=True)
    with pytest.raises(UserError, match=rf"--resume: {told} is not what this training began with: got .*, expected"):
        session.run(silent)


def test_steps_that_the_rate_follows_from_stay(pupil: Path, lessons: Path, whole: Path, tmp_path: Path) -> None:
    """Of a training that began with a falling rate; what is wrong is the schedule if that changed, too."""
    falling = replace(FEW, rate_schedule="cosine", steps=2)
    goal = goal_of(lessons, tmp_path / "a.safetensors", falling)
    assert Session(pipeline_of(pupil), goal).run(silent)
    for change, told in (
        ({"steps": 3}, "steps .*cosine.*got 3, expected 2"),
        ({"rate_schedule": "constant"}, "rate_schedule .*expected cosine"),
    ):
        other = replace(goal, options=replace(falling, **change))
        with pytest.raises(UserError, match=f"--resume: {told}"):
            Session(pipeline_of(pupil), other, resume=True, overwrite=True).run(silent)


def test_the_file_says_what_it_is(whole: Path) -> None:
    with safe_open(whole, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert metadata["ss_network_dim"] == "4" and metadata["ss_steps"] == "7"
    assert metadata["modelspec.architecture"] == "Z-Image/lora" and metadata["modelspec.trigger_phrase"] == "blob"
    assert len(names) == 2 * 2 * 7 and {name.split(".")[0] for name in names} == {"diffusion_model"}
    assert all(tensor.dtype == torch.bfloat16 and tensor.any() for tensor in load_file(whole).values())


def test_diffusers_reads_it(pupil: Path, whole: Path) -> None:
    """By its own loader; then the answer changes as ours does."""
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders import ZImageLoraLoaderMixin

    model = ZImageTransformer2DModel.from_pretrained(pupil / "transformer", torch_dtype=torch.float32)
    weights = {name: module.weight.clone() for name, module in model.named_modules() if name.endswith("w2")}
    state = ZImageLoraLoaderMixin.lora_state_dict(str(whole))
    ZImageLoraLoaderMixin.load_lora_into_transformer(state, model, adapter_name="a")
    model.fuse_lora()
    ours = load_file(whole)
    for name, before in weights.items():
        if name.startswith("layers"):
            a, b = (ours[f"diffusion_model.{name}.lora_{half}.weight"].float() for half in "AB")
            after = model.get_submodule(name).weight
            assert relative_error(after - before, b @ a) <= 1e-3, name


def test_it_is_drawn_with(pupil: Path, whole: Path) -> None:
    request = GenerateOptions("a blob", 64, 64, steps=2)
    plain, taught = pipeline_of(pupil).generate([request, replace(request, loras=(Lora(str(whole)),))])
    assert not torch.equal(plain, taught)


def test_the_page_shows_how_it_went(whole: Path) -> None:
    folder = whole.parent / "my.training"
    page = (folder / "index.html").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == [f"step-{step:06}-{number}.png" for step in (3, 6, 7) for number in (0, 1)]
    assert page.count("data:image/jpeg") == 6 and "two &lt;blobs&gt;" in page and "7 of 7" in page
    assert len(list(folder.glob("step-*.safetensors"))) == 3


def test_what_it_preserves_is_drawn_first(
    pupil: Path, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_PRESERVED_LEAST", 4)
    options = replace(FEW, steps=1)
    goal = goal_of(lessons, tmp_path / "my.safetensors", options, preserve=("fox", "hare"))
    session = session_of(pupil, goal)
    assert len(session.preserved) == 4
    assert [one.caption for one in session.preserved[:3]] == [
        "a fox of colour 0", "a hare of colour 1", "a fox of colour 2",
    ]  # fmt: skip
    chosen = session.trainer.draws.chosen(0)
    assert chosen[0] < 3 <= chosen[1]
    assert session.run(silent)
    assert len(list((goal.folder / "preserved").glob("*.png"))) == 4


def test_begun_anew_nothing_of_before_is_left(pupil: Path, lessons: Path, tmp_path: Path) -> None:
    """But for what somebody else put there."""
    goal = goal_of(lessons, tmp_path / "my.safetensors", replace(FEW, steps=1))
    (goal.folder / "preserved").mkdir(parents=True)
    for name in ("state.safetensors", "step-000900.safetensors", "step-000900-0.png", "preserved/0000.png", "my.txt"):
        (goal.folder / name).write_bytes(b"?")
    with pytest.raises(UserError, match="holds a training"):
        session_of(pupil, goal)
    assert Session(pipeline_of(pupil), goal, overwrite=True).run(silent)
    found = {str(path.relative_to(goal.folder)) for path in goal.folder.rglob("*") if path.is_file()}
    assert found == {"state.safetensors", "step-000001.safetensors", "index.html", "my.txt"}
