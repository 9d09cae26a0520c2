"""Our transformer, text encoder and VAE as ComfyUI's MODEL, CLIP and VAE, on the demo, against the node that draws it
all. Skipped where COMFYUI names no ComfyUI (see helpers/comfy_server.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
import torch
from comfy_server import Comfy, FailedError, Prompt
from oracles import psnr

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE = "a red circle on a blue background", "a square"
LORA = "hourglass.safetensors"


def graph(comfy: Comfy, model: dict[str, Any] | None = None, **sampling: Any) -> Prompt:
    """model: a node between the loader, "model", and the sampler."""
    settings = {"steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 3, "denoise": 1.0}
    between = {"between": model} if model else {}
    return {
        "model": comfy.node("ZImageLiteLoadModel", source="demo"),
        **between,
        "clip": comfy.node("ZImageLiteLoadEncoder", source="demo"),
        "vae": comfy.node("ZImageLiteLoadVAE", source="demo"),
        "positive": comfy.node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "negative": comfy.node("CLIPTextEncode", clip=["clip", 0], text=NEGATIVE),
        "noise": comfy.node("EmptySD3LatentImage", width=64, height=64),
        "sample": comfy.node(
            "KSampler", model=["between" if model else "model", 0], positive=["positive", 0],
            negative=["negative", 0], latent_image=["noise", 0], **{**settings, **sampling},
        ),
        "decode": comfy.node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "image": comfy.node("SaveImage", images=["decode", 0]),
    }  # fmt: skip


def sampled(comfy: Comfy, model: dict[str, Any] | None = None, **sampling: Any) -> np.ndarray:
    return comfy.pictures(comfy.run(graph(comfy, model, **sampling))["image"])[0]


def generated(comfy: Comfy, more: Prompt | None = None, **inputs: Any) -> np.ndarray:
    node = comfy.node("ZImageLiteGenerate", **{"model": "demo", "prompt": PROMPT, "seed": 3, **inputs})
    return comfy.pictures(
        comfy.run({"draw": node, "image": comfy.node("SaveImage", images=["draw", 0]), **(more or {})})["image"]
    )[0]


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """In decibels."""
    return psnr(torch.from_numpy(a), torch.from_numpy(b), 255)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_ksampler_draws_what_generate_draws(comfy: Comfy, cfg: float) -> None:
    """At cfg 1 to the last bit of a pixel; guided, float32 adds up in another order."""
    assert agreement(sampled(comfy, cfg=cfg), generated(comfy, cfg=cfg, negative=NEGATIVE)) >= 50


def test_loras_of_comfyuis_loader_are_ours(comfy: Comfy) -> None:
    loader = comfy.node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.7)
    own = {"lora": comfy.node("ZImageLiteAddLora", lora=LORA, strength=0.7)}
    with_lora, wanted = sampled(comfy, loader), generated(comfy, own, loras=["lora", 0])
    assert agreement(with_lora, wanted) >= 50 > agreement(with_lora, sampled(comfy))


@pytest.mark.parametrize(
    ("kind", "inputs", "said"),
    [
        ("TestPatchedBlocks", {}, r"cannot apply: patches \(double_block\)"),
        ("ModelMergeSimple", {"model1": ["model", 0], "model2": ["model", 0]}, "merging of models"),
    ],
)
def test_what_cannot_be_applied_is_named(comfy: Comfy, kind: str, inputs: dict[str, Any], said: str) -> None:
    node = comfy.node(kind, **(inputs or {"model": ["model", 0]}))
    with pytest.raises(FailedError, match=said):
        sampled(comfy, node)


def test_tiles_are_not_needed(comfy: Comfy) -> None:
    prompt = graph(comfy)
    prompt["decode"] = comfy.node("VAEDecodeTiled", samples=["sample", 0], vae=["vae", 0])
    assert np.array_equal(comfy.pictures(comfy.run(prompt)["image"])[0], sampled(comfy))


def test_what_was_encoded_is_decoded(comfy: Comfy) -> None:
    """By KSampler with little noise, from the picture that it drew."""
    prompt = graph(comfy)
    prompt["again"] = comfy.node("VAEEncode", pixels=["decode", 0], vae=["vae", 0])
    prompt["twice"] = comfy.node("VAEDecode", samples=["again", 0], vae=["vae", 0])
    prompt["second"] = comfy.node("SaveImage", images=["twice", 0])
    shown = comfy.run(prompt)
    first, second = (comfy.pictures(shown[name])[0] for name in ("image", "second"))
    assert agreement(first, second) >= 30


def test_it_stops_and_samples_again_without_growth(comfy: Comfy) -> None:
    process = psutil.Process(comfy.pid)
    ordered = comfy.order(graph(comfy, steps=1000, seed=99))
    while not any(item[1] == ordered for item in comfy.get("queue")["queue_running"]):
        pass  # until it is its turn
    comfy.post("interrupt", {"prompt_id": ordered})
    with pytest.raises(FailedError, match="interrupted"):
        comfy.wait(ordered)
    for seed in range(100, 104):
        sampled(comfy, seed=seed)
    before = process.memory_info().rss
    for seed in range(110, 120):
        sampled(comfy, seed=seed)
    assert process.memory_info().rss - before < 10e6
