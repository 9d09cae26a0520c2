"""Names and sizes: every spelling maps to ours and back as others map it, and other models are refused by name."""

from __future__ import annotations

import gguf as gguf_py
import pytest
import torch
from stubs import TEXT_ENCODER, TRANSFORMER, VAE, Shape

from zimage_lite.checkpoint.diffusers_config import config_json
from zimage_lite.checkpoint.names import (
    LLAMA_CPP_QWEN3,
    NATIVE_TRANSFORMER,
    OLD_DIFFUSERS_VAE,
    NameMap,
    flux_vae,
    natural_order,
)
from zimage_lite.config import TextEncoderConfig, TransformerConfig, VaeConfig


@pytest.mark.parametrize(
    ("name_map", "shapes", "n_canonical", "n_foreign"),
    [
        (NATIVE_TRANSFORMER, TRANSFORMER, 521, 453),
        (LLAMA_CPP_QWEN3, TEXT_ENCODER, 398, 398),
        (flux_vae(), VAE, 244, 244),
    ],
    ids=["transformer", "text encoder", "VAE"],
)
def test_there_and_back(name_map: NameMap, shapes: dict[str, Shape], n_canonical: int, n_foreign: int) -> None:
    renamed_names = name_map.to_foreign(shapes)
    assert (len(shapes), len(renamed_names)) == (n_canonical, n_foreign)
    assert sorted(name for parts in renamed_names.values() for name in parts) == sorted(shapes)
    for name, parts in renamed_names.items():
        assert name_map.to_canonical(name) == parts
    for name in shapes:
        assert name_map.to_canonical(name) == (name,)  # ours is left alone, so a mixture of both comes out right


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_our_names_and_shapes_are_those_of_diffusers(component: str) -> None:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    kind, config, ours = {
        "transformer": (ZImageTransformer2DModel, TransformerConfig(), TRANSFORMER),
        "vae": (AutoencoderKL, VaeConfig(), VAE),
    }[component]
    with torch.device("meta"):
        model = kind.from_config(config_json(config))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == ours


def test_our_text_encoder_names_and_shapes_are_those_of_transformers() -> None:
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**config_json(TextEncoderConfig())))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == TEXT_ENCODER


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_transformer_names_as_diffusers_converts_them(prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    native = NATIVE_TRANSFORMER.to_foreign(TRANSFORMER)
    number = {name: float(i) for i, name in enumerate(TRANSFORMER)}  # tells the tensors apart
    tensors = {prefix + name: torch.tensor([number[part] for part in parts]) for name, parts in native.items()}
    converted = convert_z_image_transformer_checkpoint_to_diffusers(tensors)
    assert {name: tensor.item() for name, tensor in converted.items()} == number


def test_vae_names_as_diffusers_converts_them() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    number = {name: float(i) for i, name in enumerate(VAE)}
    tensors = {}
    for name, (part,) in flux_vae().to_foreign(VAE).items():
        rank = 4 if ".attn_1." in name and name.endswith("weight") and "norm" not in name else len(VAE[part])
        tensors[name] = torch.full((1,) * rank, number[part])
    converted = convert_ldm_vae_checkpoint(tensors, config_json(VaeConfig()))
    assert {name: tensor.item() for name, tensor in converted.items()} == number
    assert {name: tensor.ndim for name, tensor in converted.items()} == {name: len(VAE[name]) for name in VAE}


def test_text_encoder_names_as_llama_cpp_has_them() -> None:
    llama_cpp = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.QWEN3, TextEncoderConfig().num_hidden_layers)
    for name, parts in LLAMA_CPP_QWEN3.to_foreign(TEXT_ENCODER).items():
        assert name == llama_cpp.get_name(f"model.{parts[0]}", try_suffixes=(".weight",))


def test_vae_attention_names_of_old_diffusers() -> None:
    mid = "decoder.mid_block.attentions.0."
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    assert {name: OLD_DIFFUSERS_VAE.to_canonical(f"{mid}{name}.weight") for name in old} == {
        name: (f"{mid}{new}.weight",) for name, new in old.items()
    }
    assert all(OLD_DIFFUSERS_VAE.to_canonical(name) == (name,) for name in VAE)


def test_layers_sort_by_number() -> None:
    assert sorted(["layers.10.w", "layers.2.w", "embed", "layers.2.a"], key=natural_order) == [
        "embed", "layers.2.a", "layers.2.w", "layers.10.w",
    ]  # fmt: skip


def test_native_names_as_comfyui_has_them() -> None:
    embedders = ["x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    final = ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    wanted = {f"{layer}.{part}" for layer in embedders + final for part in ("weight", "bias")}
    wanted |= {"x_pad_token", "cap_pad_token", "cap_embedder.0.weight"}
    block = ["attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm"]
    block += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    block += ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
    modulated = [f"layers.{i}" for i in range(30)] + [f"noise_refiner.{i}" for i in range(2)]
    for name in [*modulated, "context_refiner.0", "context_refiner.1"]:
        wanted |= {f"{name}.{part}.weight" for part in block}
    wanted |= {f"{name}.adaLN_modulation.0.{part}" for name in modulated for part in ("weight", "bias")}
    assert set(NATIVE_TRANSFORMER.to_foreign(TRANSFORMER)) == wanted
