"""Conversion end to end: what is written, read by other programs; what is refused; and that nothing stays behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conversions import (
    GGUF_TARGETS,
    TARGETS,
    Weights,
    assert_gguf_holds,
    contents,
    gguf_type,
    native,
    source_weights,
    written,
)
from marking import always
from oracles import PROMPT, relative_error
from packing import rotated
from safetensors import safe_open

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.cli import run
from zimage_lite.config import RuntimeOptions
from zimage_lite.convert.recipe import target as recipe
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.weights import read_into

pytestmark = pytest.mark.slow  # a model in every format

# What most bytes of `model` are in, whose rows of 96 weights not every format divides.
MAIN = {"q4_k_m": "q5_0", "q2_k": "iq4_nl", "nf4": "bf16"}
BLOCKS = ["", *(f"{refiner}_refiner.{n}" for refiner in ("context", "noise") for n in range(2))]
BLOCKS += [f"layers.{n}" for n in range(12)]
LLAMA_NAMES = (
    ("embed_tokens.", "token_embd."), ("norm.weight", "output_norm.weight"), ("layers.", "blk."),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
)  # fmt: skip


def llama_cpp(source: Weights) -> Weights:
    out = {}
    for name, tensor in source.items():
        name = name.removeprefix("model.")
        for old, new in LLAMA_NAMES:
            if old != "norm.weight" or name == old:
                name = name.replace(old, new)
        out[name] = tensor
    return out


def block_of(name: str) -> str:
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[:2]) if parts[0] in ("context_refiner", "noise_refiner", "layers", "blk") else ""


def assert_in_order(names_by_offset: list[str], blocks: list[str]) -> None:
    """Each block's arrays lie together, and the blocks in the order they run."""
    assert [block for block, _ in groupby(names_by_offset, block_of)] == blocks


@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_gguf_transformer(model: Path, outputs: dict[str, Path], target: str) -> None:
    file = written(outputs, target)
    assert_gguf_holds(file, native(source_weights(model, "transformer")), lambda n, t: gguf_type(n, t, target))
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "lumina2" and fields["general.quantization_version"] == 2
    assert fields["general.file_type"] == gguf.LlamaFileType["MOSTLY_" + target.upper()]
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    assert_in_order([tensor.name for tensor in tensors], BLOCKS)
    end = tensors[0].data_offset
    for tensor in tensors:
        assert tensor.data_offset % 32 == 0 and 0 <= tensor.data_offset - end < 32
        end = tensor.data_offset + tensor.n_bytes
    assert file.stat().st_size - end < 32


@pytest.mark.parametrize(("target", "to"), [("q8_0", None), ("int8", None), ("q4_0", "q4_0"), ("q8_0", "q5_0")])
def test_gguf_text_encoder(model: Path, outputs: dict[str, Path], target: str, to: str | None, tmp_path: Path) -> None:
    def choose(name: str, tensor: torch.Tensor) -> str:
        return "F32" if tensor.ndim == 1 else "Q8_0" if name == "token_embd.weight" else (to or "q8_0").upper()

    if to is not None:
        args = ["--to", target, "--text-encoder-to", to, "-o", str(tmp_path / "out")]
        assert run(["quantize", str(model), *args]) == 0
        outputs = {target: tmp_path / "out"}
    file = written(outputs, target, "text_encoder")
    assert_gguf_holds(file, llama_cpp(source_weights(model, "text_encoder")), choose)
    names = [tensor.name for tensor in sorted(gguf.GGUFReader(file).tensors, key=lambda t: t.data_offset)]
    assert_in_order(names, ["", *(f"blk.{n}" for n in range(11))])


@pytest.mark.parametrize("target", ["q4_0", "q4_k_m", "int4"])
def test_text_encoder_beside_a_small_transformer(outputs: dict[str, Path], target: str) -> None:
    """q4_k_m, which makes a mixture; rows of 128 weights get what llama.cpp gives them."""
    tensors = gguf.GGUFReader(written(outputs, target, "text_encoder")).tensors
    more = [n for n in range(11) if n < 1 or n >= 77 // 8 or (n - 1) % 3 == 2]
    for tensor in tensors:
        n = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else None
        if tensor.name.endswith("norm.weight"):
            wanted = "F32"
        elif tensor.name == "token_embd.weight" or (".attn_v." in tensor.name and n in more):
            wanted = "Q8_0"  # instead of Q6_K
        elif ".ffn_down." in tensor.name:
            wanted = "Q6_K" if n in more else "Q4_K"
        else:  # instead of Q4_K, but for the one matrix with rows of 256
            wanted = "Q4_K" if ".attn_output." in tensor.name else "Q5_0"
        assert tensor.tensor_type.name == wanted, tensor.name


def read_safetensors(file: Path) -> tuple[Weights, dict[str, tuple[int, int]]]:
    """By safetensors' own reader, and each array's [begin, end) in the file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    raw = file.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + header_bytes])
    places = {name: header[name]["data_offsets"] for name in tensors}
    return tensors, {name: (8 + header_bytes + a, 8 + header_bytes + b) for name, (a, b) in places.items()}


def assert_int8_holds(tensors: Weights, wanted: Weights, is_int8: Callable[[str, torch.Tensor], bool]) -> None:
    expected = set()
    for name, source in wanted.items():
        stored, layer = tensors[name], name.removesuffix(".weight")
        expected.add(name)
        assert stored.shape == source.shape, name
        if not is_int8(name, source):
            assert stored.dtype == torch.bfloat16 and torch.equal(stored, source.bfloat16()), name
            continue
        expected |= {f"{layer}.weight_scale", f"{layer}.comfy_quant"}
        scale, marker = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.comfy_quant"]
        group = next((group for group in (256, 64, 16) if source.shape[1] % group == 0), 0)
        rotation = {"convrot": True, "convrot_groupsize": group} if group else {}
        assert stored.dtype == torch.int8 and scale.dtype == torch.float32 and marker.dtype == torch.uint8
        assert scale.shape == (len(source), 1)
        assert json.loads(bytes(marker.numpy()).decode()) == {"format": "int8_tensorwise", **rotation}
        exact = rotated(source.float().numpy(), group) / scale.numpy()
        assert abs(stored.numpy() - exact).max() <= 0.5 + 1e-4, name
        assert abs(abs(exact).max(axis=1) - 127).max() <= 1e-4, name
    assert set(tensors) == expected


def test_int8_transformer(model: Path, outputs: dict[str, Path]) -> None:
    file = written(outputs, "int8")
    tensors, places = read_safetensors(file)
    is_int8 = lambda name, t: block_of(name) != "" and t.ndim == 2  # noqa: E731
    assert_int8_holds(tensors, native(source_weights(model, "transformer")), is_int8)
    names = sorted(places, key=lambda name: places[name])
    assert_in_order(names, BLOCKS)
    assert places[names[0]][0] % 4096 == 0 and places[names[-1]][1] == file.stat().st_size
    assert all(places[name][0] % 64 == 0 for name in names)
    for _, block in groupby(names, block_of):  # small arrays last, where sizes that are not round do no harm
        sizes = [places[name][1] - places[name][0] for name in block]
        assert sizes == sorted(sizes, reverse=True)
    assert all(places[a][1] == places[b][0] for a, b in pairwise(names))  # no holes


def test_int8_text_encoder(model: Path, tmp_path: Path) -> None:
    """Under the names that ComfyUI reads, and near the source when it runs."""
    out = tmp_path / "out"
    assert run(["quantize", str(model), "--to", "q8_0", "--text-encoder-to", "int8", "-o", str(out)]) == 0
    file = out / "text_encoder" / "text_encoder-int8.safetensors"
    tensors, places = read_safetensors(file)
    is_int8 = lambda name, t: ".layers." in name and t.ndim == 2  # noqa: E731
    assert_int8_holds(tensors, source_weights(model, "text_encoder"), is_int8)
    names = sorted(places, key=lambda name: places[name])
    assert_in_order(names, ["", *(f"layers.{n}" for n in range(11))])
    ours, truth = (Pipeline(open_model(path), RuntimeOptions("cpu")).encode([PROMPT])[0] for path in (out, model))
    assert 0 < relative_error(ours, truth) < 0.05


def test_rows_that_no_block_divides(tiny: Path, tmp_path: Path) -> None:
    """682 columns: 16-bit in GGUF, int8 without a rotation. Small arrays of odd sizes still lie on their elements."""
    for target in ("q4_0", "int8"):
        assert run(["quantize", str(tiny), "--to", target, "-o", str(tmp_path / target)]) == 0
    wanted = native(source_weights(tiny, "transformer"))
    choose = lambda n, t: "BF16" if ".w2." in n else gguf_type(n, t, "q4_0")  # noqa: E731
    assert_gguf_holds(tmp_path / "q4_0/transformer/transformer-q4_0.gguf", wanted, choose)
    tensors, places = read_safetensors(tmp_path / "int8/transformer/transformer-int8.safetensors")
    assert_int8_holds(tensors, wanted, lambda name, t: block_of(name) != "" and t.ndim == 2)
    assert all(places[name][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


@pytest.mark.parametrize("target", TARGETS)
def test_everything_else_is_carried_over(model: Path, outputs: dict[str, Path], target: str) -> None:
    kept = ["vae", "tokenizer", "scheduler"] + (["text_encoder"] if target in ("f16", "bf16", "qint4") else [])
    same = [file.relative_to(model) for folder in kept for file in (model / folder).iterdir()]
    for file in (*same, "model_index.json"):
        assert (outputs[target] / file).read_bytes() == (model / file).read_bytes(), file
    for component in ("transformer", "text_encoder"):
        ours, theirs = (json.loads((x / component / "config.json").read_bytes()) for x in (outputs[target], model))
        says_how = target == "nf4" or (target == "qint4" and component == "transformer")
        assert (ours.pop("quantization_config", None) is not None) == says_how
        assert ours == theirs
    opened = open_model(outputs[target])
    assert opened.transformer.main_format == MAIN.get(target, target)
    assert opened.transformer.config == open_model(model).transformer.config


@pytest.mark.parametrize("target", always("q8_0", "q4_k_m", "int8", "nf4", "qint4", of=TARGETS))
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_a_component_or_a_file_alone(
    model: Path, outputs: dict[str, Path], target: str, component: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (file,) = (model / component).glob("*.safetensors")
    assert run(["quantize", str(model), "--to", target, "--component", component]) == 0
    assert run(["quantize", str(file), "--to", target]) == 0
    suffix = recipe(target).suffix
    from_model, from_file = (Path(f"{stem}-{target}{suffix}") for stem in (f"small-{component}", file.stem))
    assert {path.name for path in tmp_path.iterdir()} == {from_model.name, from_file.name}
    if component == "transformer":
        assert from_model.read_bytes() == written(outputs, target).read_bytes()
    assert contents(from_file) == contents(from_model)
    metadata = open_checkpoint(from_model).metadata  # the tokenizer lies beside the folder, and beside no file
    assert ("tokenizer.ggml.tokens" in metadata) == (component == "text_encoder" and suffix == ".gguf")


def diffusers_forward(transformer: Any, latent: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return transformer([latent.unsqueeze(1)], torch.tensor([0.3]), [features])[0][0].squeeze(1)


@pytest.mark.parametrize("target", GGUF_TARGETS)
def test_diffusers_loads_our_gguf(model: Path, outputs: dict[str, Path], target: str) -> None:
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    file = written(outputs, target)
    theirs = ZImageTransformer2DModel.from_single_file(
        str(file),
        config=str(model / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    checkpoint = open_checkpoint(file)
    ours = Transformer(checkpoint.config)
    stored = checkpoint.restricted_to(shapes(ours)).tensors
    parameters = dict(theirs.named_parameters())
    assert set(parameters) == set(stored)
    for name, parameter in parameters.items():
        wide = dequantize_gguf_tensor(parameter).float().reshape(stored[name].shape)
        truth = stored[name].read().dequantize()
        if stored[name].format.name in ("q8_0", "q4_0"):
            truth = truth.half().float()  # diffusers multiplies codes and scales in float16
        # Of q4_1 it rounds the product and the sum: twice half a unit in the last place of the larger one.
        tolerance = 2**-10 * truth.abs().max() if stored[name].format.name == "q4_1" else 0
        assert (wide - truth).abs().max() <= tolerance, name

    read_into(ours, stored, Hardware(torch.device("cpu"), torch.float32))
    latent, features = torch.randn(16, 16, 16), torch.randn(9, 128)
    with torch.inference_mode():
        (modulation,) = ours.modulations(torch.tensor([0.3]), torch.float32)
        image = ours([latent], ours.refine_captions([features]), modulation)[0]
    # The float16 rounding of the weights, 2^-11 at most and half of that on average, comes out as it goes in.
    tolerance = 1e-3 if target.startswith("q") else 1e-5
    assert relative_error(image, diffusers_forward(theirs, latent, features)) <= tolerance


def test_transformers_loads_our_text_encoder_and_its_tokenizer(model: Path, outputs: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    file = written(outputs, "q8_0", "text_encoder")
    theirs = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    pipeline = Pipeline(open_model(outputs["q8_0"]), RuntimeOptions("cpu"))
    ids = pipeline.model.tokenizer.encode(PROMPT)
    assert tokenizer(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n").input_ids == ids
    with torch.inference_mode():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert relative_error(pipeline.encode([PROMPT])[0], states[-2][0]) <= 1e-5
