"""A model to convert, and what its conversions hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from safetensors.torch import load_file

from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.config import TextEncoderConfig, TransformerConfig

Weights = dict[str, torch.Tensor]
GGUF_TARGETS = ("q8_0", "q4_0", "f16", "bf16")  # those that gguf-py can write as well
TARGETS = (*GGUF_TARGETS, "q4_k_m", "q2_k", "int8", "int4", "fp8", "nf4", "qint4")  # of every container and codec
KEPT = ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.")


def write_source(folder: Path) -> Path:
    """Float32 as on the Hub, sizes that most formats divide as those of the true model, and more than ten layers."""
    folder.mkdir()
    transformer = TransformerConfig(
        dim=96, n_layers=12, n_refiner_layers=2, n_heads=1, cap_feat_dim=128, axes_dims=(32, 32, 32)
    )
    text_encoder = TextEncoderConfig(
        vocab_size=320, hidden_size=128, num_hidden_layers=11, num_attention_heads=2, num_key_value_heads=1,
        head_dim=128, intermediate_size=256,
    )  # fmt: skip
    write_diffusers(folder, (transformer, text_encoder, SIZES["tiny"][2]), torch.float32, seed=3)
    write_tokenizer(folder / "tokenizer", "tiny")
    return folder


def conversions(model: Path, targets: Iterable[str], folder: Path) -> dict[str, Path]:
    """Target -> what the command line makes of the model."""
    outputs = {target: folder / target for target in targets}
    for target, out in outputs.items():
        assert run(["quantize", str(model), "--to", target, "-o", str(out)]) == 0
    return outputs


def written(outputs: dict[str, Path], target: str, component: str = "transformer") -> Path:
    (file,) = (path for path in (outputs[target] / component).iterdir() if path.suffix in (".gguf", ".safetensors"))
    return file


def source_weights(model: Path, component: str) -> Weights:
    (file,) = (model / component).glob("*.safetensors")
    return load_file(file)


def native(source: Weights) -> Weights:
    """The transformer's weights under the names of single files; the map is written out here once more."""
    out = {}
    for name, tensor in source.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            tensor = torch.cat([source[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
        for old, new in (
            ("to_q", "qkv"), ("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"),
            ("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"),
        ):  # fmt: skip
            name = name.replace(old, new)
        out[name] = tensor
    return out


def gguf_type(name: str, tensor: torch.Tensor, target: str) -> str:
    """Of a transformer's tensor, as formats.md 2.4 says."""
    if tensor.ndim == 1 or name.endswith("pad_token"):
        return "F32"
    if target != "f16" and name.startswith((*KEPT, "context_refiner.", "noise_refiner.")):
        return "BF16"
    return "Q4_1" if target == "q4_0" and ".w2." in name else target.upper()


def assert_gguf_holds(file: Path, wanted: Weights, choose: Callable[[str, torch.Tensor], str]) -> None:
    """Every tensor is there, in the type that `choose` says, with the bytes that gguf-py makes of the source."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert set(tensors) == set(wanted)
    for name, source in wanted.items():
        stored, kind = tensors[name], gguf.GGMLQuantizationType[choose(name, source)]
        assert stored.tensor_type == kind, name
        assert tuple(reversed(stored.shape.tolist())) == tuple(source.shape), name
        truth = gguf.quantize(source.float().numpy(), kind)
        np.testing.assert_array_equal(stored.data.view(np.uint8).ravel(), truth.view(np.uint8).ravel(), name)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def contents(file: Path) -> dict[str, bytes]:
    """Array -> bytes. Metadata is left out: a single source file cannot tell all that config.json tells."""
    entries = open_tensor_file(file).entries
    return {name: bytes(entry.read().numpy()) for name, entry in entries.items()}


def single(model: Path, component: str = "transformer") -> Path:
    (file,) = (model / component).glob("*.safetensors")
    return file
