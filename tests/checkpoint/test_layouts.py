"""Every layout of the same weights gives the same image as the diffusers folder they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from oracles import psnr
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.names import LLAMA_CPP_QWEN3, NATIVE_TRANSFORMER, NameMap, flux_vae
from zimage_lite.checkpoint.tokenizer import tokenizer_from, tokenizer_to_gguf
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.pipeline.drawing import Pipeline

pytestmark = pytest.mark.slow  # a picture from every layout

Weights = dict[str, torch.Tensor]

REQUEST = GenerateOptions("a red circle, 你好", 64, 64, steps=2, seed=1)
GGUF_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def draw(model: Path | None, **parts: Path) -> torch.Tensor:
    pipeline = Pipeline(open_model(model, parts), RuntimeOptions(device="cpu", compute="16bit"))  # on any processor
    return pipeline.generate([REQUEST])[0]


@pytest.fixture(scope="module")
def image(diffusers_folder: Path) -> torch.Tensor:
    drawn = draw(diffusers_folder)
    assert drawn.float().std() > 1
    return drawn


def weights(folder: Path, component: str) -> Weights:
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


def renamed(tensors: Weights, names: NameMap) -> Weights:
    foreign = names.to_foreign(tensors)
    return {name: torch.cat([tensors[part] for part in parts]) for name, parts in foreign.items()}


def native(folder: Path) -> Weights:
    return renamed(weights(folder, "transformer"), NATIVE_TRANSFORMER)


def prefixed(tensors: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def write_gguf(path: Path, tensors: Weights, choose: Callable[[str, torch.Tensor], str], metadata: dict | None) -> Path:
    """By gguf-py. choose: name, tensor -> ggml type. metadata: extra key-values, or None for a file without any."""
    architecture = (metadata or {}).get("general.architecture", "lumina2")
    writer = gguf.GGUFWriter(path, architecture)
    if metadata is None:
        for shard in writer.kv_data:
            shard.clear()
    for key, value in (metadata or {}).items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[choose(name, tensor).upper()]
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_float32_shards(diffusers_pipeline, diffusers_folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    model = tmp_path / "model"
    diffusers_pipeline.save_pretrained(model, max_shard_size="2MB")
    assert len(list((model / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(draw(model), image)


def test_comfyui_split_files(diffusers_folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    vae = renamed(weights(diffusers_folder, "vae"), flux_vae())
    vae = {name: t[..., None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in vae.items()}
    encoder = prefixed(weights(diffusers_folder, "text_encoder"), "model.")
    files = {
        "diffusion_models/z_image_turbo.safetensors": native(diffusers_folder),
        "text_encoders/qwen_3_4b.safetensors": encoder,
        "vae/ae.safetensors": vae,
    }
    for name, tensors in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name)
    shutil.copytree(diffusers_folder / "tokenizer", tmp_path / "tokenizer")
    # Nothing in a single file says what the norm eps or rope theta are: those of the true model are taken.
    assert torch.equal(draw(tmp_path), image)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model."])
def test_prefixed_transformer(diffusers_folder: Path, image: torch.Tensor, tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "transformer.safetensors"
    save_file(prefixed(native(diffusers_folder), prefix), file)
    assert torch.equal(draw(diffusers_folder, transformer=file), image)


def test_pad_tokens_of_one_axis_and_an_unused_norm(diffusers_folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    tensors = native(diffusers_folder)
    for name in ("x_pad_token", "cap_pad_token"):
        tensors[name] = tensors[name].flatten()
    tensors["norm_final.weight"] = torch.ones(256)  # some files of this lineage carry one
    file = tmp_path / "transformer.safetensors"
    save_file(tensors, file)
    assert torch.equal(draw(diffusers_folder, transformer=file), image)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_gguf_is_exact_to_rounding(diffusers_folder: Path, tmp_path: Path, kind: str) -> None:
    """Against the same rounding in safetensors: the container itself loses nothing."""
    dtype = GGUF_TYPES[kind]
    tensors = {name: t.to(dtype).float() if t.ndim > 1 else t for name, t in native(diffusers_folder).items()}
    rounded = tmp_path / "rounded.safetensors"
    save_file(tensors, rounded)
    metadata = {"general.architecture": "lumina2", "general.file_type": 1}
    choose = lambda name, t: kind if t.ndim > 1 else "f32"  # noqa: E731
    file = write_gguf(tmp_path / "model.gguf", tensors, choose, metadata)
    assert torch.equal(draw(diffusers_folder, transformer=file), draw(diffusers_folder, transformer=rounded))


def test_gguf_without_metadata_and_with_quantized_vectors(
    diffusers_folder: Path, image: torch.Tensor, tmp_path: Path
) -> None:
    """As stable-diffusion.cpp writes it: no architecture, a prefix, norms and pad tokens quantized as well."""
    tensors = prefixed(native(diffusers_folder), "model.diffusion_model.")
    tensors = {name: t.flatten() if name.endswith("pad_token") else t for name, t in tensors.items()}
    choose = lambda name, t: "q8_0" if t.shape[-1] % 32 == 0 and "final_layer" not in name else "f32"  # noqa: E731
    file = write_gguf(tmp_path / "model.gguf", tensors, choose, None)
    assert not [key for key in gguf.GGUFReader(file).fields if not key.startswith("GGUF.")]
    unpacked = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(t.float().numpy(), kind), kind)).view(t.shape)
        for name, t in tensors.items()
        for kind in [gguf.GGMLQuantizationType[choose(name, t).upper()]]
    }
    save_file(unpacked, tmp_path / "unpacked.safetensors")
    wanted = draw(diffusers_folder, transformer=tmp_path / "unpacked.safetensors")
    drawn = draw(diffusers_folder, transformer=file)
    assert psnr(drawn, wanted, 255) >= 50  # sums are split differently where a weight is unpacked in pieces
    assert psnr(drawn, image, 255) >= 20


@pytest.mark.parametrize("kind", ["q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_other_ggml_types(diffusers_folder: Path, tmp_path: Path, kind: str) -> None:
    tensors = native(diffusers_folder)
    choose = lambda name, t: kind if ".feed_forward.w1" in name else "f32"  # noqa: E731
    file = write_gguf(tmp_path / "model.gguf", tensors, choose, {"general.architecture": "lumina2"})
    code = gguf.GGMLQuantizationType[kind.upper()]
    for name, t in tensors.items():
        if ".feed_forward.w1" in name:
            width = gguf.dequantize(gguf.quantize(t.float().numpy(), code), code)
            tensors[name] = torch.from_numpy(np.ascontiguousarray(width))
    save_file(tensors, tmp_path / "unpacked.safetensors")
    wanted = draw(diffusers_folder, transformer=tmp_path / "unpacked.safetensors")
    assert psnr(draw(diffusers_folder, transformer=file), wanted, 255) >= 50


def test_text_encoder_gguf_brings_its_tokenizer(diffusers_folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    tensors = renamed(weights(diffusers_folder, "text_encoder"), LLAMA_CPP_QWEN3)
    tokens = tokenizer_to_gguf(tokenizer_from(diffusers_folder / "tokenizer"), 320)
    tokens["tokenizer.ggml.tokens"][300] = "ab"  # gguf-py writes no empty list, and one token per byte needs no merge
    metadata = {
        "general.architecture": "qwen3",
        "qwen3.block_count": 4,
        "qwen3.rope.freq_base": 1e6,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        **tokens,
        "tokenizer.ggml.merges": ["a b"],
    }
    file = write_gguf(tmp_path / "encoder.gguf", tensors, lambda name, t: "f32", metadata)
    parts = {name: diffusers_folder / name for name in ("transformer", "vae")}
    assert torch.equal(draw(None, text_encoder=file, **parts), image)


def test_variants_beside_the_plain_file_are_left_alone(diffusers_folder: Path, image: torch.Tensor, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(diffusers_folder, model)
    (file,) = (model / "vae").glob("*.safetensors")
    file.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert torch.equal(draw(model), image)


def test_config_may_name_more_than_we_know(diffusers_folder: Path, image: torch.Tensor, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(diffusers_folder, model)
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "from_the_future": [1], "siglip_feat_dim": None}))
    assert torch.equal(draw(model), image)
