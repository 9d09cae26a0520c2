"""The transformer with the Triton kernels (in the interpreter where there is no GPU) against the references, and both
against unpacked weights in float32.

A result may be at most twice as far from float32 as that of the references, which round and quantize at the same
points. What lies between the two is small against that distance, so that it cannot come from another path: codes that
fall on the other side of a half, few in float32 and more in float16, where rounding moves what is quantized by up to
1/16 of a step.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes, NoLaunch
from oracles import PROMPT, psnr, relative_error, transformer_inputs
from packing import packed_as
from PIL import Image
from torch import Tensor, nn
from zimage_kernels import Backend, hadamard_rotate, quantize_rows_reference
from zimage_kernels._triton import interpreted

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.cli import run
from zimage_lite.config import RuntimeOptions, TransformerConfig
from zimage_lite.convert.synthetic import open_synthetic
from zimage_lite.doctor.selftest.checks import CHECKS
from zimage_lite.doctor.selftest.process import Verdict
from zimage_lite.errors import UserError
from zimage_lite.memory.gpus import find_gpu
from zimage_lite.memory.machine import Machine, machine
from zimage_lite.memory.plan import activation_bytes
from zimage_lite.model.compute import Compute
from zimage_lite.model.linear import Linear, RMSNorm, bind, shapes
from zimage_lite.model.rope import grid_positions, rope_angles
from zimage_lite.model.transformer import Block, Transformer, is_time_weight
from zimage_lite.pipeline.backends import choose
from zimage_lite.pipeline.reencoding import Scratch, reencoded
from zimage_lite.pipeline.weights import Component
from zimage_lite.plan.footprint import is_reencoded, reencoded_bytes
from zimage_lite.plan.job import Job
from zimage_lite.plan.model_sizes import true_model
from zimage_lite.plan.prediction import phases
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import GPU_PIECE_WEIGHTS, QTensor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="kernels on CPU tensors: needs TRITON_INTERPRET=1")

CONFIG = TransformerConfig(dim=256, n_heads=2, n_layers=1, n_refiner_layers=1, cap_feat_dim=128)
LENGTHS = [33, 31]  # several sequences, neither a multiple of a tile
HALF, FULL = torch.float16, torch.float32
INT8 = {backend: Compute(backend, int8=True) for backend in ("reference", "triton")}
PLAIN = {backend: Compute(backend) for backend in ("reference", "triton")}


def packed(weight: Tensor, name: str) -> QTensor:
    """In that format, or plain where its rows do not fit: w2 has 682 columns here."""
    return packed_as(name if weight.ndim == 2 and (name == "f32" or weight.shape[1] % 16 == 0) else "f32", weight)


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
    """The interpreter as a GPU of compute capability 7.5, on which no kernel with products may be launched."""
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: 75)
    for op in ("linear_int8", "swiglu_int8", "attention"):
        monkeypatch.setattr(importlib.import_module(f"zimage_kernels.{op}"), f"_{op}_kernel", None)


@pytest.mark.parametrize("dtype", [FULL, HALF])
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


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["int4", "q8_0", "q4_k", "nf4", "qint4", "bnb-int8"])
def test_reencoded_weights(name: str, backend: Backend) -> None:
    """As far from the unpacked weight as 8 bits make it, and int4 not at all: it stands for rotated integers."""
    weight = packed(torch.randn(16, 256), name)
    assert is_reencoded(weight.format)
    place = torch.empty(reencoded_bytes(weight.format, 16, 256), dtype=torch.uint8)
    int8, wide = reencoded(weight, place, backend), weight.dequantize()
    assert (int8.format.name, int8.options, int8.shape) == ("int8", {"group": 256}, (16, 256))
    if name == "int4":
        torch.testing.assert_close(int8.dequantize(), wide, rtol=1e-5, atol=1e-5)
        return
    expected = quantize_rows_reference(wide, 256)
    steps = (int8.parts[""].int() - expected.codes.int()).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= 1  # of 4096; see tests/ops/activations.py
    torch.testing.assert_close(int8.parts["_scale"].squeeze(1), expected.scale, rtol=2**-15, atol=0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Linear(256, 8), Linear(256, 8)


def test_blocks_are_int8_while_they_compute_and_packed_again_afterwards() -> None:
    """The second pass over the same blocks, which stay bound, finds what the first one found."""
    weights = [{own: packed(torch.randn(8, 256), "q8_0") for own in ("a.weight", "b.weight")} for _ in range(2)]
    blocks = [Pair(), Pair()]
    for block, own in zip(blocks, weights, strict=True):
        bind(block, own, FULL)
    scratch = Scratch({str(n): own for n, own in enumerate(weights)}, torch.device("cpu"))
    assert scratch.buffer.nbytes == 2 * (8 * 256 + 64)
    for _ in range(2):
        for block, own in zip(scratch.through(iter)(blocks), weights, strict=True):
            for linear, weight in ((block.a, own["a.weight"]), (block.b, own["b.weight"])):
                assert linear.group == 256
                codes, scale = linear.int8_rows
                assert codes.data_ptr() - scratch.buffer.data_ptr() in (0, 8 * 256 + 64)
                wide = hadamard_rotate(codes * scale[:, None], 256)
                assert relative_error(wide, weight.dequantize()) <= 0.01
        assert all(block.a.packed is own["a.weight"] for block, own in zip(blocks, weights, strict=True))
    scratch.end()
    assert not scratch.buffer.nbytes


def test_an_abandoned_pass_does_not_bring_released_weights_back() -> None:
    block = Pair()
    bind(block, {own: packed(torch.randn(8, 256), "q8_0") for own in ("a.weight", "b.weight")}, FULL)
    scratch = Scratch({"0": {"a": block.a.packed, "b": block.b.packed}}, torch.device("cpu"))
    running = iter(scratch.through(iter)([block]))
    next(running)
    block.a.packed = None
    running.close()  # type: ignore[attr-defined]
    assert block.a.packed is None and block.b.packed.format.name == "q8_0"


@pytest.mark.parametrize("to", ["int8", "f32"])
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


@pytest.mark.parametrize("to", ["q4_k_m", "nf4", "int4"])
def test_the_pipeline_reencodes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """From the file to the picture, on the CPU, in two passes over blocks that stay."""
    given = []

    def counted(weight: QTensor, *args: Any) -> QTensor:
        int8 = reencoded(weight, *args)
        given.append(int8.format.name)
        return int8

    quantize(tiny, tmp_path / to, to)
    request = GenerateOptions(PROMPT, 64, 64, steps=2, seed=3)
    plain, ours = (load(tmp_path / to, device="cpu", compute=bits) for bits in ("16bit", "int8"))
    monkeypatch.setattr("zimage_lite.pipeline.reencoding.reencoded", counted)
    pictures = [pipeline.generate([request])[0] for pipeline in (plain, ours)]
    # Passes, layers, and of their 7 linears not w2, whose rows are 682 long.
    assert given.count("int8") == 2 * 3 * 6 and ours.computes_with()["compute"] == "int8"
    assert 40 <= psnr(*pictures, 255) < float("inf")


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


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(
    obstacle: str | None,
    device: torch.device,
    *formats: str,
    head_dim: int = 128,
    state: str = "ok",
    op: str = "attention_int8",
    units: bool = False,
    faster: bool = False,
    **options: str,
) -> Any:
    """state: what the self-test says of this op. units: whether the CPU has some for 8 bits; faster: whether int8 is
    faster there, without."""
    tested = dict.fromkeys(CHECKS, Verdict("ok")) | {op: Verdict(state, "3.0 of 1.0")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zimage_lite.pipeline.backends.triton_obstacle", lambda device: obstacle)
        patch.setattr("zimage_lite.doctor.selftest.verdicts.verdicts", lambda device, tell: tested)
        patch.setattr("zimage_lite.pipeline.backends.cpu_int8_is_faster", lambda: faster or units)
        patch.setattr("zimage_lite.pipeline.backends.cpu_has_int8_units", lambda: units)
        return choose(RuntimeOptions(**options), device, head_dim, [FORMATS[name] for name in formats])


@pytest.mark.parametrize(
    ("device", "formats", "options", "compute"),
    [
        (CUDA, ("int8", "bf16"), {}, INT8["triton"]),
        (CUDA, ("q4_k", "q6_k"), {}, INT8["triton"]),
        (CUDA, ("bf16",), {}, PLAIN["triton"]),
        (CUDA, ("fp8",), {}, PLAIN["triton"]),
        (CUDA, ("int8",), {"compute": "16bit"}, PLAIN["triton"]),
        (CUDA, ("int8",), {"backend": "reference"}, PLAIN["reference"]),
        (CPU, ("int8",), {}, PLAIN["reference"]),
        (CPU, ("int8",), {"units": True}, INT8["reference"]),
        (CPU, ("int8",), {"units": True, "compute": "16bit"}, PLAIN["reference"]),
        (CPU, ("q8_0",), {}, PLAIN["reference"]),
        (CPU, ("int8",), {"faster": True}, INT8["reference"]),
        (CPU, ("q8_0",), {"units": True}, INT8["reference"]),
        (CPU, ("q8_0",), {"faster": True}, PLAIN["reference"]),
        (CPU, ("q8_0", "int8"), {"faster": True}, INT8["reference"]),
        (CPU, ("bf16", "fp8"), {"units": True}, PLAIN["reference"]),
        (CPU, ("q8_0",), {"compute": "int8"}, INT8["reference"]),
        (CPU, ("int8",), {"compute": "int8"}, INT8["reference"]),
        (CPU, ("q8_0",), {"backend": "triton"}, INT8["triton"]),
    ],
)
def test_choices(device: torch.device, formats: tuple[str, ...], options: dict[str, Any], compute: Compute) -> None:
    choice = chosen(None, device, *formats, **options)
    assert choice.compute == compute and choice.note is None


def test_falling_back_is_told() -> None:
    choice = chosen("Triton is not installed", CUDA, "int8")
    assert choice.compute == PLAIN["reference"]
    assert choice.note == "the Triton kernels cannot run: Triton is not installed; torch computes"
    assert chosen("got tensors on cpu, expected cuda", CPU, "int8").note is None


def test_compute_capability_7_5(turing: None) -> None:
    """What cannot run there is not missed; what failed there is."""
    for options, compute in (({}, INT8), ({"backend": "triton"}, INT8), ({"compute": "16bit"}, PLAIN)):
        choice = chosen(None, CUDA, "q4_k", state="not supported", **options)
        assert (choice.compute, choice.backend) == (compute["triton"], "triton+torch")
        assert choice.note is not None and "torch multiplies" in choice.note
    failed = chosen(None, CUDA, "q4_k", state="wrong", op="add_norm")
    assert (failed.compute, failed.backend, failed.unpacking) == (PLAIN["reference"], "reference", "reference")


def test_older_than_7_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_kernels._triton.capability", lambda device: 61)
    choice = choose(RuntimeOptions(), CUDA, 128, [FORMATS["int8"]])
    assert choice.compute == PLAIN["reference"]
    assert choice.note is not None and "got compute capability 6.1, expected at least 7.5" in choice.note


def test_a_kernel_that_failed_its_self_test_is_not_taken() -> None:
    """Unless it is asked for. Others are, where it is not needed."""
    choice = chosen(None, CUDA, "int8", state="wrong", op="add_norm")
    assert choice.compute == PLAIN["reference"]
    assert choice.note is not None and "add_norm: wrong (3.0 of 1.0)" in choice.note
    assert chosen(None, CUDA, "int8", state="wrong", backend="triton").compute == INT8["triton"]


@pytest.mark.parametrize(
    ("op", "formats", "compute"),
    [
        ("attention_int8", ("int8",), PLAIN["triton"]),
        ("swiglu_int8", ("q4_k", "q6_k"), PLAIN["triton"]),
        ("flash_attention", ("int8",), INT8["triton"]),
        ("flash_attention", ("int8", "bf16"), PLAIN["reference"]),
        ("requantize", ("int8",), INT8["triton"]),
        ("requantize", ("int4",), PLAIN["triton"]),
        ("dequantize", ("int4",), INT8["triton"]),
        ("dequantize", ("int4", "bf16"), PLAIN["reference"]),
        ("dequantize", ("bf16",), PLAIN["triton"]),
        ("linear_int8", ("bf16",), PLAIN["triton"]),
    ],
)
@pytest.mark.parametrize("state", ["wrong", "crashed", "not tested"])
def test_only_what_is_needed_is_missed(op: str, formats: tuple[str, ...], compute: Compute, state: str) -> None:
    choice = chosen(None, CUDA, *formats, op=op, state=state)
    assert choice.compute == compute
    as_before = chosen(None, CUDA, *formats).compute
    assert (choice.note is None) == (choice.compute == as_before)
    assert choice.unpacking == ("auto" if op != "dequantize" and compute.backend == "triton" else "reference")


@pytest.mark.parametrize(
    ("obstacle", "device", "formats", "options", "says"),
    [
        (
            "Triton is not installed",
            CUDA,
            ("int8",),
            {"backend": "triton"},
            "--backend triton: Triton is not installed",
        ),
        (None, CUDA, ("int8",), {"backend": "triton", "head_dim": 64}, "--backend triton: got heads of 64"),
        ("absent", CUDA, ("int8",), {"compute": "int8"}, "--compute int8 needs the Triton kernels on cuda"),
        (
            None,
            CUDA,
            ("bf16",),
            {"compute": "int8"},
            "--compute int8: got bf16, expected weights quantized to integers",
        ),
        (
            "absent",
            CPU,
            ("fp8",),
            {"compute": "int8"},
            "--compute int8: got fp8, expected weights quantized to integers",
        ),
    ],
)
def test_what_cannot_be(obstacle: str | None, device: torch.device, formats: Any, options: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        chosen(obstacle, device, *formats, **options)


@pytest.mark.parametrize("name", ["q4_k_m", "int4", "nf4", "int8", "fp8"])
def test_the_scratch_is_what_is_planned(name: str) -> None:
    """At full size. A GGUF has float32 norms, of which one is made bfloat16 at a time while the scratch is there."""
    files = open_synthetic(f"synthetic:{name}")
    blocks = ("context_refiner", "noise_refiner", "layers")
    component = Component(Transformer(files.transformer.config), files.transformer, blocks, reencoded="triton")
    taken = Scratch(component.weights, torch.device("meta")).buffer.nbytes
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), machine(find_gpu("RTX 3060 Laptop"), 16 * 10**9))
    planned = dict(denoise.fixed)["unpacking"]
    assert (taken > 1.7e8) == (name not in ("int8", "fp8"))  # 4 x 3840^2 + 3 x 3840 x 10240 weights
    if taken:
        assert taken + 2 * 3840 * (name == "q4_k_m") == planned
        assert planned > 10 * (GPU_PIECE_WEIGHTS - 10240)  # what unpacking in pieces takes
    here = Machine("a CPU", 16 * 10**9, cpu_int8=True)
    (_, (denoise,), _) = phases(true_model(name), Job(1024, 1024), here)
    assert taken == dict(denoise.fixed)["re-encoded block"]


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
