"""The transformer with the Triton kernels (in the interpreter where there is no GPU) against the references, and both
against unpacked weights in float32.

A result may be at most twice as far from float32 as that of the references, which round and quantize at the same
points. What lies between the two is small against that distance, so that it cannot come from another path: codes that
fall on the other side of a half, few in float32 and more in float16, where rounding moves what is quantized by up to
1/16 of a step."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from computing import FULL, HALF, INT8, PLAIN, as_on_turing, packed
from live_bytes import LiveBytes, NoLaunch
from marking import always
from oracles import PROMPT, psnr, relative_error, transformer_inputs
from PIL import Image
from torch import Tensor, nn
from zimage_kernels._triton import interpreted

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.cli import run
from zimage_lite.config import TransformerConfig
from zimage_lite.memory.plan import activation_bytes
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import Linear, RMSNorm, bind, shapes
from zimage_lite.model.rope import grid_positions, rope_angles
from zimage_lite.model.transformer import Block, Transformer, is_time_weight
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import QTensor

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="kernels on CPU tensors: needs TRITON_INTERPRET=1"),
    pytest.mark.slow,  # whole blocks in Triton's interpreter
]
CONFIG = TransformerConfig(dim=256, n_heads=2, n_layers=1, n_refiner_layers=1, cap_feat_dim=128)
LENGTHS = [33, 31]  # several sequences, neither a multiple of a tile


def dense(module: nn.Module) -> dict[str, Tensor]:
    """Norms near one, linears that keep the variance."""
    return {
        name: 1 + 0.1 * torch.randn(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5
        for name, shape in shapes(module).items()
    }


def added(weights: dict[str, QTensor], dtype: torch.dtype, compute: Compute) -> Tensor:
    """What a block adds to the residual stream, in which one channel is 30 times as large as the others."""
    block = Block(CONFIG, modulated=False)
    bind(block, weights, dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), CONFIG.dim, generator=generator)
    x[:, 5] *= 30
    modulation = torch.randn(4, CONFIG.dim, generator=generator) * 0.3 + torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    rope = rope_angles(grid_positions((len(x), 1, 1), (1, 0, 0)), CONFIG.axes_dims, CONFIG.rope_theta)
    with torch.inference_mode():
        return block(x.clone(), rope, LENGTHS, modulation.to(dtype), compute) - x


@pytest.mark.parametrize("name", ["f32", "int8"])
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_a_block(name: str, dtype: torch.dtype) -> None:
    weights = {own: packed(weight, name) for own, weight in dense(Block(CONFIG, modulated=False)).items()}
    unpacked = {own: packed(weight.dequantize(), "f32") for own, weight in weights.items()}
    truth = added(unpacked, FULL, PLAIN["reference"])
    ways = INT8 if name == "int8" else PLAIN
    torchs, ours = added(weights, dtype, ways["reference"]), added(weights, dtype, ways["triton"])
    if (name, dtype) == ("f32", FULL):
        assert torch.equal(torchs, truth) and relative_error(ours, truth) <= 1e-5
        return
    assert relative_error(ours, truth) <= 2 * relative_error(torchs, truth)
    assert relative_error(ours, torchs) <= relative_error(torchs, truth) / 2
    # It was computed in 8 bits, or was not: a step is 1/127 of the largest of a row.
    assert (relative_error(torchs, truth) > 0.005) == (name == "int8")


def test_values_in_float16_beside_bfloat16() -> None:
    """On GeForce cards v is float16 and smaller by a power of two, which `out` takes back. Triton's interpreter stores
    bfloat16 truncated, an error twice as large at most; without the power the result would be off by 16 times."""
    weights = {own: packed(weight, "int8") for own, weight in dense(Block(CONFIG, modulated=False)).items()}
    unpacked = {own: packed(weight.dequantize(), "f32") for own, weight in weights.items()}
    truth = added(unpacked, FULL, PLAIN["reference"])
    torchs, ours = (added(weights, torch.bfloat16, INT8[backend]) for backend in ("reference", "triton"))
    assert relative_error(ours, truth) <= 2 * relative_error(torchs, truth)


def test_values_that_float16_sums_do_not_hold_are_told() -> None:
    """As infinite or NaN, which the pipeline explains; never as a wrong picture."""
    weights = dense(Block(CONFIG, modulated=False))
    weights["attention.to_v.weight"] *= 1e5
    int8 = {own: packed(weight, "int8") for own, weight in weights.items()}
    assert not added(int8, HALF, INT8["triton"]).isfinite().all()


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_turing(monkeypatch)


@pytest.mark.parametrize("dtype", always(HALF, of=[FULL, HALF]))
def test_a_block_on_compute_capability_7_5(dtype: torch.dtype, turing: None) -> None:
    """Products in 8 bits and attention in 16, so that it is no farther from the truth than all in 8 bits; in float32,
    where queries and keys are never 8-bit, as far but for sums in another order."""
    weights = {own: packed(weight, "int8") for own, weight in dense(Block(CONFIG, modulated=False)).items()}
    unpacked = {own: packed(weight.dequantize(), "f32") for own, weight in weights.items()}
    truth = added(unpacked, FULL, PLAIN["reference"])
    torchs, ours = added(weights, dtype, INT8["reference"]), added(weights, dtype, INT8["triton"])
    assert 0.005 < relative_error(ours, truth) <= (1.0001 if dtype == FULL else 1) * relative_error(torchs, truth)
    plain = added(unpacked, dtype, PLAIN["triton"])
    assert relative_error(plain, truth) <= (1e-5 if dtype == FULL else 2e-3)


@pytest.mark.parametrize("capability", [86, 75])
def test_float16_holds_what_the_scaling_is_for(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of v and of the hidden layer of 10^3 to 10^5 overflow in a plain float16 output."""
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: capability)
    factors = {"attention.to_v": 1e3, "attention.to_out": 300, "feed_forward.w1": 300, "feed_forward.w3": 300}
    weights = dense(Block(CONFIG, modulated=False))
    for name in weights:
        weights[name] *= next((factor for part, factor in factors.items() if part in name), 1)
    int8 = {own: packed(weight, "int8") for own, weight in weights.items()}
    truth = added(int8, FULL, INT8["reference"])
    for compute in INT8.values():
        assert relative_error(added(int8, HALF, compute), truth) <= 0.02  # codes a step apart, as in `test_a_block`


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_keys_are_centred_by_sequence(backend: str) -> None:
    """Keys that lie close around a vector of their sequence's own, one opposite to the other: their range is 20 times
    that of what tells them apart, so that codes of them as they are lose 4 bits of it."""
    q, k, v = (torch.randn(sum(LENGTHS), 2, 128) for _ in range(3))
    own = torch.randn(2, 128)
    k = k / 20 + torch.cat([own.expand(LENGTHS[0], 2, 128), -own.expand(LENGTHS[1], 2, 128)])
    q, k, v = (t.half() for t in (q, k, v))
    norm = RMSNorm(128, 1e-5)
    norm.weight = nn.Parameter(torch.full((128,), 3.0), requires_grad=False)  # so that attention is not even
    rope = torch.ones(len(q), 64), torch.zeros(len(q), 64)
    truth = PLAIN["reference"].attention(q.float(), k.float(), v.float(), (norm, norm), rope, LENGTHS, int8=False)
    ours = INT8[backend].attention(q, k, v, (norm, norm), rope, LENGTHS, int8=True)
    assert relative_error(ours, truth) <= 0.01


def test_each_linear_gets_what_it_takes() -> None:
    """Some weights int8, some not; those that share an input only together."""
    weights = dense(Block(CONFIG, modulated=False))
    mixed = {own: packed(w, "f32" if "to_k" in own or "w3" in own else "int8") for own, w in weights.items()}
    block = Block(CONFIG, modulated=False)
    bind(block, mixed, FULL)
    attention, feed_forward = block.attention, block.feed_forward
    assert INT8["triton"].group(attention.to_q, attention.to_v) == 256
    assert INT8["triton"].group(attention.to_q, attention.to_k, attention.to_v) is None
    assert INT8["triton"].group(feed_forward.w1) == 256 and INT8["triton"].group(feed_forward.w2) is None
    assert PLAIN["triton"].group(attention.to_q) is None
    unpacked = {own: packed(weight.dequantize(), "f32") for own, weight in mixed.items()}
    truth = added(unpacked, FULL, PLAIN["reference"])
    for compute in INT8.values():
        assert 1e-4 < relative_error(added(mixed, FULL, compute), truth) <= 0.01  # only the input of `out` is int8
    attention.to_v.packed = replace(mixed["attention.to_v.weight"], options={"group": 64})  # another rotation
    assert INT8["triton"].group(attention.to_q, attention.to_v) is None


@pytest.mark.parametrize("to", always("f32", of=["int8", "f32"]))
def test_the_transformer_with_several_sequences(to: str) -> None:
    """Two images and their captions: sequences of their own lengths, through all blocks."""
    latents, features, t = transformer_inputs(8, 10, (9, 40))
    weights = {
        name: packed(weight, to if is_of_block(name) else "f32") for name, weight in dense(Transformer(CONFIG)).items()
    }
    results, ways = [], INT8 if to == "int8" else PLAIN
    for compute, dtype in ((PLAIN["reference"], FULL), (ways["reference"], HALF), (ways["triton"], HALF)):
        model = Transformer(CONFIG, compute)
        bind(model, weights, dtype)
        with torch.inference_mode():
            captions = model.refine_captions(features)
            (modulation,) = model.modulations(t, dtype)
            results.append(model([latent.to(dtype) for latent in latents], captions, modulation))
    for truth, torchs, ours in zip(*results, strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(torchs, truth)
        assert (relative_error(torchs, truth) > 0.005) == (to == "int8")


def is_of_block(name: str) -> bool:
    return name.startswith(("layers", "noise_refiner", "context_refiner")) and not is_time_weight(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("wiring") / "int8"
    quantize(tiny, folder, "int8")
    return folder


def test_the_pipeline_says_what_ran(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--width", "32", "--height", "32", "--steps", "1", "--seed", "3", "--device", "cpu", "--json")
    drawn = {}
    for backend in ("triton", "reference"):
        out = tmp_path / f"{backend}.png"
        options = ("--backend", backend, "--compute", "int8", "-o", str(out))
        assert run(["generate", PROMPT, "--model", str(small), *size, *options]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["backend"], result["compute"]) == (backend, "int8")
        drawn[backend] = torch.from_numpy(np.array(Image.open(out)))
    # float32 sums in another order: at most a few codes fall on the other side of a half.
    assert psnr(drawn["triton"], drawn["reference"], 255) >= 50


def test_the_demo_draws_the_same_in_8_bits(tmp_path: Path) -> None:
    quantize("demo", tmp_path / "int8", "int8")
    captions = ("a red circle on a blue background", "a small green square on a yellow background")
    requests = [GenerateOptions(caption, seed=seed) for seed, caption in enumerate(captions)]
    ours, plain = (load(tmp_path / "int8", device="cpu", compute=bits).generate(requests) for bits in ("int8", "16bit"))
    for a, b in zip(ours, plain, strict=True):
        assert 50 <= psnr(a, b, 255) < float("inf")


def test_the_pipeline_on_compute_capability_7_5(small: Path, turing: None) -> None:
    """What it is about to do, and `--json` will say; a block shows above that it does."""
    told: list[str] = []
    pipeline = load(small, device="cpu", backend="triton", tell=told.append)
    found = pipeline.computes_with()
    assert (found["backend"], found["compute"]) == ("triton+torch", "int8")
    assert pipeline.denoising.component.reencoded
    (note,) = told
    assert note.startswith("Triton has no matrix units on this GPU: torch multiplies and attends")


def block_in_int8(config: TransformerConfig, dtype: torch.dtype) -> Block:
    """Without values, on the device that is the default."""
    block = Block(config, modulated=False)
    for owner in block.modules():
        if isinstance(owner, Linear):
            rows, columns = owner.weight.shape
            parts = {"": torch.empty(rows, columns, dtype=torch.int8), "_scale": torch.empty(rows, 1)}
            owner.packed, owner.dtype = QTensor(FORMATS["int8"], (rows, columns), parts, {"group": 256}), dtype
        elif isinstance(owner, RMSNorm):
            owner.weight = nn.Parameter(owner.weight.to(dtype), requires_grad=False)
    return block


@pytest.mark.parametrize("tokens", [1152, 4224])
def test_activations_of_the_references_in_8_bits(tokens: int) -> None:
    """No more than is planned for unpacked weights, in float32 on the CPU, where --compute int8 may be asked for."""
    config = TransformerConfig()
    with torch.device("meta"), torch.inference_mode():
        block = block_in_int8(config, FULL)
        with LiveBytes() as live:
            rope = torch.empty(2, tokens, config.head_dim // 2).unbind()
            block(torch.empty(tokens, config.dim), rope, [tokens], None, INT8["reference"])
    promised = activation_bytes(tokens, config.dim, config.ffn_dim, config.n_heads, 4)
    assert promised / 2 <= live.peak_bytes <= promised - config.n_heads * 2**20


@pytest.mark.parametrize("capability", [86, 75])
@pytest.mark.parametrize("tokens", [544, 832, 4224, 16512])
def test_activations_of_the_kernels(tokens: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits and float16, as 7.5 computes: the sums of torch's products, too, have room in what is planned for the
    references. At 832 tokens they are largest beside the rest: as much as they may be, together with a float32 stream.
    A third of the plan is used at least, or it is not about this."""
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: capability)
    for op in ("norm", "quantize", "qk", "linear_int8", "swiglu_int8", "unfused_int8", "attention"):
        module = importlib.import_module(f"zimage_kernels.{op}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoLaunch())
    config = TransformerConfig()
    with torch.device("meta"), torch.inference_mode():
        block = block_in_int8(config, HALF)
        with LiveBytes() as live:
            rope = torch.empty(2, tokens, config.head_dim // 2).unbind()
            block(torch.empty(tokens, config.dim), rope, [tokens], None, INT8["triton"])
    promised = activation_bytes(tokens, config.dim, config.ffn_dim, config.n_heads, 2, 4)
    assert promised / 3 <= live.peak_bytes <= promised
