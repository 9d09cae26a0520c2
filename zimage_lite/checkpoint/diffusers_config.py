"""config.json files in diffusers' and transformers' spelling, for folders that other programs open as well."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..config import (
    VISION_PATCHES,
    ControlConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    VisionConfig,
)

_DIFFUSERS = {"_diffusers_version": "0.36.0"}
_TOWER: dict[str, Any] = {
    "architectures": ["Siglip2VisionModel"],
    "model_type": "siglip2_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}


def config_json(
    config: TransformerConfig | TextEncoderConfig | VaeConfig | ControlConfig | VisionConfig | SchedulerConfig,
) -> dict[str, Any]:
    """The whole config.json of a component."""
    if isinstance(config, TransformerConfig):
        extra: dict[str, Any] = {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "n_kv_heads": config.n_heads,
            "qk_norm": True,
            "axes_lens": [1536, 512, 512],
            **_DIFFUSERS,
        }
    elif isinstance(config, ControlConfig):
        extra = {
            "_class_name": "ZImageControlNetModel",
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "n_kv_heads": config.n_heads,
            "qk_norm": True,
            **_DIFFUSERS,
        }
    elif isinstance(config, TextEncoderConfig):
        extra = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
        }
    elif isinstance(config, VaeConfig):
        levels = len(config.block_out_channels)
        extra = {
            "_class_name": "AutoencoderKL",
            "out_channels": config.in_channels,
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
            "sample_size": 1024,
            **_DIFFUSERS,
        }
    elif isinstance(config, VisionConfig):
        extra = _TOWER
    else:
        extra = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            **_DIFFUSERS,
        }
    return {**extra, **asdict(config)}


def image_processor() -> dict[str, Any]:
    """preprocessor_config.json: how pictures are laid out for the vision tower."""
    return {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_resize": True,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": VisionConfig.patch_size,
        "max_num_patches": VISION_PATCHES,
    }


def model_index(sees: bool = False) -> dict[str, Any]:
    """model_index.json: which class opens which folder. sees: with a vision tower."""
    tower = ("siglip", "Siglip2VisionModel"), ("siglip_processor", "Siglip2ImageProcessor")
    return {
        "_class_name": "ZImageOmniPipeline" if sees else "ZImagePipeline",
        **_DIFFUSERS,
        **({folder: ["transformers", name] for folder, name in tower} if sees else {}),
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
