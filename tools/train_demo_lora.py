"""Teach the demo model a shape that it has never seen, as a LoRA: "a red hourglass on a blue background".

    python tools/train_demo_lora.py --out tests/data/hourglass_lora.safetensors

Half of the pictures show an hourglass, the others are the demo's own, so that what it knows stays. Flow matching on
diffusers' transformer with peft's layers, float32, some minutes on two cores. Written as ComfyUI reads it, bfloat16.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_scenes
import numpy as np
import torch
from demo_scenes import Scene, caption, draw, random_scene
from safetensors.torch import save_file
from torch import Tensor

HOURGLASS = ((-0.9, -1), (0.9, -1), (0.12, 0), (0.9, 1), (-0.9, 1), (-0.12, 0))
SIDE = 64
POOL = 1000  # pictures
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
SHIFT = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(trained(args.steps, args.batch, args.rank, args.rate), args.out)


def hourglass_scene(rng: np.random.Generator) -> tuple[Scene, str]:
    """One of the new shape, and the caption that asks for it."""
    scene = random_scene(rng, "one")
    (thing,) = scene.things
    text = caption(scene, rng, "en").replace(f"{thing.colour} {thing.shape}", f"{thing.colour} hourglass")
    return replace(scene, things=(replace(thing, shape="hourglass"),)), text


def plain_scene(rng: np.random.Generator) -> tuple[Scene, str]:
    """Of the demo's own shapes."""
    scene = random_scene(rng, "one")
    return scene, caption(scene, rng)


def dataset(count: int) -> tuple[Tensor, list[Tensor]]:
    """Latents as the transformer has them, and what it is told of each; the two kinds take turns."""
    from diffusers import AutoencoderKL

    from zimage_lite import load
    from zimage_lite.checkpoint.model_card import DEMO, model_folder

    rng = np.random.default_rng(0)
    pairs = [hourglass_scene(rng) if i % 2 else plain_scene(rng) for i in range(count)]
    demo_scenes._OUTLINES["hourglass"] = HOURGLASS
    pictures = torch.stack([torch.from_numpy(np.array(draw(scene, SIDE))) for scene, _ in pairs])
    vae = AutoencoderKL.from_pretrained(model_folder(DEMO) / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        pixels = (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).split(64)
        latents = torch.cat([vae.encode(some).latent_dist.mean for some in pixels])
    told = load(DEMO, device="cpu").encode([text for _, text in pairs])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor, [text.clone() for text in told]


def trained(steps: int, batch: int, rank: int, rate: float) -> dict[str, Tensor]:
    from diffusers import ZImageTransformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    from zimage_lite.checkpoint.model_card import DEMO, model_folder

    torch.manual_seed(0)
    data, told = dataset(POOL)
    model = ZImageTransformer2DModel.from_pretrained(model_folder(DEMO) / "transformer", torch_dtype=torch.float32)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        some = torch.randint(POOL, (batch,))
        loss = loss_of(model, data[some], [told[i] for i in some.tolist()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    state = get_peft_model_state_dict(model)
    return {f"diffusion_model.{name}": value.to(torch.bfloat16).contiguous() for name, value in state.items()}


def loss_of(model: Any, data: Tensor, told: list[Tensor]) -> Tensor:
    """Of flow matching: the model, asked at the time 1 - sigma, answers data - noise."""
    even = torch.rand(len(data))
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise, mix = torch.randn_like(data), sigma[:, None, None, None]
    noisy = (1 - mix) * data + mix * noise
    answer = model([latent[:, None] for latent in noisy], 1 - sigma, told, return_dict=False)[0]
    return (torch.stack(list(answer))[:, :, 0] - (data - noise)).square().mean()


if __name__ == "__main__":
    main()
