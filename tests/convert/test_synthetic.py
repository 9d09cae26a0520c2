"""Random weights made in memory: against what `quantize` writes, gguf-py, and the promise that every output says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from make_checkpoint import SIZES, make_checkpoint

from zimage_lite import api
from zimage_lite.checkpoint.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions, RuntimeOptions, TextEncoderConfig
from zimage_lite.convert.catalog import component_shapes, stored_parts, true_parts
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import KEEP, Target, as_it_is, target, targets
from zimage_lite.convert.synthetic import open_synthetic, synthetic_checkpoint
from zimage_lite.pictures.saving import recipe_of
from zimage_lite.pipeline.drawing import Pipeline

ONE_OF_EACH = ("q8_0", "q4_k_m", "int8", "int4", "fp8", "nf4", "bnb-int8", "qint8", "qint4", "bf16")

# As tools/make_checkpoint.py's, with rows for the ids of the demo's tokenizer.
TINY: tuple[ModelConfig, ...] = (
    SIZES["tiny"][0],
    TextEncoderConfig(
        vocab_size=640, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=256,
    ),
    SIZES["tiny"][2],
)  # fmt: skip


@pytest.fixture
def tiny_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """synthetic:FORMAT means tiny models."""
    monkeypatch.setattr(api, "open_synthetic", partial(open_synthetic, configs=TINY))


def described(checkpoint: Checkpoint) -> dict[str, tuple]:
    """All that the headers tell, but for where the data begin: metadata, and so headers, may differ in length."""
    first = min(entry.offset for tensor in checkpoint.tensors.values() for entry in tensor.parts.values())
    return {
        name: (
            tensor.format.name,
            tensor.shape,
            tensor.first_row,
            {key: value for key, value in tensor.options.items() if key != "offset"},  # nf4's depends on the weights
            tensor.nbytes,
            {
                suffix: (entry.name, entry.kind, entry.shape, entry.nbytes, entry.offset - first)
                for suffix, entry in tensor.parts.items()
            },
        )
        for name, tensor in checkpoint.tensors.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", ONE_OF_EACH)
def test_headers_are_those_of_a_quantized_model(to: str, tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "out", to)
    written = open_checkpoint(tmp_path / "out" / "transformer")
    made = synthetic_checkpoint(SIZES["tiny"][0], target(to))
    assert described(made) == described(written)
    assert (made.config, made.layout, made.main_format) == (written.config, written.layout, written.main_format)
    if target(to).text_encoder_to != KEEP:
        written = open_checkpoint(tmp_path / "out" / "text_encoder")
        made = synthetic_checkpoint(SIZES["tiny"][1], target(target(to).text_encoder_to))
        assert described(made) == described(written)
        assert made.config == written.config


def test_kept_parts_are_as_released(tiny: Path) -> None:
    for component, config in zip(("text_encoder", "vae"), SIZES["tiny"][1:], strict=True):
        made, real = synthetic_checkpoint(config, as_it_is()), open_checkpoint(tiny / component)
        assert {n: (t.format, t.shape) for n, t in made.tensors.items()} == {
            n: (t.format, t.shape) for n, t in real.tensors.items()
        }
        assert made.config == real.config


@pytest.mark.slow  # a picture from every format
@pytest.mark.parametrize("to", targets())
def test_an_omni_in_every_format(to: str) -> None:
    """What sees pictures is told by its names and shapes again, and its tower stays as it is."""
    omni, _, _, tower = SIZES["tiny-omni"]
    files = open_synthetic(f"synthetic:omni/{to}", configs=(omni, *TINY[1:]), vision=tower)
    wanted = component_shapes(omni)
    assert files.sees and files.transformer.config == omni and files.transformer.tensors.keys() == wanted.keys()
    files.transformer.restricted_to(wanted)
    assert files.siglip and files.siglip.config == tower and files.siglip.main_format == "bf16"


@pytest.mark.parametrize("to", ONE_OF_EACH)
def test_draws_a_picture(to: str) -> None:
    model = open_synthetic(f"synthetic:{to}", configs=TINY)
    image = Pipeline(model, RuntimeOptions(device="cpu")).generate([GenerateOptions("a cat", 64, 64, steps=2)])[0]
    assert image.shape == (64, 64, 3)
    assert image.float().std() > 20  # uniform noise has 74; not a number is refused by the pipeline itself


@pytest.mark.slow
@pytest.mark.parametrize("to", targets())
def test_weights_keep_the_variance(to: str) -> None:
    model = open_synthetic(f"synthetic:{to}", configs=TINY)
    for name in ("attention.to_v", "feed_forward.w1", "feed_forward.w2"):
        name = f"layers.2.{name}.weight"
        weight = model.transformer.tensors[name].read_float()
        # 256 x 256 weights have theirs to 0.3 %. What q2_k loses, which is a third, adds to or takes from it.
        assert weight.std() * math.sqrt(weight.shape[1]) == pytest.approx(1, abs=0.08 if to == "q2_k" else 0.03)
    assert torch.equal(model.transformer.tensors["layers.0.ffn_norm1.weight"].read_float(), torch.ones(1, 256))


def test_tensors_of_one_shape_differ() -> None:
    tensors = synthetic_checkpoint(SIZES["full"][0], target("q8_0")).tensors
    q, k, v = (tensors[f"layers.5.attention.to_{x}.weight"].read_float(0, 64) for x in "qkv")
    assert not torch.equal(q, k) and not torch.equal(k, v) and not torch.equal(q, v)
    layers = {tensors[f"layers.{i}.attention.to_q.weight"].read_float(0, 1).sum().item() for i in range(30)}
    assert len(layers) == 7  # starting rows, as synthetic.py says


@pytest.mark.parametrize("to", ["q8_0", "q4_k_m", "iq4_xs"])
def test_gguf_py_reads_the_same(to: str) -> None:
    """Blocks of ggml: unpacked by gguf-py they are numbers of the intended deviation, and those that we unpack."""
    tensor = synthetic_checkpoint(SIZES["tiny"][0], target(to)).tensors["layers.1.feed_forward.w1.weight"]
    kind = gguf.GGMLQuantizationType[tensor.format.name.upper()]
    raw = tensor.parts[""].read().numpy().reshape(tensor.rows, -1)
    wide = torch.from_numpy(gguf.dequantize(raw, kind))
    assert wide.std() * math.sqrt(tensor.columns) == pytest.approx(1, abs=0.03)
    assert torch.equal(wide, tensor.read_float())


@pytest.mark.parametrize("to", ["q4_k_m", "int4", "nf4", "qint4", "bf16"])
def test_any_cut_reads_the_same_bytes(to: str) -> None:
    """And the same ones when the model is opened again."""
    models = [synthetic_checkpoint(SIZES["tiny"][0], target(to)) for _ in range(2)]
    for name in ("layers.1.attention.to_k.weight", "layers.1.adaLN_modulation.0.weight"):
        whole, again = (model.tensors[name].read() for model in models)
        tensor = models[0].tensors[name]
        for suffix, part in whole.parts.items():
            assert torch.equal(part.view(torch.uint8), again.parts[suffix].view(torch.uint8))
        for suffix, entry in tensor.parts.items():
            everything = entry.read()
            assert len(everything) == entry.nbytes, suffix
            for start, stop in ((0, 1), (5, entry.nbytes), (entry.nbytes // 3, entry.nbytes // 2)):
                start = min(start, entry.nbytes)
                assert torch.equal(entry.read(start, stop - start), everything[start:stop])
        if tensor.piece_rows(1) < tensor.rows:
            assert torch.equal(tensor.read_float(64, 128), tensor.read_float()[64:128])


@pytest.mark.slow  # the true model's header in every format
@pytest.mark.parametrize("to", ONE_OF_EACH)
def test_full_size_is_what_the_catalog_says(to: str) -> None:
    """Opening reads no weight, so it takes a fraction of a second."""
    for config, chosen in ((SIZES["full"][0], target(to)), (SIZES["full"][1], _encoder_of(to))):
        made = synthetic_checkpoint(config, chosen)
        wanted = true_parts(made.component, chosen)
        # Not to the byte: q, k and v each count the table that they share, and quant_state counts nowhere.
        assert made.nbytes == pytest.approx(sum(part.n_bytes for part in wanted), rel=3e-5)
        found = {part.name: part for part in stored_parts(made)}
        for part in wanted:
            assert found[part.name].format == part.format and found[part.name].columns == part.columns


def _encoder_of(to: str) -> Target:
    name = target(to).text_encoder_to
    return as_it_is() if name == KEEP else target(name)


def test_full_size_block_and_embedding() -> None:
    model = open_synthetic("synthetic:int8")
    block = {name: tensor.read() for name, tensor in model.transformer.under("layers.17").items()}
    assert block["attention.to_q.weight"].shape == (3840, 3840)
    assert block["feed_forward.w2.weight"].parts[""].shape == (3840, 10240)
    n_bytes = sum(weight.nbytes for weight in block.values())
    assert n_bytes == sum(tensor.nbytes for tensor in model.transformer.under("layers.17").values())
    x = torch.randn(8, 3840, generator=torch.Generator().manual_seed(0))
    assert block["attention.to_q.weight"].linear(x).std() == pytest.approx(1, abs=0.05)
    rows = model.text_encoder.tensors["embed_tokens.weight"].gather([0, 151_935])
    assert rows.shape == (2, 2560) and rows.std() > 0


@pytest.mark.slow
def test_every_output_says_so(tiny_ones: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "image.png"
    size = ("--width", "64", "--height", "64", "--steps", "1", "--device", "cpu")
    assert run(["generate", "x", "--model", "synthetic:Q4_K_M", "-o", str(out), *size, "--json"]) == 0
    captured = capsys.readouterr()
    assert "note: synthetic:q4_k_m: the weights are random, so the picture is noise" in captured.err
    assert json.loads(captured.out)["synthetic"] is True
    assert recipe_of(out)["model"] == {"name": "synthetic:q4_k_m", "format": "q4_k", "synthetic": True}
    assert run(["generate", "x", "-o", str(out), *size, "--json"]) == 0  # the demo
    captured = capsys.readouterr()
    assert json.loads(captured.out)["synthetic"] is False and "random" not in captured.err


def test_parts_can_be_replaced(tiny_ones: None, tiny: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "comfy", layout="comfyui")
    vae = tmp_path / "comfy" / "vae" / "ae.safetensors"
    pipeline = api.load("synthetic:int8", vae=vae, device="cpu")
    assert pipeline.model.vae.source == vae and pipeline.model.synthetic
    assert pipeline.model.transformer.main_format == "int8"
    assert api.load("synthetic:int8", tokenizer=tiny / "tokenizer").model.tokenizer.source == str(tiny / "tokenizer")


def test_plan_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = ("--gpu", "RTX 3060 Laptop", "--json")
    assert run(["plan", "--model", "synthetic:int8", *gpu]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["model"].startswith("synthetic:int8")
    assert run(["plan", "--format", "int8", *gpu]) == 0
    shapes = json.loads(capsys.readouterr().out)
    for phase, other in zip(made["phases"], shapes["phases"], strict=True):
        assert phase["peak_vram_bytes"] == pytest.approx(other["peak_vram_bytes"], rel=0.01)


@pytest.mark.parametrize("name", ["q9_0", "", "int8:tiny"])
def test_unknown_format_lists_what_there_is(name: str, refused: Callable[..., str]) -> None:
    line = refused("generate", "x", "--model", f"synthetic:{name}")
    assert "synthetic:FORMAT" in line and repr(name) in line and all(known in line for known in targets())


@pytest.mark.slow
def test_a_part_of_another_size_is_refused(tiny: Path, refused: Callable[..., str]) -> None:
    line = refused("generate", "x", "--model", "synthetic:int8", "--text-encoder", tiny / "text_encoder")
    assert "128" in line and "2560" in line
