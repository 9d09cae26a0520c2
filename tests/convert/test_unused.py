"""What a file holds beside the model is left out, named once, and never a reason to refuse."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from bare_files import FILES, comfy_files
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.cli import run
from zimage_lite.convert.catalog import stored_parts
from zimage_lite.convert.inspection import inspect
from zimage_lite.convert.quantize import quantize


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy_files(tmp_path_factory.mktemp("bare") / "model", 320)


LORA = {
    "layers.0.attention.qkv.lora_down.weight": torch.zeros(4, 256),
    "layers.0.attention.qkv.lora_up.weight": torch.zeros(767, 4),  # no multiple of three
    "layers.0.attention.qkv.alpha": torch.tensor(4.0),
}
NAN = {"norm_final.weight": torch.full((256,), float("nan"))}
BESIDE: dict[str, tuple[dict[str, Tensor], str]] = {
    "NaN": (NAN, "norm_final.weight"),
    "LoRA": (LORA, "an unmerged LoRA (3 tensors)"),
    "LoRA of a trainer": (
        {f"lora_unet_layers_0_attention_qkv.{part}": torch.zeros(4, 4) for part in ("lora_down.weight", "alpha")},
        "an unmerged LoRA (2 tensors)",
    ),
    "LoKr": ({"lycoris_layers_0_attention_to_q.lokr_w1": torch.zeros(4, 4)}, "an unmerged LoRA (1 tensors)"),
    "part of a fused matrix": ({"layers.0.attention.qkv.step": torch.zeros(4)}, "layers.0.attention.qkv.step"),
    "both": (LORA | NAN, "an unmerged LoRA (3 tensors), norm_final.weight"),
}


def converted(source: Path, out: Path) -> tuple[bytes, list[str]]:
    notes: list[str] = []
    quantize(source, out, "q8_0", note=notes.append)
    return out.read_bytes(), notes


@pytest.mark.slow
@pytest.mark.parametrize("case", [*BESIDE, "EMA"])
def test_output_is_that_of_the_model_alone(tmp_path: Path, bare: Path, case: str) -> None:
    weights = load_file(bare / FILES["transformer"])
    copies = {f"ema.{name}": tensor * 2 for name, tensor in weights.items()}
    extra, said = BESIDE.get(case, (copies, f"ema.cap_embedder.0.weight, ema.cap_embedder.1.bias, "
                                            f"ema.cap_embedder.1.weight and {len(copies) - 3} more"))  # fmt: skip
    save_file(weights | extra, tmp_path / "more.safetensors")
    plain, no_notes = converted(bare / FILES["transformer"], tmp_path / "plain.gguf")
    found, notes = converted(tmp_path / "more.safetensors", tmp_path / "more.gguf")
    assert found == plain
    assert no_notes == []
    assert notes == [f"transformer: left out what the model has no use for: {said}"]


def test_head_of_a_language_model(tmp_path: Path, bare: Path) -> None:
    head = {"lm_head.weight": torch.full((320, 128), float("inf"))}
    save_file(load_file(bare / FILES["text_encoder"]) | head, tmp_path / "more.safetensors")
    plain, _ = converted(bare / FILES["text_encoder"], tmp_path / "plain.gguf")
    found, notes = converted(tmp_path / "more.safetensors", tmp_path / "more.gguf")
    assert found == plain
    assert notes == ["text_encoder: left out what the model has no use for: lm_head.weight"]


def test_inspect_says_what_a_transformer_carries(
    tmp_path: Path, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(bare / FILES["transformer"])
    save_file(weights | LORA, tmp_path / "left.safetensors")
    assert run(["inspect", str(tmp_path / "left.safetensors"), "--json"]) == 0
    told = capsys.readouterr()
    assert "left.safetensors: Z-Image transformer" in told.err + told.out
    assert "an unmerged LoRA (3 tensors)" in told.err + told.out
    part = json.loads(told.out.splitlines()[-1])["parts"][0]
    plain = inspect(bare / FILES["transformer"])[0]
    assert sorted(part["unused"]) == sorted(LORA)
    assert (part["tensors"], part["bytes"]) == (plain.tensors, plain.bytes)


def test_lora_alone_is_still_one(tmp_path: Path) -> None:
    save_file(LORA, tmp_path / "lora.safetensors")
    assert "this is a LoRA" in str(inspect(tmp_path / "lora.safetensors")[0].refusal)


def test_copies_are_neither_planned_nor_drawn_with(
    tmp_path: Path, bare: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same plan and the same picture, and a note about the LoRA."""
    weights = load_file(bare / FILES["transformer"])
    copies = {f"ema.{name}": torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
    save_file(weights | copies | LORA, tmp_path / "more.safetensors")
    pictures, parts = [], []
    for name, transformer in (("plain", bare / FILES["transformer"]), ("more", tmp_path / "more.safetensors")):
        command = ["generate", "x", "--model", bare, "--transformer", transformer, "--tokenizer", tiny / "tokenizer"]
        size = ["--width", 64, "--height", 64, "--steps", 1, "--device", "cpu", "--no-cache"]
        assert run([str(word) for word in (*command, *size, "-o", tmp_path / f"{name}.png")]) == 0
        assert ("an unmerged LoRA (3 tensors), which has no effect" in capsys.readouterr().err) == (name == "more")
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
        parts.append(sorted(stored_parts(open_checkpoint(transformer)), key=attrgetter("name")))
    assert pictures[0] == pictures[1]
    assert parts[0] == parts[1]
