"""Names and sizes: every spelling maps to ours and back as others map it, and other models are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
import torch
from make_checkpoint import SIZES, component_shapes, renamed

from zimage_lite.checkpoint import gguf, safetensors
from zimage_lite.checkpoint.checkpoint import CONFIG_KEY, open_checkpoint
from zimage_lite.checkpoint.configs import text_encoder_config, transformer_config, vae_config
from zimage_lite.checkpoint.diffusers_config import config_json
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.names import (
    LLAMA_CPP_QWEN3,
    NATIVE_TRANSFORMER,
    OLD_DIFFUSERS_VAE,
    NameMap,
    flux_vae,
    natural_order,
)
from zimage_lite.checkpoint.tokenizer import tokenizer_from
from zimage_lite.config import TextEncoderConfig, TransformerConfig, VaeConfig
from zimage_lite.errors import FileFormatError, UserError, WrongModelError

Shape = tuple[int, ...]

TRANSFORMER = component_shapes(TransformerConfig())
TEXT_ENCODER = component_shapes(TextEncoderConfig())
VAE = component_shapes(VaeConfig())
MAPS = {"transformer": NATIVE_TRANSFORMER, "text_encoder": LLAMA_CPP_QWEN3, "vae": flux_vae()}
TINY = {
    component: component_shapes(config)
    for component, config in zip(("transformer", "text_encoder", "vae"), SIZES["tiny"], strict=True)
}


def foreign(component: str) -> dict[str, Shape]:
    """The tiny component as other programs name it."""
    return {name: shape for name, (_, shape) in renamed(TINY[component], MAPS[component]).items()}


def write(path: Path, shapes: dict[str, Shape], dtype: str = "BF16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of zeros."""
    header, offsets = safetensors.encode_header(
        [(name, dtype, shape) for name, shape in shapes.items()], metadata or {}
    )
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(offsets[-1] + 8 * math.prod(list(shapes.values())[-1]))
    return path


def stubs(*names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, (2, 2))


# --- Both directions, against the programs that own the names


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


# --- Detection

PREFIXES = {
    "transformer": ["", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "model."],
    "text_encoder": [
        "", "model.", "text_encoder.", "text_encoder.model.", "text_encoders.qwen3_4b.transformer.model.",
        "text_encoders.llm.model.", "language_model.model.",
    ],
    "vae": ["", "vae.", "first_stage_model."],
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["canonical", "foreign"])
@pytest.mark.parametrize(("component", "prefix"), [(part, prefix) for part in PREFIXES for prefix in PREFIXES[part]])
def test_every_prefix_is_found(tmp_path: Path, component: str, prefix: str, spelling: str) -> None:
    shapes = TINY[component] if spelling == "canonical" else foreign(component)
    path = write(tmp_path / "x.safetensors", {prefix + name: shape for name, shape in shapes.items()})
    checkpoint = open_checkpoint(path)
    config = SIZES["tiny"][list(TINY).index(component)]
    assert (checkpoint.component, checkpoint.config) == (component, config)
    assert set(checkpoint.tensors) == set(TINY[component])
    assert {name: t.shape for name, t in checkpoint.restricted_to(TINY[component]).tensors.items()} == TINY[component]
    assert ("ComfyUI" in checkpoint.layout) == (spelling == "foreign" or (prefix != "" and component != "text_encoder"))


@pytest.mark.parametrize("component", TINY)
def test_gguf_without_metadata_is_found(tmp_path: Path, component: str) -> None:
    shapes = foreign(component)
    header, _ = gguf.encode_header([(name, "f16", shape) for name, shape in shapes.items()], {})
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(2 * sum(math.prod(shape) + 16 for shape in shapes.values())))
    assert open_checkpoint(path).component == component


def test_fused_rows_belong_to_q_k_and_v_in_order(tmp_path: Path) -> None:
    tensors = open_checkpoint(write(tmp_path / "x.safetensors", foreign("transformer"))).tensors
    parts = [tensors[f"layers.1.attention.to_{x}.weight"] for x in "qkv"]
    assert [(part.parts[""].name, part.shape, part.first_row) for part in parts] == [
        ("layers.1.attention.qkv.weight", (256, 256), row) for row in (0, 256, 512)
    ]


def test_whole_checkpoint_of_comfyui(tmp_path: Path) -> None:
    """Its transformer is found among the other parts."""
    prefixes = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.qwen3_4b.transformer.model."}
    shapes = {prefix + name: shape for part, prefix in prefixes.items() for name, shape in TINY[part].items()}
    shapes |= {f"vae.{name}": shape for name, shape in foreign("vae").items()}
    shapes["text_encoders.qwen3_4b.logit_scale"] = ()
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", shapes))
    assert (checkpoint.component, set(checkpoint.tensors)) == ("transformer", set(TINY["transformer"]))


@pytest.mark.parametrize(("component", "other"), [("transformer", "vae"), ("vae", "text_encoder")])
def test_wrong_component(tmp_path: Path, component: str, other: str) -> None:
    path = write(tmp_path / "x.safetensors", TINY[component])
    with pytest.raises(WrongModelError, match=r"got a .* expected a .*"):
        open_checkpoint(path, other)


def test_pad_tokens_may_lack_a_dimension(tmp_path: Path) -> None:
    shapes = TINY["transformer"] | {"x_pad_token": (256,), "cap_pad_token": (256, 1, 1)}
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", shapes)).restricted_to(TINY["transformer"])
    assert {checkpoint.tensors[name].shape for name in ("x_pad_token", "cap_pad_token")} == {(1, 256)}


@pytest.mark.parametrize("shape", [(255,), (256, 2), (2, 128), ()])
def test_misshapen_tensor(tmp_path: Path, shape: Shape) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", TINY["transformer"] | {"x_pad_token": shape}))
    with pytest.raises(WrongModelError, match=r"x_pad_token \(shape\): got .* expected \(1, 256\)"):
        checkpoint.restricted_to(TINY["transformer"])


def test_packed_rows_are_not_reshaped(tmp_path: Path) -> None:
    """Other rows would take the wrong scales."""
    name = "layers.0.attention.to_out.0"
    shapes = foreign("transformer") | {f"{name}.weight": (1, 256, 256)}
    del shapes["layers.0.attention.out.weight"]
    kinds = [(n, "q8_0" if n.startswith(name) else "f16", shape) for n, shape in shapes.items()]
    header, offsets = gguf.encode_header(kinds, {})
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(offsets[-1] + 2**20))
    with pytest.raises(WrongModelError, match=r"\(shape\)"):
        open_checkpoint(path).restricted_to(TINY["transformer"])


# --- Other models, each as its usual file names the tensors

FLUX_VAE = stubs("decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight")
OTHERS: dict[str, tuple[dict[str, Shape], str]] = {
    "Lumina-Image-2": (
        {"cap_embedder.1.weight": (2304, 2304), "layers.0.attention.qkv.weight": (3840, 2304)},
        "Lumina-Image-2 transformer: got width 2304",
    ),
    "Lumina of another width": (
        TINY["transformer"] | {"layers.0.adaLN_modulation.1.weight": (1024, 256)},
        "Lumina-Image-2 transformer",
    ),
    "Lumina in diffusers": (stubs("time_caption_embed.caption_embedder.1.weight"), "Lumina-Image-2 transformer"),
    "Flux": (stubs("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "a Flux transformer"),
    "Flux in ComfyUI": (stubs("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "a Flux transformer"),
    "whole Flux": (
        stubs("model.diffusion_model.double_blocks.0.img_mod.lin.weight", *(f"vae.{name}" for name in FLUX_VAE)),
        "a Flux transformer",
    ),
    "Flux in diffusers": (
        stubs("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"),
        "a Flux transformer",
    ),
    "SDXL": (stubs("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"), "SDXL U-Net"),
    "whole SDXL": (
        stubs(
            "model.diffusion_model.input_blocks.0.0.weight",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            *(f"first_stage_model.{name}" for name in FLUX_VAE),
        ),
        "SDXL U-Net",
    ),
    "SDXL in diffusers": (
        stubs("add_embedding.linear_1.weight", "down_blocks.1.attentions.0.proj_in.weight"), "SDXL U-Net"
    ),
    "Stable Diffusion 1 in diffusers": (stubs("down_blocks.0.attentions.0.proj_in.weight"), "Stable Diffusion U-Net"),
    "SD3": (stubs("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3 transformer"),
    "Qwen-Image": (stubs("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"), "Qwen-Image transformer"),
    "Wan": (stubs("blocks.0.cross_attn.norm_q.weight", "patch_embedding.weight"), "Wan transformer"),
    "T5": (stubs("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"), "T5 text encoder"),
    "CLIP": (
        stubs(*(f"text_model.encoder.layers.0.self_attn.q_proj.{part}" for part in ("weight", "bias"))),
        "CLIP text encoder",
    ),
    "Qwen2": (
        stubs("model.embed_tokens.weight", *(f"model.layers.0.self_attn.q_proj.{part}" for part in ("weight", "bias"))),
        "Qwen2 text encoder",
    ),
    "Qwen2 GGUF names": (stubs("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias"), "Qwen2 text encoder"),
    "Gemma 3": (
        {f"model.{name}": shape for name, shape in TINY["text_encoder"].items()}
        | {"model.layers.0.pre_feedforward_layernorm.weight": (128,)},
        "Gemma text encoder",
    ),
    "Gemma 3 GGUF names": (foreign("text_encoder") | {"blk.0.post_ffw_norm.weight": (128,)}, "Gemma text encoder"),
    "Llama": (stubs("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"), "another language model"),
    "Llama GGUF names": (stubs("token_embd.weight", "blk.0.attn_q.weight"), "another language model"),
    "ControlNet": (
        stubs("control_all_x_embedder.2-1.weight", "control_layers.0.attention.to_q.weight"), "Z-Image ControlNet"
    ),
    "Omni": (TINY["transformer"] | {"siglip_embedder.0.weight": (1152,)}, "Z-Image Omni"),
    "pixel space": (TINY["transformer"] | {"dec_net.cond_embed.weight": (2, 2)}, "pixel-space variant"),
    "VAE of Stable Diffusion": (foreign("vae") | {"post_quant_conv.weight": (4, 4, 1, 1)}, "not the Flux VAE"),
    "unknown": (stubs("fc.weight", "head.bias"), "no model that is known here: got 2 tensors (fc.weight, head.bias)"),
    "long names": (stubs("x" * 10**5), "no model that is known here"),
}  # fmt: skip
LORAS = [
    "transformer.layers.3.attention.to_q.lora_A.weight", "diffusion_model.layers.3.attention.qkv.lora_A.weight",
    "lora_unet_layers_3_attention_to_q.lora_down.weight", "lora_transformer_layers_3_attention_to_q.lora_up.weight",
    "layers.3.attention.to_q.lora_A.default.weight", "layers.3.attention.to_q.lora.down.weight",
    "lycoris_layers_3_attention_to_q.lokr_w1", "diffusion_model.layers.3.attention.to_q.hada_w1_a",
    "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight",
]  # fmt: skip
OTHERS |= {f"LoRA {i}": (stubs(name), "this is a LoRA") for i, name in enumerate(LORAS)}


@pytest.mark.parametrize(("shapes", "message"), OTHERS.values(), ids=list(OTHERS))
def test_other_model_is_named(tmp_path: Path, shapes: dict[str, Shape], message: str) -> None:
    path = write(tmp_path / "x.safetensors", shapes)
    with pytest.raises(WrongModelError) as refused:
        open_checkpoint(path)
    assert message in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 400


# --- Formats of other programs

LAYER = "layers.0.feed_forward.w1"
FORMATS: dict[str, tuple[dict[str, tuple[str, Shape]], str]] = {
    "bitsandbytes nf4 without its state": (
        {".weight": ("U8", (8, 1)), ".weight.quant_map": ("F32", (16,)), ".weight.absmax": ("U8", (1,))},
        "w1.weight is U8, and nothing in the file says how to read it",
    ),
    "bitsandbytes int8 for one GPU": (
        {".weight": ("I8", (4, 4)), ".SCB": ("F32", (4,)), ".weight_format": ("U8", ())},
        "w1.weight_format tells of a layout for one GPU: expected 0, plain rows",
    ),
    "quanto of an unknown dtype": (
        {".weight._data": ("I16", (4, 4)), ".weight._scale": ("BF16", (4, 1))},
        "w1.weight._data: got I16, expected I8 or F8_E4M3, and a ._scale",
    ),
    "quanto int8 without a scale": ({".weight._data": ("I8", (4, 4))}, "w1.weight._data: got I8, expected I8 or F8"),
    "quanto int4 without a scale": (
        {".weight._data._data": ("U8", (4, 4)), ".weight._shift": ("BF16", (4, 1))},
        "w1.weight._data._data needs a ._scale and a ._shift beside it",
    ),
    "torchao without a scale": (
        {"._weight_qdata": ("I8", (4, 4))},
        "w1._weight_qdata: got I8, expected I8 or F8_E4M3, and a _weight_scale",
    ),
    "torchao of an unknown dtype": (
        {"._weight_qdata": ("I32", (4, 4)), "._weight_scale": ("F32", (4, 1))}, "w1._weight_qdata: got I32"
    ),
    "nunchaku": ({".qweight": ("I8", (4, 4)), ".wscales": ("BF16", (1, 4))}, "nunchaku"),
    "scaled fp8 of too few scales": (
        {".weight": ("F8_E4M3", (4, 4)), ".scale_weight": ("F32", (3,))}, "of shape (3,), expected F32 of shape ()"
    ),
    "scaled fp8 of bytes": (
        {".weight": ("U8", (4, 4)), ".scale_weight": ("F32", ())}, "w1.weight: got U8, expected F8_E4M3 or F8_E5M2"
    ),
    "mxfp8 without a marker": (
        {".weight": ("F8_E4M3", (4, 4)), ".weight_scale": ("U8", (128, 4))},
        "w1.weight_scale scales a weight, and no .comfy_quant marker says in which format",
    ),
    "fp8 in blocks": (
        {".weight": ("F8_E4M3", (4, 4)), ".weight_scale_inv": ("BF16", (1, 1))}, "w1.weight_scale_inv scales a weight"
    ),
    "int8 with nothing": ({".weight": ("I8", (4, 4))}, "w1.weight is I8, and nothing in the file says how to read it"),
}  # fmt: skip


def write_layer(path: Path, arrays: dict[str, tuple[str, Shape]], contents: dict[str, bytes] | None = None) -> Path:
    """A tiny transformer in bf16 whose LAYER is stored otherwise."""
    plain = {name: ("BF16", shape) for name, shape in foreign("transformer").items() if not name.startswith(LAYER)}
    wanted = plain | {LAYER + suffix: array for suffix, array in arrays.items()}
    header, offsets = safetensors.encode_header([(name, *array) for name, array in wanted.items()], {})
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(offsets[-1] + 8 * math.prod(list(wanted.values())[-1][1]))
        for suffix, raw in (contents or {}).items():
            file.seek(offsets[list(wanted).index(LAYER + suffix)])
            file.write(raw)
    return path


@pytest.mark.parametrize(("arrays", "message"), FORMATS.values(), ids=list(FORMATS))
def test_format_that_cannot_be_read_is_named(
    tmp_path: Path, arrays: dict[str, tuple[str, Shape]], message: str
) -> None:
    contents = {".weight_format": b"\1"} if ".weight_format" in arrays else None
    with pytest.raises((WrongModelError, FileFormatError)) as refused:
        open_checkpoint(write_layer(tmp_path / "x.safetensors", arrays, contents))
    assert message in str(refused.value)
    assert str(tmp_path / "x.safetensors") in str(refused.value)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b'{"format": "mxfp6"}', "quantized as 'mxfp6': expected int8_tensorwise, asym_w4a8_int8, convrot_w4a4, "),
        (b'{"format": "nvfp4"}', "weight_scale: got F32 of shape (4, 1), expected F8_E4M3 of shape (128, 32)"),
        (b'{"format": null}', "quantized as 'None'"),
        (b"{}", "quantized as 'None'"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 4000, "not JSON"),
        (b"{}" + b" " * 5000, "expected a short JSON text"),
        (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 32}', "convrot_groupsize: got 32"),
        (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1024}', "convrot_groupsize: got 1024"),
        (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 16.0}', "convrot_groupsize: got 16.0"),
        (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": "16"}', "convrot_groupsize: got '16'"),
        (b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": [16]}', "convrot_groupsize: got [16]"),
    ],
)
def test_comfy_quant_marker(tmp_path: Path, marker: bytes, message: str) -> None:
    arrays = {".weight": ("I8", (4, 256)), ".weight_scale": ("F32", (4, 1)), ".comfy_quant": ("U8", (len(marker),))}
    with pytest.raises(UserError) as refused:
        open_checkpoint(write_layer(tmp_path / "x.safetensors", arrays, {".comfy_quant": marker}))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({".weight": ("I8", (4, 256))}, "w1.weight_scale is missing: expected F32 of shape (4, 1)"),
        ({".weight_scale": ("F32", (4, 1))}, "int8_tensorwise needs a matrix .weight"),
        ({".weight": ("I8", (1024,)), ".weight_scale": ("F32", (4, 1))}, "int8_tensorwise needs a matrix .weight"),
        ({".weight": ("BF16", (4, 256)), ".weight_scale": ("F32", (4, 1))}, "w1.weight: got BF16 of shape (4, 256)"),
        ({".weight": ("I8", (4, 256)), ".weight_scale": ("I32", (4, 1))}, "weight_scale: got I32 of shape (4, 1)"),
        ({".weight": ("I8", (4, 256)), ".weight_scale": ("F32", (3, 1))}, "weight_scale: got F32 of shape (3, 1)"),
    ],
)
def test_comfy_int8_needs_its_parts(tmp_path: Path, arrays: dict[str, tuple[str, Shape]], message: str) -> None:
    marker = b'{"format": "int8_tensorwise"}'
    path = write_layer(
        tmp_path / "x.safetensors", arrays | {".comfy_quant": ("U8", (len(marker),))}, {".comfy_quant": marker}
    )
    with pytest.raises(UserError) as refused:
        open_checkpoint(path)
    assert message in str(refused.value)


# --- Sizes

CONFIGS = {
    "transformer": (transformer_config, TRANSFORMER, TransformerConfig()),
    "text_encoder": (text_encoder_config, TEXT_ENCODER, TextEncoderConfig()),
    "vae": (vae_config, VAE, VaeConfig()),
}


@pytest.mark.parametrize("component", CONFIGS)
def test_sizes_from_shapes(component: str) -> None:
    measure, shapes, config = CONFIGS[component]
    assert measure(shapes, {}, "x") == config
    assert measure(shapes, config_json(config), "x") == config


@pytest.mark.parametrize(
    ("component", "given"),
    [
        ("transformer", {"dim": 2560}), ("transformer", {"n_layers": 29}), ("transformer", {"n_heads": 15}),
        ("transformer", {"n_refiner_layers": 1}), ("transformer", {"cap_feat_dim": 4096}),
        ("text_encoder", {"num_hidden_layers": 35}), ("text_encoder", {"num_key_value_heads": 32}),
        ("text_encoder", {"vocab_size": 151669}), ("text_encoder", {"intermediate_size": 9729}),
        ("vae", {"latent_channels": 4}), ("vae", {"block_out_channels": [128, 256, 512]}),
    ],
)  # fmt: skip
def test_config_that_contradicts_the_shapes(component: str, given: dict[str, Any]) -> None:
    measure, shapes, _ = CONFIGS[component]
    ((name, value),) = given.items()
    said = tuple(value) if isinstance(value, list) else value
    with pytest.raises(WrongModelError) as refused:
        measure(shapes, given, "x")
    assert f"x: the config says {name} is {said}, the tensors say" in str(refused.value)


@pytest.mark.parametrize("component", CONFIGS)
def test_config_of_any_json_is_refused_or_right(component: str) -> None:
    measure, shapes, config = CONFIGS[component]
    odd = [None, "1", True, 0, -1, 1.5, 2**70, [], {}, [1, 2, 3], ["a"], [None], {"rope_theta": "x"}]
    for name in [*config.__dataclass_fields__, "rope_parameters", "use_quant_conv", "unknown"]:
        for value in odd:
            try:
                found = measure(shapes, {name: value}, "x")
            except UserError:
                continue
            said = tuple(value) if isinstance(value, list) else value
            assert found == config or getattr(found, name) == said


@pytest.mark.parametrize("component", CONFIGS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (1,), (1, 1, 1, 1, 1), (2**40, 0)])
def test_misshapen_tensors_give_no_sizes(component: str, shape: Shape) -> None:
    measure, shapes, config = CONFIGS[component]
    measured = ["cap_embedder.1.weight", "layers.0.attention.norm_q.weight", "all_x_embedder.2-1.weight"]
    measured += ["embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.weight"]
    measured += ["decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"]
    for name in measured:
        if name in shapes:
            try:
                assert measure({**shapes, name: shape}, {}, "x") != config
            except UserError as error:
                assert "\n" not in str(error)
            with pytest.raises(WrongModelError, match="is missing"):
                measure({other: shapes[other] for other in shapes if other != name}, {}, "x")


@pytest.mark.parametrize("component", TINY)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 0)])
def test_misshapen_tensors_in_a_file(tmp_path: Path, component: str, shape: Shape) -> None:
    """Any tensor of the file, not only those that sizes are taken from."""
    for name in list(TINY[component])[:40]:
        path = write(tmp_path / "x.safetensors", TINY[component] | {name: shape})
        with pytest.raises(UserError):
            open_checkpoint(path).restricted_to(TINY[component])


def test_no_name_makes_the_model_large() -> None:
    other = {"cap_embedder.1.weight": (1920, 2560), "layers.999999999.attention_norm1.weight": (1920,)}
    assert transformer_config(TRANSFORMER | other, {}, "x").n_layers <= 32


def test_head_dimensions_split_as_in_the_true_model() -> None:
    shapes = {**TRANSFORMER, "layers.0.attention.norm_q.weight": (64,)}
    assert transformer_config(shapes, {}, "x").axes_dims == (16, 24, 24)
    assert transformer_config(shapes, {"axes_dims": [32, 16, 16]}, "x").axes_dims == (32, 16, 16)


def test_last_layer_may_be_left_out() -> None:
    shapes = {name: shape for name, shape in TEXT_ENCODER.items() if not name.startswith("layers.35.")}
    assert text_encoder_config(shapes, {"num_hidden_layers": 36}, "x") == TextEncoderConfig()
    assert text_encoder_config(shapes, {}, "x") == TextEncoderConfig()


def test_rope_theta_where_transformers_5_puts_it() -> None:
    assert text_encoder_config(TEXT_ENCODER, {"rope_parameters": {"rope_theta": 5e6}}, "x").rope_theta == 5e6


def test_sizes_in_the_metadata_of_a_gguf(tmp_path: Path) -> None:
    shapes = foreign("text_encoder")
    metadata: dict[str, Any] = {"qwen3.block_count": 4, "qwen3.rope.freq_base": 5e6, "qwen3.context_length": 77}
    header, offsets = gguf.encode_header([(name, "f16", shape) for name, shape in shapes.items()], metadata)
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(offsets[-1] + 1000))
    config = open_checkpoint(path).config
    assert (config.num_hidden_layers, config.rope_theta, config.max_position_embeddings) == (4, 5e6, 77)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ('{"dim": 512}', "the config says dim is 512")])
def test_config_inside_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "x.safetensors", TINY["transformer"], metadata={CONFIG_KEY: text})
    with pytest.raises(UserError, match=message):
        open_checkpoint(path)


# --- Parts that do not go together


def test_vae_of_another_latent_space(tmp_path: Path, tiny: Path) -> None:
    vae = write(tmp_path / "vae.safetensors", foreign("vae") | {"decoder.conv_in.weight": (64, 4, 3, 3)})
    with pytest.raises(WrongModelError, match="latent channels of the VAE: got 4, expected 16"):
        open_model(tiny, {"vae": vae})


def test_text_encoder_of_another_width(tmp_path: Path, tiny: Path) -> None:
    config = replace(SIZES["tiny"][1], hidden_size=96)
    encoder = write(tmp_path / "encoder.safetensors", component_shapes(config))
    with pytest.raises(WrongModelError, match="width of the text encoder: got 96, expected 128"):
        open_model(tiny, {"text_encoder": encoder})


def test_tokenizer_with_more_tokens_than_the_encoder_has_rows(tmp_path: Path, tiny: Path) -> None:
    tokenizer = tokenizer_from(tiny / "tokenizer").tokenizer
    tokenizer.add_tokens([f"<{n}>" for n in range(320 - tokenizer.get_vocab_size())])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_model(tiny, {"tokenizer": tmp_path}).tokenizer.encode("<1>")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WrongModelError, match="the highest token: got 320, expected less than 320"):
        open_model(tiny, {"tokenizer": tmp_path})
