"""One adapter of each kind that is met, spelled as the tool that writes it does, with what it does to the weights."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from adapter_files import ATTENTION, BLOCKS, FEED_FORWARD, KOHYA, Described, kohya, qkv, size, w31
from lycoris_files import (
    dora,
    dora_by_length,
    dora_of_others,
    loha,
    lokr_decomposed,
    lokr_fused,
    lokr_whole,
    mixed,
    rotated_inputs,
    rotated_outputs,
)

DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")


def peft() -> Described:
    made = Described()
    for module in ATTENTION:
        made.lora(f"transformer.{module}", module)
    return made


def ai_toolkit() -> Described:
    made = Described()
    for module in [*ATTENTION[:8], *FEED_FORWARD, "layers.0.adaLN_modulation.0", "layers.1.adaLN_modulation.0"]:
        made.lora(f"diffusion_model.{module}", module)
    return made


def musubi() -> Described:
    made = Described()
    for module in [*ATTENTION[:8], *FEED_FORWARD]:
        made.lora(kohya(module), module, alpha=2.0, ends=KOHYA)
    return made


def videox() -> Described:
    made = Described()
    for module in [name for name in ATTENTION if "to_out" not in name] + FEED_FORWARD:
        made.lora(kohya(module, "lora_unet__"), module, alpha=3.0, ends=KOHYA)
    return made


def diffsynth(prefix: str) -> Callable[[], Described]:
    def make() -> Described:
        made = Described()
        for module in [*ATTENTION, *FEED_FORWARD]:
            made.lora(prefix + module, module, ends=DEFAULT)
        return made

    return make


def peft_folder() -> Described:
    """alpha 8, 3 for to_v; rank 4, 2 for w1; scale alpha / sqrt(rank)."""
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"feed_forward.w1": 2}}
    made = Described(config=config | {"alpha_pattern": {r"layers\.\d\.attention\.to_v": 3}})
    for module in [*ATTENTION[:4], *FEED_FORWARD]:
        rank = 2 if module.endswith("w1") else 4
        alpha = 3 if module.endswith("to_v") else 8
        made.lora(f"base_model.model.{module}", module, rank, scale=alpha / rank**0.5)
    return made


def native_fused() -> Described:
    made = Described()
    for block in BLOCKS:
        made.lora(f"diffusion_model.{block}.attention.qkv", qkv(block))
        made.lora(f"diffusion_model.{block}.attention.out", f"{block}.attention.to_out.0")
    made.lora("diffusion_model.layers.0.feed_forward.w13", w31("layers.0"))
    return made


def block_diagonal() -> Described:
    """Three LoRAs of different alphas in one of three times the rank, whose alpha is three times as large as well."""
    made = Described()
    downs, ups = [], []
    for module, alpha in zip(qkv("layers.1"), (2.0, 4.0, 1.0), strict=True):
        a, b = made.random(4, 64), made.random(64, 4) * alpha / 4
        made.change(module, b.double() @ a.double())
        downs, ups = [*downs, a], [*ups, b]
    spelled = "lora_unet_layers_1_attention_qkv"
    made.tensors |= {f"{spelled}.{KOHYA[0]}": torch.cat(downs), f"{spelled}.{KOHYA[1]}": torch.block_diag(*ups)}
    made.say(f"{spelled}.alpha", 12.0)
    return made


def two_of_three() -> Described:
    made = Described()
    for name in ("to_q", "to_v"):
        made.lora(f"transformer.layers.0.attention.{name}", f"layers.0.attention.{name}")
    return made


def twice() -> Described:
    """The same updates under fused and native names, and under diffusers' own: applied once."""
    made = Described()
    a, b, ends = made.random(4, 64), made.random(192, 4), KOHYA
    for name, rows in [
        ("attention_qkv", slice(0, 192)),
        *((f"attention_to_{x}", slice(64 * i, 64 * i + 64)) for i, x in enumerate("qkv")),
    ]:
        made.tensors |= {
            f"lora_unet_layers_0_{name}.{ends[0]}": a.clone(),
            f"lora_unet_layers_0_{name}.{ends[1]}": b[rows].clone(),
        }
    made.change(qkv("layers.0"), b.double() @ a.double())
    made.lora("lora_unet_layers_0_attention_to_out_0", "layers.0.attention.to_out.0", ends=ends)
    for end in ends:
        made.tensors[f"lora_unet_layers_0_attention_out.{end}"] = made.tensors[
            f"lora_unet_layers_0_attention_to_out_0.{end}"
        ].clone()
    return made


def one_tuner() -> Described:
    """OneTrainer's old files: alpha 1."""
    made = Described()
    for module in ATTENTION[:4]:
        made.lora(f"transformer.{module}", module, 8, alpha=1.0, ends=KOHYA)
    return made


def differences() -> Described:
    made = Described()
    for module, end in [
        ("layers.0.attention.norm_q", "diff"),
        ("layers.0.attention_norm1", "w_norm"),
        ("x_pad_token", "diff"),
    ]:
        made.change(module, made.add(f"diffusion_model.{module}.{end}", size(module)[1])[None])
    for module in ("layers.0.feed_forward.w2", "all_x_embedder.2-1", "cap_embedder.1"):
        made.change(module, made.add(f"diffusion_model.{module}.diff", *size(module)))
    for module in ("layers.0.adaLN_modulation.0", "cap_embedder.1", "t_embedder.mlp.0"):
        made.biases[module] = made.add(f"diffusion_model.{module}.diff_b", size(module)[0])
    biases = made.add("diffusion_model.layers.0.attention.qkv.diff_b", 192).split(64)
    made.biases |= dict(zip(qkv("layers.0"), biases, strict=True))
    return made


def biases_of_lora() -> Described:
    """peft's lora_bias, scaled as its LoRA."""
    made = Described()
    for module in ("layers.0.attention.to_q", "layers.0.adaLN_modulation.0"):
        made.lora(f"transformer.{module}", module, alpha=2.0)
        made.biases[module] = 0.5 * made.add(f"transformer.{module}.lora_B.bias", size(module)[0])
    return made


def dotted() -> Described:
    """musubi's converter took every underscore for a dot."""
    made = Described()
    for module in (
        "noise_refiner.0.attention.to_q",
        "context_refiner.0.feed_forward.w2",
        "layers.1.adaLN_modulation.0",
    ):
        made.lora("diffusion_model." + module.replace("_refiner", ".refiner").replace("_mod", ".mod"), module)
    return made


def mixed_ranks() -> Described:
    made = Described()
    for rank, module in enumerate([*ATTENTION[:4], *FEED_FORWARD], 1):
        made.lora(f"transformer.{module}", module, rank)
    return made


def described_in_metadata() -> Described:
    """diffusers' own: alpha 6, rank 4."""
    said = {"transformer.lora_alpha": 6, "transformer.r": 4, "transformer.use_rslora": False}
    made = Described(metadata={"lora_adapter_metadata": json.dumps(said), "format": "pt"})
    for module in ATTENTION[:4]:
        made.lora(f"transformer.{module}", module, scale=6 / 4)
    return made


def every_float() -> Described:
    made, dtypes = Described(), ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64")
    for dtype, module in zip(dtypes, ATTENTION, strict=False):
        made.lora(f"diffusion_model.{module}", module, dtype=getattr(torch, dtype))
    for module, dtype in zip(ATTENTION, (torch.bfloat16, torch.float16), strict=False):  # alpha as a list of one
        made.say(f"diffusion_model.{module}.alpha", 4.0, dtype, (1,))
    return made


def with_text_encoder() -> Described:
    made = peft()
    for name in (
        "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
        "text_encoder.layers.1.mlp.up_proj.lora_A.weight",
    ):
        made.tensors[name] = torch.zeros(4, 64)
    return made


def scale_beside_alpha() -> Described:
    """stable-diffusion.cpp's `.scale` stands for alpha / rank, whatever alpha is."""
    made = Described()
    for module in ATTENTION[:2]:
        made.lora(f"transformer.{module}", module, scale=0.25)
        made.say(f"transformer.{module}.scale", 0.25)
    made.say(f"transformer.{ATTENTION[0]}.alpha", 9.0)
    return made


def alpha_of_nothing() -> Described:
    """LyCORIS and musubi take 0 for the rank."""
    made = Described()
    made.lora("transformer.layers.0.attention.to_q", "layers.0.attention.to_q", scale=1.0)
    made.say("transformer.layers.0.attention.to_q.alpha", 0.0)
    return made


def whole_alphas() -> Described:
    """Numbers of people's own scripts."""
    made = Described()
    kinds = ((torch.int64, ()), (torch.int32, (1,)), (torch.int16, (1, 1)), (torch.uint8, ()))
    for module, (dtype, shape) in zip(ATTENTION, kinds, strict=False):
        made.lora(f"transformer.{module}", module, scale=0.75)
        made.say(f"transformer.{module}.alpha", 3, dtype, shape)
    return made


ADAPTERS: dict[str, Callable[[], Described]] = {
    "peft in diffusers": peft,
    "ai-toolkit with adaLN": ai_toolkit,
    "musubi, alpha not the rank": musubi,
    "VideoX, two underscores, no to_out": videox,
    "DiffSynth, bare, .default": diffsynth(""),
    "DiffSynth, pipe.dit.": diffsynth("pipe.dit."),
    "peft folder, rslora, patterns": peft_folder,
    "native fused": native_fused,
    "kohya fused, block-diagonal": block_diagonal,
    "q and v alone": two_of_three,
    "fused and split": twice,
    "down and up, alpha 1": one_tuner,
    "LoHa": loha,
    "LoKr whole, alpha infinite": lokr_whole,
    "LoKr decomposed": lokr_decomposed,
    "LoKr fused, rows of q, k, v apart": lokr_fused(12),
    "LoKr fused, rows across q, k, v": lokr_fused(2),
    "LoKr and LoRA": mixed,
    "DoRA [N, 1]": dora("dora_scale", lambda rows, columns: (rows, 1), False),
    "DoRA [1, K]": dora("dora_scale", lambda rows, columns: (1, columns), True),
    "DoRA magnitude": dora("magnitude", lambda rows, columns: (rows,), False),
    "DoRA vector": dora("lora_magnitude_vector", lambda rows, columns: (rows,), False),
    "DoRA vector.weight": dora("lora_magnitude_vector.weight", lambda rows, columns: (rows,), False),
    "DoRA by length": dora_by_length,
    "DoRA of LoHa and LoKr": dora_of_others,
    "differences": differences,
    "lora_bias": biases_of_lora,
    "dotted": dotted,
    "mixed ranks": mixed_ranks,
    "metadata": described_in_metadata,
    "every float": every_float,
    "with a text encoder": with_text_encoder,
    "OFT of outputs": rotated_outputs(0.0),
    "OFT of outputs, constrained": rotated_outputs(0.001),
    "OFT of outputs, rescaled": rotated_outputs(0.0, is_rescaled=True),
    "OFT of inputs": rotated_inputs(False, False),
    "OFT of inputs, scaled": rotated_inputs(False, True),
    "OFT of inputs, shared": rotated_inputs(True, False),
    ".scale": scale_beside_alpha,
    "alpha 0": alpha_of_nothing,
    "whole alphas": whole_alphas,
}
