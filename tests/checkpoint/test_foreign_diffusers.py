"""Folders of diffusers and transformers: read as those who saved them read them, written so that they load.

diffusers and transformers load bitsandbytes' weights on a CPU as well as on a GPU; only diffusers' check of the
environment says no, so it is left out here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, QuantoConfig, ZImageTransformer2DModel
from foreign import assert_reads, forward, inputs, is_block_matrix, write_model
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao_values import TORCHAO
from transformers import AutoModel

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.convert.quantize import quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # that quanto is deprecated, that bitsandbytes casts
    pytest.mark.slow,  # whole models, written and read by other libraries
    pytest.mark.usefixtures("quanto_without_a_compiler"),
]

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("diffusers") / "model")


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.quantizers.bitsandbytes import bnb_quantizer  # seconds, which collecting the tests need not take

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        monkeypatch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda self, *args, **more: None)


def load(folder: Path, dtype: torch.dtype = torch.float32, config: Any = None) -> Any:
    more = {"quantization_config": config} if config else {}
    return ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype, device_map={"": "cpu"}, **more)


def theirs(module: Any) -> Tensor:
    """What diffusers' transformer makes of the inputs."""
    latent, features, time = inputs()
    with torch.no_grad():  # quanto's packed weights do not stand inference mode
        return module([latent.unsqueeze(1)], time, [features])[0][0].squeeze(1)


def unpacked(folder: Path) -> Any:
    """diffusers' transformer with the weights that we read."""
    config = ZImageTransformer2DModel.load_config(folder)
    module = ZImageTransformer2DModel.from_config(config)
    tensors = open_checkpoint(folder).tensors
    module.load_state_dict({name: tensors[name].read().dequantize() for name in module.state_dict()})
    return module.eval()


# ---------------------------------------------------------------- what others write


def bnb_weights(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a model that bitsandbytes quantized, by its own functions."""
    from bitsandbytes import functional

    for name, part in module.named_modules():
        if type(part).__name__ == "Linear4bit":
            state = part.weight.quant_state
            state.dtype = torch.float32
            yield f"{name}.weight", functional.dequantize_4bit(part.weight.data, state)
        elif type(part).__name__ == "Linear8bitLt":
            yield f"{name}.weight", part.weight.data * part.weight.SCB.float().view(-1, 1) / 127


BNB = {
    "nf4": ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "nf4 once": ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": ("fp4", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
    "fp4 once": ("fp4", {"load_in_4bit": True}),
    "nf4 in bf16": ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}),
    "int8": ("bnb-int8", {"load_in_8bit": True}),
    "int8, some kept": ("bnb-int8", {"load_in_8bit": True, "llm_int8_skip_modules": ["cap_embedder", "to_out"]}),
}


@pytest.mark.parametrize("case", BNB)
def test_reads_bitsandbytes_folders(model: Path, tmp_path: Path, case: str) -> None:
    name, options = BNB[case]
    module = load(model / "transformer", config=BitsAndBytesConfig(**options))
    module.save_pretrained(tmp_path / "saved")
    expected = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    expected = {name: tensor for name, tensor in expected.items() if name in dict(module.named_parameters())}
    quantized = dict(bnb_weights(module))
    assert len(quantized) > 30
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.main_format == name
    assert {n for n, t in checkpoint.tensors.items() if t.format.family != "plain"} == set(quantized)
    # Eight bits: bitsandbytes multiplies by the scale and then divides, here it is one factor; two roundings apart.
    assert_reads(checkpoint, expected | quantized, tolerance=2e-7 if name == "bnb-int8" else 0)
    assert relative_error(forward(tmp_path / "saved"), theirs(unpacked(tmp_path / "saved"))) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "int2"])
def test_reads_quanto_folders(model: Path, tmp_path: Path, weights: str, dtype: torch.dtype) -> None:
    module = load(model / "transformer", dtype, QuantoConfig(weights_dtype=weights))
    module.save_pretrained(tmp_path / "saved")
    expected = {name: p.dequantize() if hasattr(p, "qtype") else p for name, p in module.named_parameters()}
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.main_format == f"q{weights}"
    assert len([t for t in checkpoint.tensors.values() if t.format.name == f"q{weights}"]) > 30
    # In bfloat16, quanto rounds each product of eight bits; and some shifts, which it repacks for the CPU at hand.
    tolerance = 0 if dtype == torch.float32 else 2**-8
    assert_reads(checkpoint, {name: tensor.detach() for name, tensor in expected.items()}, tolerance)
    if dtype == torch.float32:
        assert relative_error(forward(tmp_path / "saved"), theirs(load(tmp_path / "saved"))) <= 1e-5


def test_reads_torchao_folders(model: Path, tmp_path: Path) -> None:
    """torchao is not installed, so its weights of one small matrix are repeated over every matrix of the blocks."""
    cases = list(TORCHAO.values())
    source, arrays, expected = load_file(model / "transformer" / FILE), {}, {}
    for i, (name, tensor) in enumerate(source.items()):
        if not is_block_matrix(name, tensor):
            arrays[name] = expected[name] = tensor
            continue
        kind, group, data, scale, zero, wide = cases[i % len(cases)]
        if len(scale) == 1:  # all rows share it
            kind, group, data, scale, zero, wide = cases[0]
        rows, columns = len(tensor) // 2, tensor.shape[1] // 8
        dtype = torch.float8_e4m3fn if kind == "torchao-fp8" else torch.int8

        def tiled(values: list, kind: torch.dtype, across: int = columns, down: int = rows) -> Tensor:
            return torch.tensor(values, dtype=kind).view(2, -1).repeat(down, across).contiguous()

        layer = name.removesuffix("weight")
        across = 1 if group == 8 else columns
        arrays[f"{layer}_weight_qdata"] = tiled(data, torch.int8).view(dtype)
        arrays[f"{layer}_weight_scale"] = tiled(scale, torch.float32, across)
        if zero is not None:
            arrays[f"{layer}_weight_zero_point"] = tiled(zero, torch.int8, across)
        expected[name] = tiled(wide, torch.float32)
    folder = tmp_path / "saved"
    folder.mkdir()
    types = {name: json.dumps({"_type": "Int8Tensor"}) for name in source}
    save_file(arrays, folder / FILE, {"format": "pt", **types})
    shutil.copyfile(model / "transformer" / "config.json", folder / "config.json")
    checkpoint = open_checkpoint(folder)
    assert {"torchao-int8", "torchao-fp8"} < checkpoint.bytes_by_format().keys()
    assert_reads(checkpoint, expected)
    lines: list[str] = []
    quantize(folder / FILE, tmp_path / "out.gguf", "q8_0", note=lines.append)
    assert "the source is torchao-" in lines[0]


@pytest.mark.parametrize("target", ["q8_0", "int8"])
@pytest.mark.parametrize(("name", "config"), [
    ("nf4", BitsAndBytesConfig(**BNB["nf4"][1])), ("qint4", QuantoConfig(weights_dtype="int4")),
])  # fmt: skip
def test_converts_folders(model: Path, tmp_path: Path, name: str, config: Any, target: str) -> None:
    shutil.copytree(model, tmp_path / "model")
    module = load(model / "transformer", config=config)
    shutil.rmtree(tmp_path / "model" / "transformer")
    module.save_pretrained(tmp_path / "model" / "transformer")
    lines: list[str] = []
    out = tmp_path / "out"
    written, *_ = quantize(tmp_path / "model", out, target, measure=True, note=lines.append)
    assert len(lines) == 1 and f"the source is {name} already" in lines[0]
    assert max(error.sums.relative_rmse for error in written.errors if error.format == target) < 0.02
    config_out = json.loads((out / "transformer" / "config.json").read_text())
    assert "quantization_config" not in config_out
    wanted = theirs(unpacked(tmp_path / "model" / "transformer"))
    assert relative_error(forward(out / "transformer"), wanted) < 0.05


# ---------------------------------------------------------------- what we write


@pytest.fixture(scope="module")
def outputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Target -> the model in that format, transformer and text encoder."""
    folder, made = tmp_path_factory.mktemp("outputs"), {}

    def make(target: str) -> Path:
        if target not in made:
            quantize(model, folder / target, target)
            made[target] = folder / target
        return made[target]

    return make


def text_states(module: Any) -> Tensor:
    with torch.no_grad():
        return module(torch.arange(20).view(1, -1)).last_hidden_state.float()


@pytest.mark.parametrize("target", ["nf4", "bnb-int8"])
def test_diffusers_loads_our_bitsandbytes(model: Path, outputs: Callable[[str], Path], target: str) -> None:
    folder = outputs(target) / "transformer"
    module = load(folder)
    quantized = dict(bnb_weights(module))
    tensors = open_checkpoint(folder).tensors
    # Its loader replaces every linear that the config does not skip, so these are exactly those we packed.
    assert set(quantized) == {name for name, tensor in tensors.items() if tensor.format.name == target}
    kept = {name for name, p in module.named_parameters() if name not in quantized and p.ndim == 2}
    assert {name for name in kept if name.endswith("weight")} >= {"cap_embedder.1.weight", "t_embedder.mlp.0.weight"}
    assert not any(parameter.device.type == "meta" for parameter in module.parameters())
    for name, wide in quantized.items():
        assert (tensors[name].read_float() - wide).abs().max() <= 2e-7 * wide.abs().max(), name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    wanted = BitsAndBytesConfig(load_in_4bit=target == "nf4", load_in_8bit=target != "nf4").to_dict()
    assert config.keys() == wanted.keys()
    differ = {key for key in config if config[key] != wanted[key]}
    assert differ == {"llm_int8_skip_modules"} | (
        {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"} if target == "nf4" else set()
    )
    # Its products are of bfloat16 (eight bits: of int8 activations), ours of float32.
    assert relative_error(theirs(module), theirs(unpacked(folder))) < (0.02 if target == "nf4" else 0.05)
    assert relative_error(forward(folder), theirs(unpacked(folder))) <= 1e-5
    assert relative_error(theirs(unpacked(folder)), theirs(load(model / "transformer"))) < 0.4


@pytest.mark.parametrize("target", ["nf4", "bnb-int8"])
def test_transformers_loads_our_bitsandbytes(model: Path, outputs: Callable[[str], Path], target: str) -> None:
    folder = outputs(target) / "text_encoder"
    module = AutoModel.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    quantized, tensors = dict(bnb_weights(module)), open_checkpoint(folder).tensors
    assert len(quantized) == 9 * 7
    assert set(quantized) == {name for name, tensor in tensors.items() if tensor.format.name == target}
    for name, wide in quantized.items():
        assert (tensors[name].read_float() - wide).abs().max() <= 2e-7 * wide.abs().max(), name
    truth = AutoModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    truth.load_state_dict({name: tensors[name].read().dequantize() for name in truth.state_dict()})
    assert relative_error(text_states(module), text_states(truth)) < 0.05


def test_nf4_bytes_in_the_file_are_bitsandbytes_own(model: Path, outputs: Callable[[str], Path]) -> None:
    from bitsandbytes import functional

    stored = load_file(outputs("nf4") / "transformer" / FILE)
    tensors = open_checkpoint(outputs("nf4") / "transformer").tensors
    layers = [
        name.removesuffix(".quant_map") for name in stored if name.endswith(".quant_map") and "nested" not in name
    ]
    assert layers and not any("refiner" in name for name in layers)
    for name in layers:
        parts = {key.removeprefix(f"{name}."): part for key, part in stored.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        assert (state.shape, state.dtype, state.nested) == (tensors[name].shape, torch.bfloat16, True)
        state.dtype = torch.float32
        assert torch.equal(functional.dequantize_4bit(stored[name], state), tensors[name].read_float())


@pytest.mark.parametrize("target", ["qint8", "qfloat8", "qint4"])
def test_diffusers_loads_our_quanto(model: Path, outputs: Callable[[str], Path], target: str) -> None:
    folder = outputs(target) / "transformer"
    module = load(folder)
    plain = [p for p in module.parameters() if not hasattr(p, "qtype")]
    assert not any(parameter.device.type == "meta" for parameter in plain)
    tensors = open_checkpoint(folder).tensors
    packed = {name for name, tensor in tensors.items() if tensor.format.name == target}
    assert {name for name, parameter in module.named_parameters() if hasattr(parameter, "qtype")} == packed
    # Scales and shifts are in bfloat16, as quanto rounds what it makes of four bits; diffusers widens them first.
    error = relative_error(theirs(module), theirs(unpacked(folder)))
    assert error <= (0.03 if target == "qint4" else 1e-5)
    assert relative_error(theirs(unpacked(folder)), theirs(load(model / "transformer"))) < 0.4


def test_diffusers_draws_from_our_quanto_folder(outputs: Callable[[str], Path]) -> None:
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(outputs("qint8"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "pt"}
    images = []
    for transformer in (pipeline.transformer, unpacked(outputs("qint8") / "transformer")):
        pipeline.transformer = transformer
        generator = torch.Generator().manual_seed(1)
        images.append(pipeline("a red circle", generator=generator, **call).images[0])
    assert images[0].std() > 0.01 and (images[0] - images[1]).abs().max() < 0.01
