"""What a file is: every prefix is found, other models and formats are named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from make_checkpoint import SIZES
from stubs import TINY, Shape, foreign, stubs, write

from zimage_lite.checkpoint import gguf, safetensors
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.errors import FileFormatError, UserError, WrongModelError

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
        stubs("control_layers.0.attention.to_q.weight"), "a part of a Z-Image ControlNet"
    ),
    "Omni without its refiner": (TINY["transformer"] | {"siglip_pad_token": (1, 256)}, "siglip_embedder.1.weight"),
    "pixel space": (TINY["transformer"] | {"dec_net.cond_embed.weight": (2, 2)}, "Zeta-Chroma or its like"),
    "answers with pictures": (TINY["transformer"] | {"__x0__": ()}, "as Zeta-Chroma does"),
    "Ming-Image": (TINY["transformer"] | {"__ming_image__": ()}, "Ming-Image"),
    "SigLIP of one size": (
        stubs("vision_model.embeddings.patch_embedding.bias", "vision_model.encoder.layers.0.self_attn.out_proj.weight")
        | {"vision_model.embeddings.position_embedding.weight": (729, 16),
           "vision_model.encoder.layers.0.mlp.fc1.weight": (16, 16),
           "vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14)},
        "as SigLIP2's naflex towers have",
    ),
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
