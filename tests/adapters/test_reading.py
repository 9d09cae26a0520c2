"""Whatever wrote an adapter, each weight changes as its trainer's formula says, at any strength."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from adapted import STRENGTHS, Weights, assert_applied, joined_modules
from adapter_files import TINY, Described, qkv
from trainers import ADAPTERS, mixed, peft, peft_folder, twice

from zimage_lite.adapters.reading import kinds, open_adapter
from zimage_lite.errors import UserError

ONE = {
    "transformer.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 64),
    "transformer.layers.0.attention.to_q.lora_B.weight": torch.ones(64, 4),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_change_as_the_formula_says(name: str, weights: Weights, tmp_path: Path) -> None:
    described = ADAPTERS[name]()
    adapter = open_adapter(described.write(tmp_path), TINY)
    adapter.checked()
    wanted = weights.wanted(described)
    for m in STRENGTHS:
        scaled = {
            module: tuple(None if part is None else m * part for part in parts) for module, parts in wanted.items()
        }
        assert_applied([(adapter, m)], scaled, weights)


def test_what_a_file_holds_is_counted(tmp_path: Path) -> None:
    made = mixed()
    made.add("diffusion_model.layers.7.attention.to_q.lora_A.weight", 4, 64)  # the model has two layers
    made.tensors |= {
        name: torch.ones(4, 64) for name in ("bundle_emb.cat.t5xxl", "text_encoder.layers.0.mlp.lora_A.weight")
    }
    found = open_adapter(made.write(tmp_path, "pencil"), TINY)
    raw = (tmp_path / "pencil.safetensors").read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert found.name == "pencil"
    assert found.checked() == tuple(hashlib.sha256(part).hexdigest() for part in (raw, body))
    assert kinds(found) == {"LoRA": 3, "LoKr": 1}
    assert {one.update.shapes(one.target)["a"][0] for one in found.applied} == {
        6,
        16,
    }  # the LoKr has 8 columns of w1 and rank 2
    assert set(found.modules) == {*qkv("layers.0"), "layers.0.feed_forward.w1"}
    assert found.unknown == ("layers.7.attention.to_q",)
    assert len(found.unused) == 3


def test_what_is_said_twice_is_told(tmp_path: Path) -> None:
    """Copies under fused and native names."""
    found = open_adapter(twice().write(tmp_path), TINY)
    ends = ("lora_down.weight", "lora_up.weight")
    copies = [f"lora_unet_layers_0_attention_{name}.{end}" for name in ("qkv", "out") for end in ends]
    assert sorted(found.unused) == sorted(copies) and not found.unknown


def test_what_belongs_to_no_changed_module_is_told(tmp_path: Path) -> None:
    """PEFT's modules_to_save are whole weights of other modules."""
    made = Described(tensors=dict(ONE))
    made.add("base_model.model.cap_embedder.1.weight", 64, 32)
    assert open_adapter(made.write(tmp_path), TINY).unused == ("base_model.model.cap_embedder.1.weight",)


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    described = peft()
    first = described.write(tmp_path, "adapter-00001-of-00002")
    with pytest.raises(UserError, match="part 1 of 2 of a sharded file"):
        open_adapter(first, TINY)
    described.write(tmp_path, "adapter-00002-of-00002")
    with pytest.raises(UserError, match="an adapter in 2 shards, expected one file"):
        open_adapter(tmp_path, TINY)


def test_a_peft_file_named_alone_is_as_strong_as_its_folder(weights: Weights, tmp_path: Path) -> None:
    described = peft_folder()
    adapter = open_adapter(described.write(tmp_path) / "adapter_model.safetensors", TINY)
    assert_applied([(adapter, 1.0)], weights.wanted(described), weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "much"}, "got much and 4, expected numbers"),
        ({"lora_alpha": float("nan")}, "got nan and 4, expected numbers"),
        ({"lora_alpha": 8, "rank_pattern": {"(": 4}}, r"rank_pattern: got \{'\(': 4\}, expected patterns"),
        ({"lora_alpha": 8, "alpha_pattern": [4]}, "alpha_pattern: got .4., expected patterns"),
        ({"use_cayley_neumann": False}, r"use_cayley_neumann: got False, expected one of \(True,\)"),
        ({"peft_type": "ADALORA"}, "peft_type: got 'ADALORA', expected one of"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4', expected one of"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication: got"),
        ({"coft": True}, "coft: got True"),
    ],
)
def test_a_config_that_cannot_be_meant(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_adapter(Described(tensors=dict(ONE), config=config).write(tmp_path), TINY)


@pytest.mark.parametrize("said", ["{", "[" * 100_000])
def test_metadata_that_is_not_json(said: str, tmp_path: Path) -> None:
    made = Described(tensors=dict(ONE), metadata={"lora_adapter_metadata": said})
    with pytest.raises(UserError, match="lora_adapter_metadata is not JSON"):
        open_adapter(made.write(tmp_path), TINY)


@pytest.mark.parametrize("said", ["null", "[]", "3", "{}"])
def test_metadata_that_says_nothing(said: str, tmp_path: Path) -> None:
    made = Described(tensors=dict(ONE), metadata={"lora_adapter_metadata": said})
    assert open_adapter(made.write(tmp_path), TINY).modules == ("layers.0.attention.to_q",)


def test_what_is_no_number_is_told(tmp_path: Path) -> None:
    made = Described(tensors={name: tensor.clone() for name, tensor in ONE.items()})
    made.tensors["transformer.layers.0.attention.to_q.lora_A.weight"][2, 3] = float("nan")
    with pytest.raises(UserError, match=r"lora_A.weight holds NaN or infinity"):
        open_adapter(made.write(tmp_path), TINY).checked()


def test_a_file_that_changes_while_it_is_open_is_told(weights: Weights, tmp_path: Path) -> None:
    """When it is checked, and when its parts are read for a block, which is later."""
    opened = open_adapter(peft().write(tmp_path), TINY)
    modules = joined_modules([(opened, 1.0)], weights)
    opened.checked()
    peft().write(tmp_path)  # as long as before
    for read in (opened.checked, modules["layers.0.attention.to_q"].made):
        with pytest.raises(UserError, match="changed while it was read"):
            read()
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        opened.checked()
