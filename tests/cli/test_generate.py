"""The command line's contract: what it writes, what it prints, and how it refuses bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import psnr
from PIL import Image
from safetensors.torch import load_file, save_file

from zimage_lite.cli import run
from zimage_lite.pictures.saving import recipe_of

SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--device", "cpu")
Refused = Callable[..., str]


def generate(*args: object) -> int:
    return run([str(arg) for arg in ("generate", *SMALL, *args)])


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "image.png"


def test_image_carries_its_recipe(tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("你好 cat", "--model", tiny, "-o", out, "--seed", 5, "--json") == 0
    image = Image.open(out)
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    (file,), found = (tiny / "transformer").glob("*.safetensors"), recipe_of(out)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["model"] == {"name": "tiny", "format": "bf16", "sha256": sha256}
    wanted = {"prompt": "你好 cat", "seed": 5, "steps": 2, "size": [64, 64], "loras": []}
    assert {key: found[key] for key in wanted} == wanted
    assert found["version"].startswith("zimage-lite ") and not {"strength", "image", "hires"} & found.keys()
    assert image.text["parameters"].startswith("你好 cat\nSteps: 2, Sampler: Euler, Schedule type: Simple, ")
    assert f"Model hash: {sha256[:10]}, Model: tiny" in image.text["parameters"]
    stdout = capsys.readouterr().out.splitlines()
    assert len(stdout) == 1
    result = json.loads(stdout[0])
    assert result["images"] == [str(out)]
    assert (result["backend"], result["compute"]) == ("reference", "16bit")
    assert set(result["phases"]) == {"encode", "denoise", "decode"}
    sampled = max(phase["measured"]["peak_rss_bytes"] for phase in result["phases"].values())
    assert result["peak_rss_bytes"] >= 0.99 * sampled  # the kernel adds both up lazily, page by page


def pixels(path: Path) -> list[int]:
    return list(Image.open(path).tobytes())


@pytest.mark.slow
def test_several_images_count_up_in_name_and_seed(tiny: Path, out: Path) -> None:
    assert generate("cat", "dog", "--model", tiny, "-o", out, "--seed", 7, "--count", 2) == 0
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["image-1.png", "image-2.png", "image-3.png", "image-4.png"]
    recipes = [recipe_of(out.parent / name) for name in names]
    assert [(own["prompt"], own["seed"]) for own in recipes] == [("cat", 7), ("cat", 8), ("dog", 7), ("dog", 8)]
    assert generate("dog", "--model", tiny, "-o", out, "--seed", 8) == 0
    assert pixels(out) == pixels(out.parent / "image-4.png")


def test_prompts_from_a_file(tiny: Path, out: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "cat", "seed": 3, "width": 96}\n\n{"prompt": "狗"}\n', encoding="utf-8")
    assert generate("--prompts", prompts, "--model", tiny, "-o", out) == 0
    assert [Image.open(out.with_name(f"image-{n}.png")).size for n in (1, 2)] == [(96, 64), (64, 64)]


def test_empty_prompt(tiny: Path, out: Path) -> None:
    assert generate("", "--model", tiny, "-o", out) == 0
    assert out.exists()


@pytest.mark.parametrize(
    "to", ["q8_0", "int8", *(pytest.param(to, marks=pytest.mark.slow) for to in ("q4_0", "f16", "bf16"))]
)
def test_output_of_quantize_is_a_model(tiny: Path, out: Path, to: str) -> None:
    """Relative to 16 bits: 8-bit formats stay close, 4-bit ones recognisable, on weights that are pure noise."""
    folder = out.parent / to
    assert run(["quantize", str(tiny), "-o", str(folder), "--to", to]) == 0
    assert generate("cat", "--model", folder, "-o", out) == 0
    truth = out.with_name("truth.png")
    assert generate("cat", "--model", tiny, "-o", truth) == 0
    images = [torch.tensor(pixels(path)) for path in (out, truth)]
    assert psnr(*images, 255) >= {"q4_0": 12, "q8_0": 30, "int8": 30}.get(to, 35)
    assert recipe_of(out)["model"]["format"] == to


def test_inspect(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny), "--json"]) == 0
    printed = capsys.readouterr()
    parts = {part["name"]: part for part in json.loads(printed.out)["parts"]}
    assert set(parts) == {"transformer", "text_encoder", "vae"}
    stored = load_file(only_file(tiny / "transformer"))
    assert parts["transformer"]["formats"]["bf16"]["tensors"] == len(stored)
    assert parts["transformer"]["formats"]["bf16"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert "Z-Image transformer, diffusers safetensors" in printed.err


def test_inspect_says_what_would_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    assert run(["inspect", str(tmp_path / "flux.safetensors")]) == 2
    assert "refused" in (said := capsys.readouterr().out)
    assert "Flux" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--width", 100), "--width: got 100, expected a multiple of 16, such as 96 or 112"),
        (("--height", 0), "--height: got 0"),
        (("--height", -16), "--height: got -16"),
        (("--steps", 0), "--steps: got 0"),
        (("--steps", "many"), "many"),
        (("--seed", -2), "--seed: got -2"),
        (("--count", 0), "--count: got 0"),
        (("--guidance", -1), "--guidance"),
        (("--guidance", "nan"), "--guidance: got nan"),
        (("--shift", 0), "--shift"),
        (("--shift", "inf"), "--shift: got inf"),
        (("--ram", "lots"), "not a size: got 'lots'"),
        (("--vram", "6 apples"), "not a size"),
        (("--ram", "0GB"), "not a size"),
        (("--ram", ""), "not a size: got ''"),
        (("--vram", ""), "not a size: got ''"),
        (("-o", "image.gif"), "expected a name that ends in .png, .jpg, .jpeg, .webp"),
        (("-o", "/no/such/folder/image.png"), "no such folder"),
        (("-o", "-"), "-o -: pictures do not go to stdout"),
        (("-o", "/dev/null"), "/dev/null: neither a file nor a folder; choose another name with -o"),
        (("--compute", "4bit"), "4bit"),
        (("--compute", "int8"), "--compute int8: got bf16, expected weights quantized to integers"),
        (("--device", "abacus"), "abacus"),
        (("--model", "/no/such/model"), "/no/such/model: no such model"),
        (("--transformer", "/no/such/file.gguf"), "/no/such/file.gguf: no such file"),
        (("--tokenizer", "/no/such"), "/no/such: no tokenizer"),
        (("--prompts", "/no/such.jsonl"), "cannot be read"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
def test_bad_arguments(tiny: Path, out: Path, refused: Refused, args: tuple, says: str) -> None:
    line = refused("generate", "cat", "--model", tiny, "-o", out, *SMALL, *args)
    assert says in line
    assert not out.exists()


def test_kernels_that_cannot_run(tiny: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_kernels._triton.interpreted", lambda: False)
    line = refused("generate", "cat", "--model", tiny, "-o", out, *SMALL, "--device", "cpu", "--backend", "triton")
    assert "--backend triton: got tensors on cpu, expected cuda; use auto or reference" in line
    assert not out.exists()


def test_no_prompt(tiny: Path, out: Path, refused: Refused) -> None:
    assert "no prompt" in refused("generate", "--model", tiny, "-o", out)


@pytest.mark.parametrize("line", ["cat", "[1]", '{"seed": 1}', '{"prompt": 3}', '{"prompt": "a", "size": 3}', "\\xff"])
def test_bad_prompt_file(tiny: Path, out: Path, tmp_path: Path, refused: Refused, line: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(line.encode().replace(b"\\xff", b"\xff"))
    assert "p.jsonl" in refused("generate", "--prompts", tmp_path / "p.jsonl", "--model", tiny, "-o", out)


def test_unknown_format_lists_the_known_ones(tiny: Path, out: Path, refused: Refused) -> None:
    line = refused("quantize", tiny, "-o", out.parent / "x", "--to", "q17")
    assert all(name in line for name in ("q8_0", "q4_0", "int8"))


def test_crash_of_our_own_keeps_its_traceback(tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("zimage_lite.pipeline.decode.decode_as_planned", broken)
    with pytest.raises(ZeroDivisionError):
        generate("cat", "--model", tiny, "-o", out)
    assert not out.exists()


def test_folders_are_never_replaced_by_pictures(tiny: Path, out: Path, refused: Refused) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    assert "is a folder" in refused("generate", "cat", "--model", tiny, "-o", out, *SMALL)
    assert (out / "precious.txt").read_text() == "kept"


def test_overwrite_replaces_models_only(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    models = tmp_path / "models"
    assert run(["quantize", str(tiny), "--to", "q8_0", "-o", str(models)]) == 0
    assert run(["quantize", str(tiny), "--to", "q4_0", "-o", str(models), "--overwrite"]) == 0
    (models / "loras").mkdir()
    command = ("quantize", tiny, "--to", "q8_0", "-o", models, "--overwrite")
    assert "loras" in refused(*command)
    assert (models / "loras").is_dir()


def test_file_names_end_as_their_container_says(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    command = ("quantize", tiny, "--component", "transformer", "--to", "q8_0", "-o", tmp_path / "x.safetensors")
    assert "expected .gguf" in refused(*command)


@pytest.mark.parametrize("verb", ["inspect", "generate", "quantize"])
def test_names_too_long_for_the_disk(refused: Refused, verb: str) -> None:
    name = "x" * 300
    more = {"inspect": [name], "generate": ["cat", "--model", name], "quantize": [name, "--to", "q8_0"]}[verb]
    assert "too long" in refused(verb, *more)


def test_prompt_files_as_windows_writes_them(tiny: Path, out: Path, tmp_path: Path, refused: Refused) -> None:
    """A byte order mark in front, and a line separator inside a string."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\r\n', encoding="utf-8-sig")
    assert generate("--prompts", tmp_path / "p.jsonl", "--model", tiny, "-o", out) == 0
    assert recipe_of(out)["prompt"] == "a\u2028b"
    command, wanted = ("generate", "--prompts", tmp_path / "p.jsonl", "--model", tiny, "-o", out), '{"prompt": "..."'
    (tmp_path / "p.jsonl").write_text("[" * 200_000)
    assert "p.jsonl, line 1: not JSON" in (told := refused(*command)) and wanted in told
    (tmp_path / "p.jsonl").write_text("\n")
    assert "p.jsonl: no prompt" in (told := refused(*command)) and wanted in told


def test_inspect_shows_every_part_of_a_crowded_folder(tiny: Path, tmp_path: Path, capsys) -> None:
    for name in ("diffusion_models/a.safetensors", "diffusion_models/b.safetensors", "vae/ae.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(only_file(tiny / ("vae" if "vae" in name else "transformer")), tmp_path / name)
    assert run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "several files" in said
    assert "vae: Flux VAE" in said


@pytest.mark.slow  # hundreds of prompts
def test_many_prompts_stay_inside_the_plan(tiny: Path) -> None:
    """Captions are refined a few at a time, and what is kept of each is planned for."""
    from zimage_lite import GenerateOptions, load

    pipeline = load(tiny, device="cpu")
    fixed = []
    for count in (1, 60):
        requests = [GenerateOptions(f"{n} cats", 16, 16, steps=1) for n in range(count)]
        assert len(pipeline.generate(requests)) == count
        plan = pipeline.plans["denoise"]
        assert pipeline.meter.phases["denoise"]["peak_rss_bytes"] <= plan.peak_ram_bytes
        fixed.append(sum(plan.fixed.values()))  # without what the process took before, which changes
    kept = 32 * 256 * 4 * 60  # the refined captions alone
    assert fixed[1] >= fixed[0] + kept - 10**6
