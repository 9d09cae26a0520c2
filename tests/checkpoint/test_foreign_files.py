"""GGUF files as diffusers, transformers and gguf-py read and write them, and ComfyUI's all-in-one checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from foreign import Weights, assert_reads, canonical, forward, inputs, write_model
from marking import always
from oracles import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.cli import run
from zimage_lite.convert.inspection import inspect
from zimage_lite.convert.quantize import quantize
from zimage_lite.quant.formats import GGML_TYPES

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # gguf-py multiplies infinities in passing
    pytest.mark.slow,  # whole models, written and read by other libraries
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every row is a multiple of 256 long, as in the true model."""
    return write_model(tmp_path_factory.mktemp("gguf") / "model", dim=768, n_layers=1)


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("outputs")

    def make(target: str) -> Path:
        if not (folder / target).exists():
            quantize(model, folder / target, target, text_encoder_to=target, effort="fast")
        return folder / target

    return make


# Target -> what a block's matrices are; qkv and w2; file_type. From llama.cpp and its patch for this transformer.
TARGETS = {
    "q4_k_m": ("Q4_K", "Q5_K", "Q6_K", 15), "q6_k": ("Q6_K", "Q6_K", "Q6_K", 18),
    "q3_k_m": ("Q3_K", "Q4_K", "Q4_K", 12), "q2_k": ("Q2_K", "Q2_K", "Q2_K", 10),
    "iq4_nl": ("IQ4_NL", "IQ4_NL", "IQ4_NL", 25), "iq4_xs": ("IQ4_XS", "IQ4_XS", "IQ4_XS", 30),
    "q5_k_s": ("Q5_K", "Q5_K", "Q5_K", 16),
    "q5_0": ("Q5_0", "Q5_0", "Q5_1", 8), "q5_1": ("Q5_1", "Q5_1", "Q5_1", 9),
}  # fmt: skip


def transformer_type(name: str, shape: tuple[int, ...], target: str) -> str:
    others, qkv, w2, _ = TARGETS[target]
    if len(shape) == 1 or name.endswith("pad_token"):
        return "F32"
    if not name.startswith("layers."):
        return "BF16"
    return qkv if ".qkv." in name else w2 if ".w2." in name else others


def reader_of(file: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("target", always("q4_k_m", "q2_k", "iq4_xs", "q5_0", of=TARGETS))
def test_our_transformer_gguf(model: Path, outputs: Callable[[str], Path], target: str) -> None:
    (file,) = (outputs(target) / "transformer").glob("*.gguf")
    fields, tensors = reader_of(file)
    assert (fields["general.architecture"], fields["general.file_type"]) == ("lumina2", TARGETS[target][3])
    assert fields["general.quantization_version"] == 2
    wide: Weights = {}
    for name, tensor in tensors.items():
        shape = tuple(reversed(tensor.shape.tolist()))
        assert tensor.tensor_type.name == transformer_type(name, shape, target), name
        wide[name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).view(shape)
    checkpoint = open_checkpoint(file)
    assert_reads(checkpoint, canonical(wide))

    theirs = ZImageTransformer2DModel.from_single_file(
        str(file), config=str(model / "transformer"), torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(checkpoint.tensors)
    for name, parameter in parameters.items():
        truth = checkpoint.tensors[name].read_float().reshape(parameter.shape if parameter.ndim == 1 else (-1,))
        read = dequantize_gguf_tensor(parameter).float().reshape(truth.shape)
        # diffusers computes products, and sums of two, in float16, whose last place is 2^-11 of the number.
        assert (read - truth).abs().max() <= 2**-9 * truth.abs().max(), name
    latent, features, time = inputs()
    with torch.no_grad():
        image = theirs([latent.unsqueeze(1)], time, [features])[0][0].squeeze(1)
    assert relative_error(forward(file), image) <= 3e-3


def encoder_type(name: str, target: str, n_layers: int = 9) -> str:
    """Of Qwen3's tensors, as llama.cpp's llama_tensor_get_type chooses."""
    layer = int(match[1]) if (match := re.match(r"blk\.(\d+)\.", name)) else -1
    eighth = n_layers // 8
    more_bits = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    base = TARGETS[target][0]
    if name.endswith("norm.weight"):
        return "F32"
    if name.startswith("token_embd"):
        return "Q6_K"
    if target == "q4_k_m" and ("attn_v" in name or "ffn_down" in name):
        return "Q6_K" if more_bits else base
    if target == "q3_k_m":
        if "attn_v" in name:
            return "Q5_K" if layer < 2 else "Q4_K"
        if "ffn_down" in name:
            return "Q5_K" if layer < n_layers // 16 else "Q4_K"
        return "Q4_K" if "attn_output" in name else base
    if target == "q2_k":  # where four query heads share a key, as in the true encoder
        kinds = {"attn_v": "Q4_K", "ffn_down": "Q3_K", "attn_output": "Q3_K"}
        return next((kind for part, kind in kinds.items() if part in name), base)
    if target in ("iq4_nl", "iq4_xs") and ("attn_v" in name or ("ffn_down" in name and layer < eighth)):
        return "Q5_K"
    return base


@pytest.mark.parametrize("target", always("q4_k_m", "q2_k", "iq4_xs", of=TARGETS))
def test_our_text_encoder_gguf(model: Path, outputs: Callable[[str], Path], target: str) -> None:
    (file,) = (outputs(target) / "text_encoder").glob("*.gguf")
    fields, tensors = reader_of(file)
    assert (fields["general.architecture"], fields["general.file_type"]) == ("qwen3", TARGETS[target][3])
    assert {name: t.tensor_type.name for name, t in tensors.items()} == {
        name: encoder_type(name, target) for name in tensors
    }
    theirs = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = open_checkpoint(file).tensors
    weights = theirs.state_dict()
    assert set(weights) == set(ours) and len(weights) == 2 + 9 * 11
    for name, weight in weights.items():
        assert torch.equal(weight.reshape(-1), ours[name].read_float().reshape(-1)), name


# Where a block's float16 scales lie; anything goes in the rest. iq1_m spreads its scale over four nibbles.
RANDOM_TYPES = {
    "iq1_s": (0,), "iq1_m": (), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
    "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,), "mxfp4": (), "q2_k": (80, 82), "q3_k": (108,),
    "q6_k": (208,), "q5_1": (0, 2),
}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    _, block, n_bytes = GGML_TYPES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block, n_bytes), dtype=np.uint8)
    for at in RANDOM_TYPES[kind]:
        blocks[:, at : at + 2] = rng.normal(0, 0.01, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    if kind == "iq1_m":
        scales = rng.normal(0, 0.01, len(blocks)).astype(np.float16).view(np.uint16)
        for i in range(4):  # the high nibble of each of four little-endian words, lowest first
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | (((scales >> (4 * i)) & 15) << 4).astype(np.uint8)
    if kind == "mxfp4":
        blocks[:, 0] = rng.integers(100, 130, len(blocks))
    return blocks.reshape(rows, -1)


def test_reads_every_ggml_type_as_gguf_py_does(tmp_path: Path) -> None:
    """One type per layer, q, k and v fused. The rest of the file is what it takes to be recognised."""
    rng, dim = np.random.default_rng(11), 256
    plain = {"cap_embedder.1.weight": (dim, 64), "x_embedder.weight": (dim, 64)}
    plain["noise_refiner.0.attention.q_norm.weight"] = (128,)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "lumina2")
    expected: Weights = {}

    def add(name: str, data: np.ndarray, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> None:
        writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32)).view(shape)

    for layer, kind in enumerate(RANDOM_TYPES):
        code = gguf.GGMLQuantizationType[kind.upper()]
        shape = (3 * dim, dim)
        add(f"layers.{layer}.attention.qkv.weight", random_blocks(kind, *shape, rng), code, shape)
        plain[f"layers.{layer}.attention.q_norm.weight"] = (128,)
    for name, shape in plain.items():
        add(name, rng.normal(0, 1, shape).astype(np.float32), gguf.GGMLQuantizationType.F32, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert {t.format.name for t in checkpoint.tensors.values()} == {*RANDOM_TYPES, "f32"}
    assert all(expected[name].isfinite().all() and expected[name].std() > 0 for name in expected)
    assert_reads(checkpoint, canonical(expected))


# ---------------------------------------------------------------- all in one file


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's three files."""
    return write_model(tmp_path_factory.mktemp("split") / "split", "comfyui", n_layers=1)


@pytest.fixture(scope="module")
def all_in_one(split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ComfyUI's CheckpointSave names them, with the scalar that some have."""
    parts = {
        "model.diffusion_model.": "diffusion_models/z_image_turbo.safetensors",
        "text_encoders.qwen3_4b.transformer.": "text_encoders/qwen_3_4b.safetensors",
        "vae.": "vae/ae.safetensors",
    }
    arrays = {prefix + name: t for prefix, file in parts.items() for name, t in load_file(split / file).items()}
    arrays["text_encoders.qwen3_4b.logit_scale"] = torch.tensor(4.6)
    file = tmp_path_factory.mktemp("all-in-one") / "zImageTurbo_aio.safetensors"
    save_file(arrays, file)
    return file


def test_inspect_lists_three_parts(all_in_one: Path, split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {part.name: part for part in inspect(all_in_one)}
    assert list(parts) == ["transformer", "text_encoder", "vae"] and not any(part.refusal for part in parts.values())
    for part in inspect(split):
        if part.name in parts:
            assert (part.tensors, part.bytes) == (parts[part.name].tensors, parts[part.name].bytes)
    assert run(["inspect", str(all_in_one), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 3


@pytest.mark.parametrize("target", ["q8_0", "int8"])
def test_quantize_takes_it_apart(all_in_one: Path, split: Path, tmp_path: Path, target: str) -> None:
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    assert run(["quantize", str(all_in_one), "-o", str(out), "--to", target]) == 0
    assert run(["quantize", str(split), "-o", str(wanted), "--to", target]) == 0
    for component in ("transformer", "text_encoder", "vae"):
        ours, theirs = (open_checkpoint(folder / component) for folder in (out, wanted))
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert ours.main_format == theirs.main_format and ours.config == theirs.config
        for name, tensor in ours.tensors.items():
            assert tensor.format == theirs.tensors[name].format
            assert torch.equal(tensor.read_float().flatten(), theirs.tensors[name].read_float().flatten()), name
    one = tmp_path / "alone.gguf"  # and one part alone
    assert run(["quantize", str(all_in_one), "-o", str(one), "--to", "q8_0", "--component", "text_encoder"]) == 0
    assert open_checkpoint(one).main_format == "q8_0"


def test_generate_draws_the_same(all_in_one: Path, split: Path, tmp_path: Path) -> None:
    pixels = []
    moved = tmp_path / "tokens"
    shutil.copytree(split / "tokenizer", moved)
    for i, model in enumerate((["--model", str(split)], ["--model", str(all_in_one), "--tokenizer", str(moved)])):
        out = tmp_path / f"{i}.png"
        size = ["--width", "64", "--height", "64", "--steps", "2", "--seed", "1", "--device", "cpu"]
        assert run(["generate", "a red circle", *model, *size, "-o", str(out)]) == 0
        with Image.open(out) as image:
            pixels.append(np.asarray(image))
    assert pixels[0].std() > 1 and np.array_equal(*pixels)


def test_generate_asks_for_a_tokenizer(all_in_one: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    line = refused("generate", "a red circle", "--model", all_in_one, "-o", tmp_path / "a.png")
    assert "name its tokenizer.json with --tokenizer" in line
