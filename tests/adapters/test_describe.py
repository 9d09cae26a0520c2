"""What `inspect` says of an adapter: who wrote it, of what kind and rank, and how much of it has a place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import TINY
from safetensors.torch import save_file
from trainers import ADAPTERS, mixed, peft, twice

from zimage_lite.adapters.describe import describe, is_adapter_path, lines
from zimage_lite.config import TransformerConfig
from zimage_lite.errors import UserError

CONFIGS = {"Z-Image": TransformerConfig(), "the tiny": TINY}

FOUND: dict[str, tuple[str, dict[str, int], dict[int, int], dict[float, int]]] = {
    "peft in diffusers": ("diffusers, SimpleTuner or OneTrainer", {"LoRA": 16}, {4: 16}, {1.0: 16}),
    "musubi, alpha not the rank": ("musubi-tuner, or kohya names", {"LoRA": 14}, {4: 14}, {0.5: 14}),
    "VideoX, two underscores, no to_out": ("VideoX-Fun", {"LoRA": 18}, {4: 18}, {0.75: 18}),
    "DiffSynth, bare, .default": ("DiffSynth-Studio", {"LoRA": 22}, {4: 22}, {1.0: 22}),
    "peft folder, rslora, patterns": ("PEFT", {"LoRA": 10}, {4: 8, 2: 2}, {4.0: 7, 1.5: 1, 5.656854: 2}),
    "LoKr and LoRA": ("musubi-tuner, or kohya names", {"LoRA": 3, "LoKr": 1}, {6: 3}, {1.0: 3}),
    "DoRA [1, K]": ("ai-toolkit, or converted for ComfyUI", {"DoRA": 6}, {4: 6}, {0.5: 6}),
    "LoHa": ("LyCORIS", {"LoHa": 6}, {}, {}),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_file_is(name: str, tmp_path: Path) -> None:
    found = describe(ADAPTERS[name]().write(tmp_path), CONFIGS)
    assert (found.trainer, found.kinds, found.ranks, found.scales) == FOUND[name]
    assert not found.unused and not found.unknown


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_is_told_from_a_model(name: str, tmp_path: Path) -> None:
    assert is_adapter_path(ADAPTERS[name]().write(tmp_path))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    path = peft().write(tmp_path)
    assert is_adapter_path(tmp_path)
    assert describe(tmp_path, CONFIGS).modules == 16
    shutil.copy(path, tmp_path / "other.safetensors")
    assert not is_adapter_path(tmp_path)  # told, as of a model, that there are two


def test_what_is_no_adapter(tiny: Path, tmp_path: Path) -> None:
    save_file({f"layers.{i}.attention.to_q.weight": torch.ones(64, 64) for i in (0, 1)}, tmp_path / "x.safetensors")
    for path in (tiny, tiny / "transformer", tmp_path / "x.safetensors", tmp_path / "absent"):
        assert not is_adapter_path(path)


def test_names_of_a_text_encoder_tell_no_trainer(tmp_path: Path) -> None:
    made = ADAPTERS["ai-toolkit with adaLN"]()
    made.tensors["text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)
    assert describe(made.write(tmp_path), CONFIGS).trainer == "ai-toolkit, or converted for ComfyUI"


METADATA: list[tuple[dict[str, str], str, str]] = [
    ({"software": json.dumps({"name": "ai-toolkit", "version": "1"})}, "ai-toolkit", ""),
    ({"software": "mflux"}, "mflux", ""),
    ({"ss_network_module": "networks.lora_zimage", "ss_base_model_version": "zimage"}, "musubi-tuner", "zimage"),
    ({"ot_revision": "1", "modelspec.architecture": "Z-Image/lora"}, "OneTrainer", "Z-Image/lora"),
]


@pytest.mark.parametrize(("metadata", "trainer", "base"), METADATA)
def test_what_a_file_says_of_itself(metadata: dict[str, str], trainer: str, base: str, tmp_path: Path) -> None:
    made = peft()
    made.metadata = metadata
    found = describe(made.write(tmp_path), CONFIGS)
    assert (found.trainer, found.base) == (trainer, base)


def test_for_people(tmp_path: Path) -> None:
    made = mixed()
    made.add("diffusion_model.layers.7.attention.to_q.lora_A.weight", 4, 64)
    said = "\n".join(lines(describe(made.write(tmp_path, "pencil"), CONFIGS)))
    assert "pencil: LoRA, LoKr for the tiny" in said
    assert "4 of 5 modules: 3 by LoRA, 1 by LoKr" in said
    assert "left out       1 tensor: diffusion_model.layers.7.attention.to_q.lora_A.weight" in said
    assert "4 tensors" in "\n".join(lines(describe(twice().write(tmp_path, "twice"), CONFIGS)))


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    from zimage_lite.cli import run

    made = peft()
    line = refused("inspect", made.write(tmp_path))  # neither Z-Image's nor the demo's sizes
    assert "made for another model: got [64, 64], expected [3840, 3840]" in line
    hourglass = Path(__file__).parents[1] / "data" / "hourglass_lora.safetensors"
    assert run(["inspect", str(hourglass), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapter"]
    assert (found["kinds"], found["modules"], found["ranks"]) == ({"LoRA": 35}, 35, {"8": 35})


def test_one_that_fits_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made for another model"):
        describe(peft().write(tmp_path), {"Z-Image": TransformerConfig()})


def test_what_is_wrong_with_one_for_a_small_model(tmp_path: Path) -> None:
    made = peft()
    del made.tensors[next(name for name in made.tensors if "lora_B" in name)]
    with pytest.raises(UserError, match="up missing: got down alone; the file is incomplete"):
        describe(made.write(tmp_path), CONFIGS)
