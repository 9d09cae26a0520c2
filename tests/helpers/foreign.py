"""What the tests of other programs' files share: a model of sizes that every format divides, and names written once."""

from __future__ import annotations

from pathlib import Path

import torch
from make_checkpoint import SIZES, write_comfyui, write_diffusers, write_tokenizer
from torch import Tensor

from zimage_lite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from zimage_lite.config import TextEncoderConfig, TransformerConfig
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.weights import read_into

Weights = dict[str, Tensor]

ENCODER = TextEncoderConfig(
    vocab_size=320, hidden_size=256, num_hidden_layers=9, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    intermediate_size=512,
)  # fmt: skip


def write_model(
    folder: Path, layout: str = "diffusers", dim: int = 384, n_layers: int = 2, encoder: TextEncoderConfig = ENCODER
) -> Path:
    """Rows of 256, dim and 8 / 3 dim weights; q, k and v have dim rows each."""
    transformer = TransformerConfig(
        dim=dim, n_layers=n_layers, n_refiner_layers=1, n_heads=dim // 128, cap_feat_dim=encoder.hidden_size
    )
    folder.mkdir(parents=True)
    write = write_diffusers if layout == "diffusers" else write_comfyui
    write(folder, (transformer, encoder, SIZES["tiny"][2]), torch.bfloat16, 3)
    write_tokenizer(folder / "tokenizer", "tiny")
    return folder


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """Of a transformer: what is quantized in every format. Under native names or diffusers'."""
    in_block = name.startswith(("layers.", "noise_refiner.", "context_refiner."))
    return in_block and tensor.ndim == 2 and name.endswith(".weight")


def canonical(native: Weights) -> Weights:
    """The transformer's names in single files -> diffusers', and qkv cut in three; the map is written out once more."""
    out = {}
    for name, tensor in native.items():
        if ".qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            out |= {name.replace("qkv", f"to_{part}"): rows for part, rows in parts}
            continue
        for old, new in (
            (".attention.out.", ".attention.to_out.0."), ("q_norm", "norm_q"), ("k_norm", "norm_k"),
            ("x_embedder.", "all_x_embedder.2-1."), ("final_layer.", "all_final_layer.2-1."),
        ):  # fmt: skip
            name = name.replace(old, new)
        out[name] = tensor
    return out


def assert_reads(checkpoint: Checkpoint, expected: Weights, tolerance: float = 0) -> None:
    """Every tensor as a whole, and some of its rows alone. tolerance: of the largest weight."""
    assert set(checkpoint.tensors) == set(expected)
    for name, truth in expected.items():
        stored, wide = checkpoint.tensors[name], truth.float().reshape(-1, checkpoint.tensors[name].columns)
        limit = tolerance * wide.abs().max()
        assert stored.shape == tuple(truth.shape), name
        assert (stored.read_float() - wide).abs().max() <= limit, name
        for start, stop in ((0, 1), (5, 70), (128, 256), (len(wide) - 3, len(wide))):
            if start >= 0 and stop <= len(wide):
                assert (stored.read_float(start, stop) - wide[start:stop]).abs().max() <= limit, (name, start)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A latent, the features of a caption, and a time."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(16, 16, 16, generator=generator)
    return latent, torch.randn(9, ENCODER.hidden_size, generator=generator), torch.tensor([0.3])


def forward(path: Path) -> Tensor:
    """What our transformer makes of `inputs`, its weights bound packed."""
    checkpoint = open_checkpoint(path)
    model = Transformer(checkpoint.config)
    stored = checkpoint.restricted_to(shapes(model)).tensors
    read_into(model, stored, Hardware(torch.device("cpu"), torch.float32))
    latent, features, time = inputs()
    with torch.inference_mode():
        return model([latent], model.refine_captions([features]), model.modulations(time, torch.float32)[0])[0]
