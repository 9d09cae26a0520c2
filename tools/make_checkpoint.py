"""Writes a synthetic Z-Image checkpoint: random weights under the true names, dtypes and layouts.

    python tools/make_checkpoint.py OUT --size tiny                      seconds, for tests and first steps
    python tools/make_checkpoint.py OUT --size full --dtype bf16         6.15 B + 4 B parameters, 20.5 GB

Pictures are noise, but every byte count, every file and every step is that of the real model. Weights are scaled so
that activations keep a realistic size. Written tensor by tensor, so memory stays below 3 GB at full size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zimage_lite.checkpoint import safetensors
from zimage_lite.checkpoint.diffusers_config import config_json, image_processor, model_index
from zimage_lite.checkpoint.names import NATIVE_TRANSFORMER, NameMap, flux_vae
from zimage_lite.checkpoint.qwen3 import ADDED, byte_characters, qwen3_vocabulary
from zimage_lite.checkpoint.tokenizer import PromptTokenizer, byte_level_bpe, save_tokenizer
from zimage_lite.checkpoint.writer import open_writer
from zimage_lite.config import (
    OmniConfig,
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    VisionConfig,
)
from zimage_lite.convert.catalog import component_shapes

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHARD_BYTES = 9_973_693_184  # as the Hub's transformer is cut: three shards in float32
CHUNK = 2**24

_TINY = {"dim": 256, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "cap_feat_dim": 128}
SIZES: dict[str, tuple] = {
    "full": (TransformerConfig(), TextEncoderConfig(), VaeConfig()),
    "tiny": (
        TransformerConfig(**_TINY),
        TextEncoderConfig(
            vocab_size=320, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=256,
        ),
        VaeConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    ),
}  # fmt: skip
_TINY_TOWER = VisionConfig(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=160, num_patches=16
)
SIZES |= {
    "full-omni": (OmniConfig(), *SIZES["full"][1:], VisionConfig()),
    "tiny-omni": (OmniConfig(**_TINY, siglip_feat_dim=_TINY_TOWER.hidden_size), *SIZES["tiny"][1:], _TINY_TOWER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the transformer; the rest is bf16, as on the Hub"
    )
    parser.add_argument("--layout", choices=("diffusers", "comfyui"), default="diffusers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    make_checkpoint(args.out, args.size, args.dtype, args.layout, args.seed)


def make_checkpoint(
    out: Path, size: str = "tiny", dtype: str = "bf16", layout: str = "diffusers", seed: int = 0
) -> None:
    """Write a whole model folder. Raises FileExistsError."""
    out.mkdir(parents=True)
    write = write_diffusers if layout == "diffusers" else write_comfyui
    write(out, SIZES[size], DTYPES[dtype], seed)
    write_tokenizer(out / "tokenizer", size.removesuffix("-omni"))


def write_diffusers(out: Path, configs: tuple, dtype: torch.dtype, seed: int) -> None:
    stems = {
        "transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model",
        "siglip": "model",
    }  # fmt: skip
    for (component, stem), config in zip(stems.items(), configs, strict=False):
        folder = out / component
        folder.mkdir()
        write_json(folder / "config.json", config_json(config))
        prefix = "model." if component == "text_encoder" else ""
        wanted = {prefix + name: ((name,), shape) for name, shape in component_shapes(config).items()}
        write_shards(folder, stem, wanted, dtype if component == "transformer" else torch.bfloat16, seed, component)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", config_json(SchedulerConfig()))
    sees = len(configs) == len(stems)
    write_json(out / "model_index.json", model_index(sees))
    if sees:
        (out / "siglip_processor").mkdir()
        write_json(out / "siglip_processor" / "preprocessor_config.json", image_processor())


def write_comfyui(out: Path, configs: tuple, dtype: torch.dtype, seed: int) -> None:
    """Three files under the names that ComfyUI's own repackaged model uses, fused and renamed accordingly."""
    transformer, text_encoder, vae, *tower = configs
    native = renamed(component_shapes(transformer), NATIVE_TRANSFORMER)
    encoder = {f"model.{name}": ((name,), shape) for name, shape in component_shapes(text_encoder).items()}
    flux = renamed(component_shapes(vae), flux_vae())
    flux = {
        name: (parts, (*shape, 1, 1) if ".attn_1." in name and len(shape) == 2 else shape)
        for name, (parts, shape) in flux.items()
    }
    files = [
        ("diffusion_models/z_image_turbo.safetensors", native, dtype, "transformer"),
        ("text_encoders/qwen_3_4b.safetensors", encoder, torch.bfloat16, "text_encoder"),
        ("vae/ae.safetensors", flux, torch.bfloat16, "vae"),
    ]
    for config in tower:
        seen = {f"vision_model.{name}": ((name,), shape) for name, shape in component_shapes(config).items()}
        files.append(("clip_vision/siglip2_so400m_patch16_naflex.safetensors", seen, torch.bfloat16, "siglip"))
    for name, wanted, file_dtype, component in files:
        (out / name).parent.mkdir(exist_ok=True)
        write_file(out / name, wanted, file_dtype, seed, component)


Wanted = Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]  # stored name -> its canonical parts, its shape


def renamed(
    canonical: Mapping[str, tuple[int, ...]], name_map: NameMap
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    out = {}
    for name, parts in name_map.to_foreign(canonical).items():
        first = canonical[parts[0]]
        out[name] = (parts, (first[0] * len(parts), *first[1:]))
    return out


def write_shards(folder: Path, stem: str, wanted: Wanted, dtype: torch.dtype, seed: int, component: str) -> None:
    """One file, or several with an index when it would be larger than a shard."""
    shards: list[dict] = [{}]
    filled = 0
    for name, (parts, shape) in wanted.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if filled + n_bytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = (parts, shape)
        filled += n_bytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(math.prod(shape) * dtype.itemsize for _, shape in wanted.values())
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, dtype, seed, component)


def write_file(
    path: Path, wanted: Wanted, dtype: torch.dtype, seed: int, component: str, metadata: Mapping[str, str] | None = None
) -> None:
    label = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    header, offsets = safetensors.encode_header(
        [(name, label, shape) for name, (_, shape) in wanted.items()], {"format": "pt", **(metadata or {})}
    )
    total = offsets[-1] + math.prod(list(wanted.values())[-1][1]) * dtype.itemsize
    with open_writer(path, header, total) as writer:
        for offset, (parts, shape) in zip(offsets, wanted.values(), strict=True):
            at = offset
            part_shape = (shape[0] // len(parts), *shape[1:])
            for part in parts:
                for values in random_weights(component, part, part_shape, seed):
                    writer.write(at, values.to(dtype))
                    at += values.numel() * dtype.itemsize


def random_weights(component: str, name: str, shape: tuple[int, ...], seed: int) -> Iterable[Tensor]:
    """The same values for the same component, canonical name and seed, whatever file they land in; in pieces."""
    digest = hashlib.sha256(f"{component}/{name}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    mean, std = distribution(name, shape)
    left = math.prod(shape)
    while left:
        n = min(left, CHUNK)
        yield torch.randn(n, generator=generator).mul_(std).add_(mean)
        left -= n


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation: norms near one, linears and convolutions that keep the variance, small biases and gates."""
    if name.endswith(".bias"):
        return 0.0, 0.02
    if "norm" in name or name in ("cap_embedder.0.weight", "siglip_embedder.0.weight"):
        return 1.0, 0.1
    if len(shape) < 2 or "pad_token" in name or "embed_tokens" in name:
        return 0.0, 0.5
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def write_tokenizer(folder: Path, size: str) -> None:
    """The true Qwen tokenizer at full size; at tiny size one token per byte, which any text can be written in."""
    bytes_only = {char: n for n, char in enumerate(byte_characters().values())}
    vocab, merges = qwen3_vocabulary() if size == "full" else (bytes_only, [])
    save_tokenizer(folder, PromptTokenizer(byte_level_bpe(vocab, merges, ADDED), size))


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
