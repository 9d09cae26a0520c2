"""float16 is finite where its range is too small for the same module in plain float16, and as exact as it can be.

Each case blows up one of the values that model/float16.py takes care of, and the truth is diffusers' or transformers'
own float32.

A rounding to float16 changes a number by 2^-11 of it at most. On its way through ten sublayers (four of a refiner's
blocks, six of the layers) a value is rounded ten times in each: as input, q, k or v, mixture, product, output, and so
on. The squares of independent errors add up, so a hundred of them make ten. bfloat16 makes eight times as many.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from marking import always
from oracles import PROMPT, bound, psnr, relative_error, run_transformer, transformer_inputs

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.memory.hardware import probe
from zimage_lite.model.float16 import FEED_FORWARD_SCALE, swiglu
from zimage_lite.model.linear import bind, shapes
from zimage_lite.model.text_encoder import TextEncoder
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.quant.formats import FORMATS
from zimage_lite.quant.tensor import QTensor

pytestmark = pytest.mark.slow  # whole models with enlarged weights

TOLERANCE = 10 * 2**-11

# What is multiplied, by what. Products of 300 x 300 reach 10^6: below 65504 / FEED_FORWARD_SCALE, so that they fit.
TRANSFORMER_CASES = {
    "attention output": ({"attention.to_v": 1e3, "attention.to_out": 300}, False),
    "SwiGLU product": ({"feed_forward.w1": 300, "feed_forward.w3": 300}, False),
    "residual stream": ({"context_refiner.1.ffn_norm2": 2e4, "layers.1.ffn_norm2": 4e4}, False),
    "caption features": ({"features": 1e5}, False),
    "ordinary": ({}, True),
}
ENCODER_CASES = {
    "attention output": ({"o_proj": 1e5}, False),
    "SwiGLU product": ({"gate_proj": 300, "up_proj": 300}, False),
    "ordinary": ({}, True),
}


def amplified(model: Any, factors: dict[str, float]) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in factors.items():
                if part in name:
                    parameter.mul_(factor)
    return model


def inputs_of(factors: dict[str, float]) -> tuple:
    latents, features, t = transformer_inputs(26, 42, (40,))
    return latents, [feature * factors.get("features", 1) for feature in features], t


def plain_transformer(model: Any, inputs: tuple, dtype: torch.dtype) -> torch.Tensor:
    (latent,), (feature,), t = inputs
    with torch.inference_mode():
        return model.to(dtype)([latent.unsqueeze(1).to(dtype)], t, [feature.to(dtype)])[0][0].squeeze(1)


@pytest.mark.parametrize("name", TRANSFORMER_CASES)
def test_transformer(diffusers_pipeline, name: str, tmp_path: Path) -> None:
    factors, plain_is_finite = TRANSFORMER_CASES[name]
    theirs = amplified(diffusers_pipeline.transformer, factors)
    theirs.save_pretrained(tmp_path / "transformer")
    inputs = inputs_of(factors)
    truth = plain_transformer(theirs, inputs, torch.float32)
    plain = plain_transformer(theirs, inputs, torch.float16)
    assert torch.isfinite(plain).all() == plain_is_finite
    config = open_checkpoint(tmp_path / "transformer").config
    (ours,) = run_transformer(tmp_path, config, inputs, torch.float16)
    assert ours.dtype == torch.float16
    assert relative_error(ours, truth) <= TOLERANCE


@pytest.mark.parametrize("name", always("residual stream", "ordinary", of=TRANSFORMER_CASES))
def test_int8_transformer(diffusers_pipeline, name: str, tmp_path: Path) -> None:
    """The truth is ours in float32: what int8 itself changes is tested elsewhere."""
    amplified(diffusers_pipeline.transformer, TRANSFORMER_CASES[name][0]).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    latents, features, t = inputs_of(TRANSFORMER_CASES[name][0])
    results = {}
    for dtype in (torch.float32, torch.float16):
        model = Transformer(checkpoint.config)
        stored = checkpoint.restricted_to(shapes(model)).tensors
        bind(model, {name: packed(tensor.read()) for name, tensor in stored.items()}, dtype)
        with torch.inference_mode():
            captions = model.refine_captions(features)
            (modulation,) = model.modulations(t, dtype)
            (results[dtype],) = model([latent.to(dtype) for latent in latents], captions, modulation)
    assert relative_error(results[torch.float16], results[torch.float32]) <= TOLERANCE


def packed(weight: QTensor) -> QTensor:
    if len(weight.shape) < 2 or 1 in weight.shape:
        return weight
    codec = FORMATS["int8"].codec
    options = codec.options(weight.shape[1])
    return QTensor(FORMATS["int8"], weight.shape, codec.quantize(weight.dequantize(), options), options)


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_text_encoder(diffusers_pipeline, name: str, tmp_path: Path) -> None:
    factors, plain_is_finite = ENCODER_CASES[name]
    theirs = amplified(diffusers_pipeline.text_encoder, factors)
    theirs.save_pretrained(tmp_path)
    embeddings = torch.randn(24, 128) / 10

    def plain(dtype: torch.dtype) -> torch.Tensor:
        """The hidden state that Z-Image takes: before the last layer."""
        with torch.inference_mode():
            out = theirs.to(dtype)(inputs_embeds=embeddings.to(dtype)[None], output_hidden_states=True)
        return out.hidden_states[-2][0]

    truth, half = plain(torch.float32), plain(torch.float16)
    assert torch.isfinite(half).all() == plain_is_finite
    model = bound(TextEncoder(open_checkpoint(tmp_path).config), tmp_path, torch.float16)
    with torch.inference_mode():
        (ours,) = model(embeddings.half(), [24])
    assert ours.dtype == torch.float32
    assert relative_error(ours, truth) <= TOLERANCE


def test_swiglu_in_pieces() -> None:
    """More values than are widened at a time; rounded once, for the product is formed in float32."""
    gate, up = (torch.randn(3, 2**19).half() * 100 for _ in range(2))
    truth = torch.nn.functional.silu(gate.double()) * up.double() * FEED_FORWARD_SCALE
    ours = swiglu(gate, up)
    assert torch.allclose(ours.double(), truth, rtol=2**-11 + 1e-6, atol=2**-25)  # the latter below 2^-14


def test_whole_pipeline(diffusers_folder: Path) -> None:
    model, request = open_model(diffusers_folder), GenerateOptions(PROMPT, 128, 96, steps=4, seed=3)
    image, truth = (Pipeline(model, RuntimeOptions("cpu", dtype)).generate([request])[0] for dtype in ("fp16", "fp32"))
    assert truth.float().std() > 1
    # An error of 1 % in 128 levels of grey, more than four steps and the decoder make of TOLERANCE, is 46 dB.
    assert psnr(image, truth, 255) >= 46


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_what_a_gpu_computes_in(monkeypatch: pytest.MonkeyPatch, capability: tuple, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert probe("cuda").dtype == dtype
    assert probe("cuda", "fp32").dtype == torch.float32
