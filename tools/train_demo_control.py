"""Teach the demo model to follow edges: a small ControlNet of the kind 2.1, for shapes at any place and of any size.

    python tools/train_demo_control.py --out edges.safetensors
    python tools/train_demo_control.py --judge demo --sheet edges.png

The demo itself draws all shapes of one size, in the middle. The hint is `pictures.controls.canny` of the picture. Flow
matching on diffusers' modules, the demo's own weights as they are, with hints of the refiner where the authors add
them; float32, 0.7 seconds a step on one core of a Zen 3. The file is int8, as `quantize` writes it: `--control demo`.

The judge draws held-out captions through zimage-lite and compares, pixel by pixel, what has the asked colour with the
shape that the hint was made of. It prints one JSON object: the share of captions whose overlap over union is at least
that of demo_judge.py's outlines, with the ControlNet and without.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from demo_judge import LEAST_OVERLAP, LEAST_SIDE, thing_mask
from demo_scenes import Scene, caption, draw, ground_pixels, held_out_captions, random_scene, shape_mask
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from zimage_lite import GenerateOptions, load, quantize
from zimage_lite.checkpoint.checkpoint import CONFIG_KEY
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.config import ControlConfig
from zimage_lite.pictures.controls import canny

SIDE = 64
POOL = 4000  # pictures
SHIFT = 3.0
RADII = (0.17, 0.3)
MARGIN = 0.03  # between a shape and the frame
CONFIG = ControlConfig(
    control_layers_places=(0,), control_refiner_layers_places=(0,), dim=384, n_refiner_layers=1, n_heads=3
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--judge", metavar="CONTROL", help="a file, or demo: the one that is shipped")
    parser.add_argument("--count", type=int, default=100, help="captions to judge by (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="hints and pictures, below each other")
    args = parser.parse_args()
    if args.out:
        write(trained(args.steps, args.batch, args.rate), args.out)
    if args.judge:
        print(json.dumps(judged(args.judge, args.count, args.sheet)))


def moved(scene: Scene, rng: np.random.Generator) -> Scene:
    """Its one shape at another place, of another size."""
    (thing,) = scene.things
    r = rng.uniform(*RADII)
    x, y = rng.uniform(r + MARGIN, 1 - r - MARGIN, 2)
    return replace(scene, things=(replace(thing, x=x, y=y, r=r),))


def picture(scene: Scene) -> np.ndarray:
    return np.array(draw(scene, SIDE))


def dataset(count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents of pictures and of their edges, and what the transformer is told of each."""
    from diffusers import AutoencoderKL

    rng = np.random.default_rng(0)
    scenes = [moved(random_scene(rng, "one"), rng) for _ in range(count)]
    vae = AutoencoderKL.from_pretrained(model_folder(DEMO) / "vae", torch_dtype=torch.float32)

    def encoded(pictures: list[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            latents = torch.cat([vae.encode(some).latent_dist.mean for some in pixels.split(64)])
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    pictures = [picture(scene) for scene in scenes]
    told = load(DEMO, device="cpu").encode([caption(scene, rng) for scene in scenes])
    return encoded(pictures), encoded([canny(one) for one in pictures]), [text.clone() for text in told]


def trained(steps: int, batch: int, rate: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    data, edges, told = dataset(POOL)
    answers, net = joined()
    learned = [parameter for name, parameter in net.named_parameters() if name.startswith("control_")]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        some = torch.randint(POOL, (batch,))
        loss = loss_of(answers, data[some], edges[some], [told[i] for i in some.tolist()])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    return {name: value for name, value in net.state_dict().items() if name.startswith("control_")}


def joined() -> tuple[Callable[..., Tensor], Any]:
    """answers(latents, times, told, contexts), of the demo's transformer and a ControlNet that begins as its blocks;
    and that ControlNet."""
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_pretrained(model_folder(DEMO) / "transformer", torch_dtype=torch.float32)
    model.requires_grad_(False)
    kind = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(CONFIG).items()}
    net = ZImageControlNetModel.from_transformer(ZImageControlNetModel(n_kv_heads=CONFIG.n_heads, **kind), model)
    net.gradient_checkpointing = False  # which diffusers 0.42.1 reads and never sets
    net.noise_refiner, hints = copy.deepcopy(model.noise_refiner), list[Tensor]()
    for block, source in (
        (net.control_noise_refiner[0], model.noise_refiner[0]),
        (net.control_layers[0], model.layers[0]),
    ):
        block.load_state_dict(source.state_dict(), strict=False)
        torch.nn.init.eye_(block.before_proj.weight)  # hints begin at zero by after_proj
    net.control_noise_refiner[0].after_proj.register_forward_hook(lambda module, given, hint: hints.append(hint))
    model.noise_refiner[0].register_forward_hook(lambda module, given, x: x + hints.pop())

    def answers(latents: Tensor, times: Tensor, told: list[Tensor], contexts: Tensor) -> Tensor:
        given = list(latents[:, :, None]), times, told
        beside = net(*given, list(contexts[:, :, None]), 1.0)
        return torch.stack(list(model(*given, controlnet_block_samples=beside, return_dict=False)[0]))[:, :, 0]

    return answers, net


def loss_of(answers: Callable[..., Tensor], data: Tensor, edges: Tensor, told: list[Tensor]) -> Tensor:
    """Of flow matching: the model, asked at the time 1 - sigma, answers data - noise."""
    even = torch.rand(len(data))
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise, mix = torch.randn_like(data), sigma[:, None, None, None]
    nothing = torch.zeros(len(data), CONFIG.control_in_dim - edges.shape[1], *edges.shape[2:])
    found = answers((1 - mix) * data + mix * noise, 1 - sigma, told, torch.cat([edges, nothing], 1))
    return (found - (data - noise)).square().mean()


def write(weights: dict[str, Tensor], out: Path) -> None:
    with TemporaryDirectory() as work:
        plain = Path(work) / "control.safetensors"
        said = {CONFIG_KEY: json.dumps(asdict(CONFIG))}
        save_file({name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}, plain, said)
        quantize(plain, out, "int8", overwrite=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def judged(net: str, count: int, sheet: Path | None) -> dict[str, float]:
    rng, pipeline = np.random.default_rng(1), load(DEMO, device="cpu")
    pairs = [(text, moved(scene, rng)) for text, scene in held_out_captions("one", count)]
    hints = [canny(picture(scene)) for _, scene in pairs]
    plain = [GenerateOptions(text, seed=1000 + i) for i, (text, _) in enumerate(pairs)]
    asked = [
        replace(one, controls=f"{net}:1", control_image=hint) for one, hint in zip(plain, hints, strict=True)
    ]  # fmt: skip
    found = {"count": float(count)}
    for name, requests in (("followed", asked), ("without", plain)):
        drawn = [image.numpy() for image in pipeline.generate(requests)]
        overlaps = [overlap(image, scene) for image, (_, scene) in zip(drawn, pairs, strict=True)]
        found[name] = round(100 * float(np.mean([one >= LEAST_OVERLAP for one in overlaps])), 1)
        found[f"{name}_mean_overlap"] = round(float(np.mean(overlaps)), 3)
        if sheet and name == "followed":
            rows = [np.concatenate(some[:20], 1) for some in (hints, drawn)]
            Image.fromarray(np.concatenate(rows)).save(sheet)
    return found


def overlap(drawn: np.ndarray, scene: Scene) -> float:
    """Of what has the shape's colour with where the shape should be: over their union."""
    side = LEAST_SIDE
    pixels = np.asarray(Image.fromarray(drawn).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    (thing,) = scene.things
    mask = thing_mask(pixels, ground_pixels(scene, side).astype(np.float32), scene, thing.colour)
    wanted = np.asarray(shape_mask(thing, side)) > 0
    return float((mask & wanted).sum() / (mask | wanted).sum())


if __name__ == "__main__":
    main()
