"""Adapters of a pipeline: opened once, looked at again when their file changes, never applied unsound."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import Weights
from adapter_files import TINY
from trainers import ADAPTERS, mixed, peft_folder

from zimage_lite.adapters.library import AdapterLibrary, said_of
from zimage_lite.adapters.load import load_of
from zimage_lite.adapters.reading import open_adapter
from zimage_lite.adapters.updates import Dora
from zimage_lite.config import Lora
from zimage_lite.errors import UserError


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def library(tmp_path: Path, told: list[str]) -> AdapterLibrary:
    return AdapterLibrary(TINY, told.append, Weights(tmp_path).stored)


def test_opened_once_and_again_when_it_changes(library: AdapterLibrary, told: list[str], tmp_path: Path) -> None:
    path = str(ADAPTERS["peft in diffusers"]().write(tmp_path, "mine"))
    first, second = (library.of([Lora(path, m)]) for m in (1.0, 0.5))
    assert first.adapters[0][0] is second.adapters[0][0]
    assert told == ["mine: LoRA on 16 of 16 modules"]
    mixed().write(tmp_path, "mine")
    assert len(library.of([Lora(path, 1.0)]).adapters[0][0].modules) == 4
    assert told[1:] == ["mine: LoRA on 3, LoKr on 1 of 4 modules"]


def test_the_config_beside_it_counts_too(library: AdapterLibrary, tmp_path: Path) -> None:
    made = peft_folder()
    assert made.config
    folder = made.write(tmp_path)
    first = library.of([Lora(str(folder))]).adapters[0][0]
    (folder / "adapter_config.json").write_text(json.dumps({**made.config, "lora_alpha": 80}))
    second = library.of([Lora(str(folder))]).adapters[0][0]
    scales = [one.applied[0].update.scale for one in (first, second)]
    assert scales[1] == 10 * scales[0]


def test_an_ending_that_is_left_out(library: AdapterLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it reads like an id of the Hub's."""
    monkeypatch.chdir(tmp_path)
    Path("loras").mkdir()
    ADAPTERS["peft in diffusers"]().write(Path("loras"), "mine")
    with pytest.raises(UserError, match=r"did you mean loras/mine\.safetensors\?"):
        library.of([Lora("loras/mine")])


def test_what_has_no_place_is_told(tmp_path: Path) -> None:
    made = mixed()
    made.add("diffusion_model.layers.7.attention.to_q.lora_A.weight", 4, 64)
    said = said_of(open_adapter(made.write(tmp_path), TINY))
    assert said.endswith("of 5 modules; 1 tensor left out (diffusion_model.layers.7.attention.to_q.lora_A.weight)")


def test_strength_0_costs_nothing_but_has_to_be_an_adapter(library: AdapterLibrary, tmp_path: Path) -> None:
    path = ADAPTERS["peft in diffusers"]().write(tmp_path)
    assert not library.of([Lora(str(path), 0.0)])
    with pytest.raises(UserError, match="nothing"):
        library.of([Lora(str(tmp_path / "nothing.safetensors"), 0.0)])


def test_strength_of_blocks(library: AdapterLibrary, tmp_path: Path) -> None:
    """Of what is not applied at all, nothing is planned; what is left out of one adapter is none of another's."""
    path = str(ADAPTERS["peft in diffusers"]().write(tmp_path))
    lora, other = Lora(path, 2.0, {"layers": 0, "layers.1": -0.5}), Lora(path, 0.3)
    strengths = {
        module: [m for _, m in joined.applied]
        for module, joined in library.of([lora, other]).modules(torch.float32).items()
    }
    assert strengths["layers.0.attention.to_q"] == [0.3]
    assert strengths["layers.1.attention.to_q"] == [-1.0, 0.3]
    assert strengths["noise_refiner.0.attention.to_q"] == [2.0, 0.3]
    assert "layers.0" not in load_of(library.of([lora]), "fp32").bytes
    (told,) = library.told([lora])
    assert told["blocks"] == {"layers": 0.0, "layers.1": -0.5} and told["strength"] == 2.0
    with pytest.raises(UserError, match=r"got layers\.2, expected blocks of layers\.0-1"):
        library.of([Lora(path, 1.0, {"layers.2": 1})])


def test_recipes_name_what_was_drawn(library: AdapterLibrary, tmp_path: Path) -> None:
    """Not what lies there by now."""
    path = ADAPTERS["peft in diffusers"]().write(tmp_path)
    loras, sha256 = [Lora(str(path), 1.0)], hashlib.sha256(path.read_bytes()).hexdigest()
    library.of(loras)
    mixed().write(tmp_path)
    assert [one["sha256"] for one in library.told(loras)] == [sha256]


@pytest.mark.parametrize("end", ["", "much", "0,8", "0.5:x"])
def test_a_strength_that_is_none(library: AdapterLibrary, end: str, tmp_path: Path) -> None:
    path = ADAPTERS["peft in diffusers"]().write(tmp_path)
    with pytest.raises(UserError, match=rf"^{path}: strength: got '{end}', expected a number"):
        library.of([Lora.of(f"{path}:{end}")])


def test_an_unsound_one_is_refused_each_time(library: AdapterLibrary, told: list[str], tmp_path: Path) -> None:
    made = mixed()
    made.tensors["lora_unet_layers_0_attention_qkv.lora_up.weight"][5, 1] = torch.inf
    path = str(made.write(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match=r"lora_up\.weight holds NaN or infinity"):
            library.of([Lora(path, 1.0)])
    assert not told


def test_dora_is_measured_once(library: AdapterLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, count = str(ADAPTERS["DoRA [1, K]"]().write(tmp_path)), 0
    measure = Dora.measure

    def counted(self: Dora, *given: Any) -> None:
        nonlocal count
        count += 1
        measure(self, *given)

    monkeypatch.setattr(Dora, "measure", counted)
    AdapterLibrary(TINY, [].append).of([Lora(path, 1.0)])
    assert count == 0
    for _ in range(2):
        library.of([Lora(path, 1.0)])
    assert count == 4  # three linears, and q, k and v as one


def test_what_a_plan_counts(library: AdapterLibrary, tmp_path: Path) -> None:
    made = ADAPTERS["ai-toolkit with adaLN"]()
    for module in ("cap_embedder.1", "t_embedder.mlp.0"):
        made.lora(module, module)
    adapters = library.of([Lora(str(made.write(tmp_path)), 1.0)])
    load = load_of(adapters, "bf16")
    assert load.bytes.keys() == load.flops.keys() == load.columns.keys() == {"layers.0", "layers.1"}
    # Rank 4, in 16: on four linears of 64 by 64, two of 170 by 64, one of 64 by 170.
    assert load.flops["layers.0"] == 2 * 16 * (4 * 128 + 3 * 234)
    assert load.bytes["layers.0"] == 2 * 16 * (4 * 128 + 3 * 234)
    assert load.columns["layers.0"] == 6 * 64 + 170
    assert load.rest == 2 * 16 * (32 + 64)
    assert load.time == 4 * 16 * (2 * (64 + 256) + 1024 + 256)  # always in float32
    assert load_of(library.of([]), "bf16").bytes == {}
