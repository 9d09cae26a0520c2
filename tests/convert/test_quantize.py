"""Conversion end to end: what is written, read by other programs; what is refused; and that nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from make_checkpoint import SIZES, write_diffusers, write_tokenizer
from oracles import PROMPT, relative_error
from packing import rotated
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_lite.checkpoint import output, writer
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.config import RuntimeOptions, TextEncoderConfig, TransformerConfig
from zimage_lite.convert import job
from zimage_lite.convert import streaming as convert
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import target as recipe
from zimage_lite.convert.recipe import targets
from zimage_lite.errors import UserError
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.weights import read_into

Weights = dict[str, torch.Tensor]

GGUF_TARGETS = ("q8_0", "q4_0", "f16", "bf16")  # those that gguf-py can write as well
TARGETS = (*GGUF_TARGETS, "q4_k_m", "q2_k", "int8", "int4", "fp8", "nf4", "qint4")  # of every container and codec
# What most bytes of `model` are in, whose rows of 96 weights not every format divides.
MAIN = {"q4_k_m": "q5_0", "q2_k": "iq4_nl", "nf4": "bf16"}
BLOCKS = ["", *(f"{refiner}_refiner.{n}" for refiner in ("context", "noise") for n in range(2))]
BLOCKS += [f"layers.{n}" for n in range(12)]
KEPT = ("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.")
LLAMA_NAMES = (
    ("embed_tokens.", "token_embd."), ("norm.weight", "output_norm.weight"), ("layers.", "blk."),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 as on the Hub, sizes that most formats divide as those of the true model, and more than ten layers."""
    folder = tmp_path_factory.mktemp("source") / "small"
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


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target -> what the command line makes of the model."""
    folder = tmp_path_factory.mktemp("outputs")
    for target in TARGETS:
        assert run(["quantize", str(model), "--to", target, "-o", str(folder / target)]) == 0
    return {target: folder / target for target in TARGETS}


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


def llama_cpp(source: Weights) -> Weights:
    out = {}
    for name, tensor in source.items():
        name = name.removeprefix("model.")
        for old, new in LLAMA_NAMES:
            if old != "norm.weight" or name == old:
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


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_depend_neither_on_the_run_nor_on_the_chunks(
    model: Path, outputs: dict[str, Path], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["quantize", str(model), "--to", target, "-o", str(tmp_path / "again")]) == 0
    # Few rows at a time, but not below 16: a rotation is a matrix product, whose last bits then come out otherwise.
    monkeypatch.setattr(convert, "CHUNK_WEIGHTS", 2**13 if target == "int8" else 4000)
    assert run(["quantize", str(model), "--to", target, "-o", str(tmp_path / "chunks")]) == 0
    wanted = files_below(outputs[target])
    assert files_below(tmp_path / "again") == wanted
    assert files_below(tmp_path / "chunks") == wanted


@pytest.mark.parametrize("target", ["q8_0", "int8", "nf4"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_bytes_do_not_depend_on_the_order_of_the_source(
    model: Path, target: str, component: str, tmp_path: Path
) -> None:
    """Files saved by the safetensors library are sorted by name: k before q, layer 10 before layer 2."""
    (file,) = (model / component).glob("*.safetensors")
    save_file(load_file(file), tmp_path / "sorted.safetensors")
    names = [list(open_tensor_file(path).entries) for path in (file, tmp_path / "sorted.safetensors")]
    assert names[1] == sorted(names[0]) != names[0]
    for source in (file, tmp_path / "sorted.safetensors"):
        assert run(["quantize", str(source), "--to", target, "-o", str(tmp_path / source.stem)]) == 0
    assert (tmp_path / "sorted").read_bytes() == (tmp_path / file.stem).read_bytes()


@pytest.mark.parametrize("target", TARGETS)
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


def contents(file: Path) -> dict[str, bytes]:
    """Array -> bytes. Metadata is left out: a single source file cannot tell all that config.json tells."""
    entries = open_tensor_file(file).entries
    return {name: bytes(entry.read().numpy()) for name, entry in entries.items()}


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


@pytest.mark.parametrize("source", ["q8_0", "int8", "f16", "q4_k_m", "int4", "fp8", "nf4", "qint4"])
def test_requantizing(outputs: dict[str, Path], source: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert run(["quantize", str(written(outputs, source)), "--to", "q4_0", "-o", str(out)]) == 0
    before = open_checkpoint(written(outputs, source)).tensors
    wide = native({name: tensor.read().dequantize() for name, tensor in before.items()})
    kept = "F16" if source == "f16" else "BF16"  # what stays 16-bit stays what it was
    assert_gguf_holds(out, wide, lambda name, tensor: gguf_type(name, tensor, "q4_0").replace("BF16", kept))


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"nf4", "qint4"}))
def test_requantizing_to_the_same_format_copies_the_bytes(
    outputs: dict[str, Path], target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / target
    assert run(["quantize", str(outputs[target]), "--to", target, "-o", str(out)]) == 0
    assert written({target: out}, target).read_bytes() == written(outputs, target).read_bytes()
    assert files_below(out / "text_encoder") == files_below(outputs[target] / "text_encoder")
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_another_dtype_are_not_taken_for_ours(
    outputs: dict[str, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Other programs write them; copied as they are, their bytes would be read as float32."""
    tensors = load_file(written(outputs, "int8"))
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({n: t.to(dtype) if n.endswith("weight_scale") else t for n, t in tensors.items()}, file)
    assert run(["quantize", str(file), "--to", "int8", "-o", str(out)]) == 0
    theirs, ours = open_checkpoint(file).tensors, open_checkpoint(out).tensors
    for name, truth in theirs.items():
        assert relative_error(ours[name].read_float(), truth.read_float()) <= 0.01, name


def single(model: Path, component: str = "transformer") -> Path:
    (file,) = (model / component).glob("*.safetensors")
    return file


def damaged_copy(model: Path, out: Path, name: str, value: float) -> Path:
    """A copy of the transformer's file with one weight replaced."""
    tensors = source_weights(model, "transformer")
    tensors[name].view(-1)[-7] = value
    save_file(tensors, out)
    return out


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("target", TARGETS)
def test_weights_that_are_not_numbers(model: Path, tmp_path: Path, refused, target: str, value: float) -> None:
    file = damaged_copy(model, tmp_path / "a.safetensors", "layers.10.attention.to_k.weight", value)
    line = refused("quantize", file, "--to", target, "-o", tmp_path / "out")
    assert "layers.10.attention.to_k.weight" in line and "NaN or infinite" in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("target", ["q8_0", "q4_0"])
def test_a_scale_that_is_not_a_number(outputs: dict[str, Path], tmp_path: Path, refused, target: str) -> None:
    """Both when blocks are copied and when they are unpacked."""
    file = tmp_path / "a.gguf"
    shutil.copyfile(written(outputs, "q8_0"), file)
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "layers.3.attention.qkv.weight")
    with open(file, "r+b") as opened:
        opened.seek(tensor.data_offset + 34 * 5)
        opened.write(b"\x00\x7e")
    notes = int(target != "q8_0")  # that it was lossy already
    line = refused("quantize", file, "--to", target, "-o", tmp_path / "out", notes=notes)
    assert "layers.3.attention.qkv.weight" in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("target", "value", "fits"),
    [("f16", 65504, True), ("f16", 1e5, False), ("q8_0", 1e5, True), ("q8_0", -1e7, False), ("q4_0", 1e6, False),
     ("bf16", 1e30, True), ("int8", 1e30, True), ("bf16", 3.4e38, False)],
)  # fmt: skip
def test_weights_beyond_the_format(model: Path, tmp_path: Path, refused, target: str, value: float, fits: bool) -> None:
    name = "layers.2.attention.to_out.0.weight"
    file = damaged_copy(model, tmp_path / "a.safetensors", name, value)
    out = tmp_path / "out"
    if fits:
        assert run(["quantize", str(file), "--to", target, "-o", str(out)]) == 0
        assert torch.isfinite(open_checkpoint(out).tensors[name].read().dequantize()).all()
        return
    line = refused("quantize", file, "--to", target, "-o", out)
    assert name in line and target in line
    assert list(tmp_path.iterdir()) == [file]


def test_a_head_is_left_out_and_not_counted(model: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    tensors = {name.removeprefix("model."): t for name, t in source_weights(model, "text_encoder").items()}
    save_file({**tensors, "lm_head.weight": torch.ones(320, 128)}, tmp_path / "in.safetensors")
    out = tmp_path / "out.gguf"
    quantize(tmp_path / "in.safetensors", out, "q8_0", progress=lambda *report: reports.append(report))
    total = sum(t.nbytes for t in tensors.values())
    assert reports[-1] == (total, total)
    assert len(gguf.GGUFReader(out).tensors) == len(tensors)


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_of_odd_sizes_are_no_obstacle(model: Path, tmp_path: Path, target: str) -> None:
    """Nor are tensors without a single element, or without an axis."""
    table = torch.arange(15.0).view(3, 5)
    odd = {"five": table[0], "layers.0.table": table, "layers.0.odd.weight": table, "scalar": torch.tensor(3.0)}
    for name, *shape in (("none.weight", 0), ("layers.1.none.weight", 0, 32), ("layers.1.rows.weight", 3, 0)):
        odd[name] = torch.ones(shape)
    odd = {name: tensor.bfloat16() for name, tensor in odd.items()}
    save_file({**source_weights(model, "transformer"), **odd}, tmp_path / "in.safetensors")
    out = tmp_path / "out"
    convert.convert(open_checkpoint(tmp_path / "in.safetensors"), recipe(target), out)  # `quantize` leaves them out
    tensors = open_checkpoint(out).tensors
    for name, truth in odd.items():
        assert tensors[name].shape == tuple(truth.shape)
        tolerance = {"int8": 14 / 127, "fp8": 14 / 16}.get(target, 0) if name == "layers.0.odd.weight" else 0
        torch.testing.assert_close(tensors[name].read().dequantize(), truth.float(), rtol=0, atol=tolerance)
    if recipe(target).suffix == ".gguf":
        assert all(tensor.data_offset % 32 == 0 for tensor in gguf.GGUFReader(out).tensors)


@pytest.mark.parametrize("target", ["q8_0", "int8", "f16"])
def test_progress_ends_at_the_total(model: Path, tmp_path: Path, target: str) -> None:
    reports: list[tuple[int, int]] = []
    quantize(model, tmp_path / "out", target, progress=lambda *report: reports.append(report))
    total = sum(
        t.nbytes for part in ("transformer", "text_encoder", "vae") for t in source_weights(model, part).values()
    )
    done = [report[0] for report in reports]
    assert {report[1] for report in reports} == {total}
    assert done == sorted(done) and done[0] > 0 and done[-1] == total


def test_json_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(model), "--to", "q8_0", "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    result = json.loads(line)
    assert [part["component"] for part in result["written"]] == ["transformer", "text_encoder", "vae"]
    assert [part["format"] for part in result["written"]] == ["q8_0", "q8_0", "keep"]
    for part in result["written"]:
        assert part["bytes"] == sum(file.stat().st_size for file in Path(part["path"]).parent.iterdir())
        assert part["source_bytes"] == sum(t.nbytes for t in source_weights(model, part["component"]).values())
    assert result["seconds"] >= 0 and result["peak_rss_bytes"] > 1e7
    assert str(tmp_path / "out") in captured.err


def test_unknown_formats_are_answered_with_the_known_ones(model: Path, tmp_path: Path, refused) -> None:
    line = refused("quantize", model, "--to", "q9_0", "-o", tmp_path / "out")
    assert "--to" in line and "'q9_0'" in line and all(target in line for target in targets())
    line = refused("quantize", model, "--to", "q8_0", "--text-encoder-to", "q9_0", "-o", tmp_path / "out")
    assert "--text-encoder-to" in line and all(target in line for target in (*targets(), "keep"))
    assert list(tmp_path.iterdir()) == []


def test_text_encoder_to(model: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "kept"
    assert run(["quantize", str(model), "--to", "q8_0", "--text-encoder-to", "keep", "-o", str(out)]) == 0
    assert files_below(out / "text_encoder") == files_below(model / "text_encoder")
    out = tmp_path / "q4_k_m"
    assert run(["quantize", str(model), "--to", "q8_0", "--text-encoder-to", "q4_k_m", "-o", str(out)]) == 0
    assert files_below(out / "text_encoder") == files_below(outputs["q4_0"] / "text_encoder")


@pytest.mark.parametrize("args", [("vae",), ("vae", "--component", "transformer")])
def test_a_vae_stays_as_it_is(model: Path, tmp_path: Path, refused, args: tuple[str, ...]) -> None:
    line = refused("quantize", single(model, "vae"), "--to", "q8_0", "-o", tmp_path / "out", *args[1:])
    assert str(single(model, "vae")) in line
    refused("quantize", model, "--to", "q8_0", "--component", "vae", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(model: Path, tmp_path: Path, refused) -> None:
    assert "--device cuda" in refused("quantize", model, "--to", "q8_0", "--device", "cuda", "-o", tmp_path / "out")


def test_sources_that_are_none(model: Path, tmp_path: Path, refused) -> None:
    assert "no such file" in refused("quantize", tmp_path / "none", "--to", "q8_0")
    assert "transformer" in refused("quantize", tmp_path, "--to", "q8_0", "-o", tmp_path / "out")
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    assert str(text) in refused("quantize", text, "--to", "q8_0", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [text]


def test_no_output_over_its_own_source(model: Path, tmp_path: Path, refused) -> None:
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(model, copy)
    link.symlink_to(copy)
    before = files_below(copy)
    file = single(copy)
    alone = ("--component", "transformer")
    for source, out, *more in (
        (copy, copy), (copy, tmp_path), (copy, link), (link, copy), (copy, copy / "transformer"), (file, file),
        (copy, file, *alone), (copy, link / "transformer" / file.name, *alone), (copy, copy, *alone),
    ):  # fmt: skip
        line = refused("quantize", source, "--to", "q8_0", "-o", out, "--overwrite", *more)
        assert str(out) in line
    assert files_below(copy) == before and {path.name for path in tmp_path.iterdir()} == {"copy", "link"}


def test_an_existing_output_is_kept_unless_told_otherwise(model: Path, outputs, tmp_path: Path, refused) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file.gguf"
    shutil.copytree(outputs["q4_0"], folder)
    file.write_text("old")
    commands = (
        (folder, outputs["q8_0"], ("quantize", model, "--to", "q8_0", "-o", folder)),
        (file, written(outputs, "q8_0"), ("quantize", single(model), "--to", "q8_0", "-o", file)),
    )
    for out, wanted, command in commands:
        before = files_below(tmp_path)
        assert f"{out} exists already" in refused(*command)
        assert files_below(tmp_path) == before
        assert run([*map(str, command), "--overwrite"]) == 0
        same = files_below if out.is_dir() else contents
        assert same(out) == same(wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file.gguf"}


def test_only_a_model_is_replaced_by_a_model(model: Path, tmp_path: Path, refused) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "letter.txt").write_text("dear all")
    assert str(letters) in refused("quantize", model, "--to", "q8_0", "-o", letters, "--overwrite")
    assert str(letters) in refused("quantize", single(model), "--to", "q8_0", "-o", letters, "--overwrite")
    assert files_below(tmp_path) == {"letters/letter.txt": b"dear all"}


# Each of these breaks a conversion of a folder and of a file, with and without something to replace.
@pytest.fixture(params=["folder", "file", "folder, replaced", "file, replaced"])
def command(request: pytest.FixtureRequest, model: Path, outputs: dict[str, Path], tmp_path: Path) -> list[str]:
    kind, _, replaced = request.param.partition(", ")
    source, out = (model, tmp_path / "out") if kind == "folder" else (single(model), tmp_path / "out.gguf")
    if replaced:
        old = outputs["q4_0"] if kind == "folder" else written(outputs, "q4_0")
        (shutil.copytree if kind == "folder" else shutil.copyfile)(old, out)
    return ["quantize", str(source), "--to", "q8_0", "-o", str(out), "--overwrite"]


@pytest.fixture
def untouched(tmp_path: Path, command: list[str]) -> Callable[[], bool]:
    before = files_below(tmp_path)
    return lambda: files_below(tmp_path) == before and not list(tmp_path.rglob("*.partial"))


def test_no_space(command, untouched, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("opened a file for writing")

    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(writer.TensorWriter, "__init__", never)
    line = refused(*command)
    assert "not enough room" in line and "0.1 MB free" in line
    assert untouched()


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "cannot be written")])
def test_failing_disk(command, untouched, refused, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    fail_after(monkeypatch, 9, OSError(code, os.strerror(code)))
    line = refused(*command)
    assert words in line and Path(command[5]).name in line
    assert untouched()


def fail_after(monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException) -> None:
    """Let so many pieces be written, then raise."""
    put, done = writer.TensorWriter._put, []

    def failing(self: writer.TensorWriter, offset: int, data: Any) -> None:
        done.append(offset)
        if len(done) > calls:
            raise error
        put(self, offset, data)

    monkeypatch.setattr(writer.TensorWriter, "_put", failing)


def test_interrupt(command, untouched, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread, where progress is reported, while others are writing."""
    report, calls = job.Meter.__call__, []

    def interrupted(self: Any, n_bytes: int) -> None:
        calls.append(n_bytes)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        report(self, n_bytes)

    monkeypatch.setattr(job.Meter, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
    try:
        assert run(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == 9
    assert capsys.readouterr().err.strip() == "interrupted; nothing was left half-written"
    assert untouched()


def test_a_bug_leaves_nothing_either(command, untouched, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 9, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run(command)
    assert untouched()


def test_places_that_cannot_be_written(model: Path, tmp_path: Path, refused) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for source in (model, single(model)):
        assert str(file) in refused("quantize", source, "--to", "q8_0", "-o", file / "below")
        assert "no such folder" in refused("quantize", source, "--to", "q8_0", "-o", tmp_path / "none" / "out")
    assert files_below(tmp_path) == {"file": b"text"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(model: Path, tmp_path: Path, refused) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    for source in (model, single(model)):
        assert f"{folder}: cannot be written to" in refused("quantize", source, "--to", "q8_0", "-o", folder / "out")


def test_scripts_get_the_error_itself(model: Path, tmp_path: Path) -> None:
    import zimage_lite

    with pytest.raises(UserError, match="q9_0"):
        zimage_lite.quantize(model, tmp_path / "out", "q9_0")
    (part,) = zimage_lite.quantize(single(model), tmp_path / "out.gguf", "q8_0")
    assert (part.component, part.format, part.path) == ("transformer", "q8_0", tmp_path / "out.gguf")
