"""compare: figures against others' code, pictures against those of generate, the sheet, and where it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparing import BLUE, RED, SHORT, compare, table
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from skimage.metrics import peak_signal_noise_ratio

from zimage_lite import Pipeline, load
from zimage_lite.checkpoint.model_card import DEMO, control_place, model_folder
from zimage_lite.cli import run
from zimage_lite.compare.contact_sheet import Layout
from zimage_lite.compare.models import SHEET_ROWS, measured, picture_path, sheet
from zimage_lite.errors import BudgetError
from zimage_lite.memory.machine import CUDA_CONTEXT_BYTES
from zimage_lite.pictures.saving import recipe_of

pytestmark = pytest.mark.slow  # pictures of several models

HOURGLASS = Path(__file__).parent.parent / "data" / "hourglass_lora.safetensors"

Refused = Callable[..., str]


# --- The command


def test_pictures_figures_and_sheet(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prompts = ("--prompt", RED, "--prompt", BLUE, "--count", 2, "--seed", 5)
    assert compare(DEMO, models / "q8_0", models / "q4_0", *prompts, "-o", out, "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert len(printed.out.splitlines()) == 1 and result == json.loads((out / "result.json").read_text())
    assert "LPIPS is left out: its package is not installed" in printed.err
    assert [one["seed"] for one in result["images"]] == [5, 6, 5, 6]
    assert [model["label"] for model in result["models"]] == ["demo", "q8_0", "q4_0"]
    reference, *others = result["models"]
    assert "alike" not in reference
    drawn = {model["label"]: pictures(out, model["label"]) for model in result["models"]}
    for model in others:
        truth = list(zip(drawn["demo"], drawn[model["label"]], strict=True))
        psnr = [peak_signal_noise_ratio(a, b) if (a != b).any() else 100 for a, b in truth]
        assert model["alike"]["psnr_db"]["each"] == pytest.approx(psnr, abs=0.006)  # rounded to two digits
        assert model["alike"]["psnr_db"]["mean"] == pytest.approx(np.mean(psnr), abs=0.006)
        assert model["alike"]["psnr_db"]["worst"] == min(model["alike"]["psnr_db"]["each"])
        assert set(model["alike"]) == {"psnr_db", "ssim"}
    close, far = (model["alike"]["psnr_db"]["mean"] for model in others)
    assert close > far + 6  # four bits more are 24 dB in the weights, and this is a quarter of that
    assert reference["bytes"] == weight_bytes(model_folder(DEMO)) - control_place(DEMO).stat().st_size
    assert others[1]["bytes"] == weight_bytes(models / "q4_0") < others[0]["bytes"] < reference["bytes"]
    for model in result["models"]:
        assert 0 < model["peak_rss_bytes"] <= model["planned_rss_bytes"] and model["peak_vram_bytes"] is None
        assert model["seconds"] > 0 and model["step_seconds"] > 0
    with Image.open(out / "sheet.png") as found:
        assert found.size == Layout(3, [(64, 64)] * 4).size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "result.json", "sheet.png"]


def pictures(out: Path, label: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / "pictures" / label).iterdir())]


def weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.gguf") for path in model.rglob(kind))


def test_they_are_the_pictures_of_generate(models: Path, tmp_path: Path) -> None:
    """The second model with the second prompt, but for rounding: two prompts that are encoded together are summed up in
    another order, and products in 8 bits, where the CPU has units for them, carry that on. Without the LoRA a channel
    differs by 40."""
    prompts, picture = tmp_path / "p.jsonl", tmp_path / "red.png"
    Image.new("RGB", (70, 50), "red").save(picture)
    lines = [{"prompt": RED}, {"prompt": BLUE, "seed": 9, "image": str(picture), "loras": [str(HOURGLASS)]}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert compare(DEMO, models / "q4_0", "--prompts", prompts, "-o", tmp_path / "out") == 0
    one = tmp_path / "one.png"
    options = ["--seed", "9", "--image", str(picture), "--lora", str(HOURGLASS), *map(str, SHORT)]
    assert run(["generate", BLUE, "--model", str(models / "q4_0"), "-o", str(one), *options]) == 0
    ours, theirs = Image.open(tmp_path / "out" / "pictures" / "q4_0" / "0002.png"), Image.open(one)
    assert ours.size == (70, 50)
    assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 8  # 4 with VNNI, 0 without
    said, wanted = recipe_of(Path(ours.filename)), recipe_of(one)
    assert wanted["model"].pop("sha256") and said == wanted  # to compute it would disturb what is measured
    asked = json.loads((tmp_path / "out" / "result.json").read_text())["images"]
    assert [one["loras"] for one in asked] == [[], said["loras"]] and said["loras"]


def test_one_file_takes_the_rest_from_the_reference(models: Path, tmp_path: Path) -> None:
    """Its pictures differ from those of the whole model, whose text encoder is quantized as well."""
    out = tmp_path / "s.png"
    assert compare(DEMO, models / "alone.gguf", models / "q4_0", "--prompt", RED, "-o", out) == 0
    alone, whole = json.loads((tmp_path / "s.json").read_text())["models"][1:]
    assert (alone["label"], alone["format"], alone["text_encoder_format"]) == ("alone.gguf", "q4_0", "bf16")
    assert alone["bytes"] > whole["bytes"] and alone["alike"] != whole["alike"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.png"]


def test_models_of_one_name(models: Path, tmp_path: Path) -> None:
    """Also where only the case differs, which some disks do not see."""
    twin = shutil.copytree(models / "q4_0", tmp_path / "Q8_0")
    assert compare(models / "q8_0", twin, "--prompt", RED, "-o", tmp_path / "s.png") == 0
    labels = [model["label"] for model in json.loads((tmp_path / "s.json").read_text())["models"]]
    assert labels == ["q8_0", "Q8_0-2"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((DEMO, DEMO, "--prompt", RED), "demo: named twice"),
        ((DEMO, "{q}/q4_0", "{q}/../{name}/q4_0", "--prompt", RED), "q4_0: named twice"),
        ((DEMO, "{q}/q4_0"), "no prompt"),
        ((DEMO, "--prompt", RED), "QUANTIZED"),
        ((DEMO, "/no/such/model", "--prompt", RED), "/no/such/model: no such model"),
        ((DEMO, "{tiny}", "--prompt", RED), "dim of the transformer: got 256, expected 384, as demo has"),
        ((DEMO, "{q}/q4_0", "--prompts", "/no/such.jsonl"), "cannot be read"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "--width", 100), "--width: got 100"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "--count", 0), "--count: got 0"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "-o", "/no/such/folder/s.png"), "no such folder"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "-o", "/no/such/folder/new"), "no such folder"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "-o", "{q}/alone.gguf/s.png"), "no such folder"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "-o", "{q}"), "exists already"),
        ((DEMO, "{q}/q4_0", "--prompt", RED, "--compute", "int8"), "--compute int8: got bf16"),
    ],
)
def test_bad_arguments(models: Path, tiny: Path, tmp_path: Path, refused: Refused, args: tuple, says: str) -> None:
    filled = [str(arg).format(q=models, name=models.name, tiny=tiny) for arg in args]
    out = [] if "-o" in filled else ["-o", tmp_path / "s.png"]
    before = sorted(models.rglob("*"))
    assert says in refused("compare", *filled, *out, "--steps", 2, "--device", "cpu")
    assert sorted(models.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["s.png", "s.json"])
def test_folders_are_never_replaced(models: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    (tmp_path / name).mkdir()
    assert "is a folder" in refused("compare", DEMO, models / "q4_0", "--prompt", RED, "-o", tmp_path / "s.png")


@pytest.mark.parametrize("out", ["new", "s.png"])
def test_a_failure_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    """The second model turns out to be damaged when the first one has drawn."""
    (tmp_path / "work").mkdir()
    tensors = load_file(next((model_folder(DEMO) / "transformer").glob("*.safetensors")))
    tensors["layers.1.feed_forward.w1.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors")
    assert compare(DEMO, tmp_path / "bad.safetensors", "--prompt", RED, "-o", tmp_path / "work" / out) == 2
    *_, drawn, error = capsys.readouterr().err.splitlines()
    assert drawn.startswith("demo ") and "layers.1.feed_forward.w1.weight holds NaN" in error
    assert list((tmp_path / "work").iterdir()) == []


def test_what_does_not_fit_is_refused_first(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of the model, and before another one has drawn."""
    fits = Pipeline.require_fit

    def require_fit(pipeline: Pipeline, requests: Any) -> None:
        if pipeline.model.name == "q4_0":
            raise BudgetError("denoise: it takes more")
        fits(pipeline, requests)

    monkeypatch.setattr(Pipeline, "require_fit", require_fit)
    assert compare(DEMO, models / "q4_0", "--prompt", RED, "-o", tmp_path / "s.png") == 3
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("note: LPIPS") and error == "error: q4_0: denoise: it takes more"
    assert compare(DEMO, models / "q4_0", "--prompt", RED, "-o", tmp_path / "s.png", "--ram", "1MB") == 3
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: demo: ") and "--ram" in error and list(tmp_path.iterdir()) == []


def test_gpu_memory_is_that_of_the_process() -> None:
    """What the allocator took, and the CUDA context, as in all other figures."""
    pipeline = load(DEMO, device="cpu")
    pipeline.meter.step_seconds.extend([2.0, 1.0, 1.0])
    for name, reserved in (("encode", 10**9), ("denoise", 3 * 10**9)):
        pipeline.meter.phases[name] = {"seconds": 1.5, "peak_rss_bytes": 7.0, "peak_reserved_bytes": reserved}
    pipeline.plans["denoise"] = SimpleNamespace(peak_ram_bytes=8)  # type: ignore[assignment]
    found = measured(pipeline, 2)
    assert found["peak_vram_bytes"] == 3 * 10**9 + CUDA_CONTEXT_BYTES
    assert (found["seconds"], found["seconds_per_image"], found["step_seconds"]) == (3.0, 1.5, 1.0)


# --- LPIPS


def test_lpips(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network that stands in for the package's and keeps what it is given."""
    given = list[tuple[torch.Tensor, torch.Tensor]]()

    class Network(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            given.append((a, b))
            return (a - b).abs().mean().view(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(__spec__=True, LPIPS=lambda net, verbose: Network()))
    out, prompts = tmp_path / "out", tmp_path / "p.jsonl"
    lines = [{"prompt": RED}, {"prompt": "a", "height": 16}, {"prompt": RED, "seed": 2}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    assert compare(DEMO, models / "q4_0", "--prompts", prompts, "-o", out) == 0
    result = json.loads((out / "result.json").read_text())
    found = result["models"][1]["alike"]["lpips"]
    one, two = (float((a - b).abs().mean()) for a, b in given)
    assert found["each"] == [pytest.approx(one, abs=1e-5), None, pytest.approx(two, abs=1e-5)]  # 16 pixels are too few
    assert found["worst"] == pytest.approx(max(one, two), abs=1e-5)
    assert found["mean"] == pytest.approx((one + two) / 2, abs=2e-5)
    reference = given[0][0]
    assert reference.shape == (1, 3, 64, 64) and reference.dtype == torch.float32
    back = ((reference[0].permute(1, 2, 0) + 1) * 127.5).round().byte()
    assert torch.equal(back, torch.tensor(pictures(out, "demo")[0]))
    assert result["lpips"] == "AlexNet" and table(result).header[-1] == "LPIPS"


def test_lpips_without_its_network(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fetch(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(__spec__=True, LPIPS=fetch))
    assert compare(DEMO, models / "q4_0", "--prompt", RED, "-o", tmp_path / "s.png") == 0
    assert "LPIPS is left out: its network cannot be loaded (no route to host)" in capsys.readouterr().err


def test_of_many_prompts_the_least_alike_are_shown(tmp_path: Path) -> None:
    count = SHEET_ROWS + 8
    psnr = [20.0 + (7 * i) % count for i in range(count)]
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(picture_path(tmp_path / label, i))
    facts = {"format": "q8_0", "bytes": 10**9}
    alike = {"psnr_db": {"each": psnr, "mean": 1.0, "worst": 1.0}}
    images = [{"prompt": "x", "seed": i, "size": [16, 16]} for i in range(count)]
    made = sheet(
        {"models": [{"label": "a", **facts}, {"label": "b", **facts, "alike": alike}], "images": images}, tmp_path
    )
    layout = Layout(2, [(16, 16)] * SHEET_ROWS)
    assert made.size == layout.size
    shown = [made.getpixel(layout.picture(row, 0)[:2])[0] for row in range(SHEET_ROWS)]
    assert shown == [i for i in range(count) if psnr[i] < 20 + SHEET_ROWS]
