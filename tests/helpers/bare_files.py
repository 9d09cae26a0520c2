"""ComfyUI's files as people have them: no tokenizer, parts in one file, parts missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from make_checkpoint import SIZES, write_comfyui
from safetensors.torch import load_file, save_file

from zimage_lite.config import TextEncoderConfig

FILES = {
    "transformer": "diffusion_models/z_image_turbo.safetensors",
    "text_encoder": "text_encoders/qwen_3_4b.safetensors",
    "vae": "vae/ae.safetensors",
}
IN_ONE = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}


def comfy_files(folder: Path, vocab_size: int = TextEncoderConfig.vocab_size) -> Path:
    """A tiny model in ComfyUI's folders, its embedding as long as Qwen3's, and no tokenizer."""
    transformer, text_encoder, vae = SIZES["tiny"]
    folder.mkdir()
    write_comfyui(folder, (transformer, replace(text_encoder, vocab_size=vocab_size), vae), torch.bfloat16, 0)
    return folder


def all_in_one(path: Path, folder: Path, components: Iterable[str] = tuple(IN_ONE)) -> Path:
    """Some of the parts of `folder` in one file."""
    parts = {component: load_file(folder / FILES[component]) for component in components}
    save_file({IN_ONE[part] + name: t for part, tensors in parts.items() for name, t in tensors.items()}, path)
    return path
