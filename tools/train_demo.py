"""Train the demo model from a seed: tokenizer, VAE, then text encoder with S3-DiT; export as a diffusers folder.

The modules are diffusers' and transformers' own, so the result loads in `ZImagePipeline` by construction. Training data
is drawn on the fly by demo_scenes.py; batch k of a stage is a pure function of (seed, k), so a stage that was stopped
goes on from its last checkpoint with the data it would have seen anyway.

Time and sign conventions are Z-Image's: the transformer is given t = 1 - sigma and predicts data - noise, which the
pipeline negates. Sigmas are drawn with shift 3 and half of them are the eight that the sampler visits: each of the
eight is then fitted directly, which replaces distillation for pictures as simple as these.

    python tools/train_demo.py --preset cpu --work WORK all
    python tools/train_demo.py --preset gpu --work WORK --font NotoSansCJKsc-Regular.otf all
"""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from demo_scenes import FIELDS, LEVELS, caption, draw, numbered, random_scene
from demo_tokenizer import write_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from evaluate_demo import write_card, write_json
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from zimage_lite.checkpoint import safetensors
from zimage_lite.checkpoint.diffusers_config import model_index
from zimage_lite.checkpoint.writer import open_writer

SHIFT = 3.0
SAMPLER_STEPS = 8
SUFFIX_TOKENS = 5  # <|im_end|>, newline, <|im_start|>, assistant, newline: the same after every caption
SAVE_SECONDS = 180
COLOUR_STEPS = 3000


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run; the defaults are the `cpu` preset (two cores, under three hours)."""

    device: str = "cpu"
    size: int = 64  # pixels, square
    levels: tuple[tuple[str, float], ...] = (("one", 1.0),)  # level, share of the scenes
    workers: int = 0  # processes that draw
    seed: int = 1
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    vae_steps: int = 2600
    vae_batch: int = 32
    vae_rate: float = 2e-3
    kl_weight: float = 3e-4
    layers: int = 3
    refiner_layers: int = 1
    encoder_layers: int = 3
    encoder_steps: int = 600
    encoder_batch: int = 128
    encoder_rate: float = 1e-3
    steps: int = 9000
    batch: int = 16  # scenes; each is trained with `noises` noise levels at once
    noises: int = 2
    rate: float = 1.5e-3
    average: float = 0.998  # decay of the moving average of the weights, the one that is exported


PRESETS = {
    "cpu": Recipe(),
    "gpu": Recipe(
        device="cuda",
        size=128,
        levels=(("one", 0.2), ("two", 0.3), ("full", 0.5)),
        workers=14,
        vae_steps=6000,
        rate=8e-4,
        steps=12000,
        batch=128,
        average=0.999,
    ),
}


@dataclass(frozen=True)
class Run:
    """A recipe, the folder of its checkpoints and the font file of its written words."""

    recipe: Recipe
    work: Path
    font: str | None = None


class DrawnScenes(Dataset):
    """Item k, from (seed, k) alone: a picture ([3, size, size] uint8; black if not wanted), its caption, its fields."""

    def __init__(self, run: Run, first: int, last: int, pictures: bool = True) -> None:
        self.recipe, self.font, self.first, self.last, self.pictures = run.recipe, run.font, first, last, pictures

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, str, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, self.first + index))
        names, shares = zip(*self.recipe.levels, strict=True)
        scene = random_scene(rng, names[rng.choice(len(names), p=shares)])
        size, fields = self.recipe.size, torch.tensor(numbered(scene))
        picture = np.array(draw(scene, size, self.font)) if self.pictures else np.zeros((size, size, 3), np.uint8)
        return torch.from_numpy(picture).permute(2, 0, 1), caption(scene, rng), fields


def build_vae(recipe: Recipe) -> AutoencoderKL:
    """A small Flux-style VAE: 16 latent channels, 8x reduction, no quant convolutions."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": recipe.vae_channels, "layers_per_block": 1, "norm_num_groups": 4}
    flux = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**blocks, **sizes, **flux, sample_size=recipe.size)


Loss = Callable[[nn.Module, Tensor, list[str], Tensor], Tensor]  # (model, pictures in [-1, 1], captions, fields)


def fit(run: Run, name: str, model: nn.Module, loss_of: Loss, steps: int, batch: int, rate: float) -> nn.Module:
    """Train `model` to minimise `loss_of`; returns the moving average of its weights.

    The state goes to WORK/name.pt every three minutes and at the end; an existing one is continued.
    """
    recipe, path = run.recipe, run.work / f"{name}.pt"
    model.to(recipe.device).train()
    averaged = copy.deepcopy(model).requires_grad_(False)
    parameters, shadows = list(model.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    losses: list[float] = []
    if path.exists():
        saved = torch.load(path, map_location=recipe.device)
        losses = saved["losses"]
        for part, module in parts.items():
            module.load_state_dict(saved[part])
    scenes = DrawnScenes(run, len(losses) * batch, steps * batch, pictures=name != "encoder")
    saved_at = time.monotonic()
    loader = DataLoader(scenes, batch, num_workers=recipe.workers)
    for step, (pixels, captions, fields) in enumerate(loader, len(losses)):
        torch.manual_seed(recipe.seed + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 200, 0.505 + 0.495 * math.cos(math.pi * step / steps))
        pictures = pixels.to(recipe.device).float() / 127.5 - 1
        with torch.autocast(recipe.device, torch.bfloat16):
            loss = loss_of(model, pictures, captions, fields.to(recipe.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(shadows, parameters, 1 - min(recipe.average, (step + 1) / (step + 11)))
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            now, loss_now = time.strftime("%H:%M:%S"), np.mean(losses[-50:])
            print(f"{now} {name} {len(losses)}/{steps} loss {loss_now:.4f}", flush=True)
        if time.monotonic() - saved_at > SAVE_SECONDS or len(losses) == steps:
            state = {part: module.state_dict() for part, module in parts.items()}
            torch.save({**state, "losses": losses}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            saved_at = time.monotonic()
    return averaged.eval()


def train_vae(run: Run) -> AutoencoderKL:
    """Stage `vae`: L1 and squared error plus a small KL term, no adversary."""
    recipe = run.recipe

    def loss_of(vae: nn.Module, pictures: Tensor, captions: list[str], fields: Tensor) -> Tensor:
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - pictures
        spread = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        return error.abs().mean() + error.square().mean() + recipe.kl_weight * 0.5 * spread.mean()

    torch.manual_seed(recipe.seed)
    return fit(run, "vae", build_vae(recipe), loss_of, recipe.vae_steps, recipe.vae_batch, recipe.vae_rate)


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, run: Run) -> None:
    """Put mean and 1 / standard deviation of the latents of 512 scenes into the VAE's config (Flux's formula)."""
    batches = [pixels for pixels, *_ in DataLoader(DrawnScenes(run, 0, 512), 64, num_workers=run.recipe.workers)]
    latents = torch.cat([vae.encode(batch.to(vae.device).float() / 127.5 - 1).latent_dist.mean for batch in batches])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def fit_colours(vae: AutoencoderKL, run: Run) -> list[list[str]]:
    """How a preview's colours follow from the latents, pixel by pixel: 24 units with ReLU, then red, green and blue.
    Layers, each a text of its weights and bias for each output."""
    torch.manual_seed(run.recipe.seed)
    net = nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 3, 1)).to(vae.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=COLOUR_STEPS)
    with torch.no_grad():
        scenes = DataLoader(DrawnScenes(run, 0, 2048), 64, num_workers=run.recipe.workers)
        batches = [pixels.to(vae.device).float() / 127.5 - 1 for pixels, *_ in scenes]
        latents = [vae.encode(pictures).latent_dist.mean for pictures in batches]
    for step in range(COLOUR_STEPS):
        latent, pictures = latents[step % len(latents)], batches[step % len(latents)]
        scaled = (latent - vae.config.shift_factor) * vae.config.scaling_factor
        loss = (net(scaled) - nn.functional.avg_pool2d(pictures, 8)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layers = [torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1) for layer in (net[0], net[2])]
    return [[" ".join(f"{value:.4g}" for value in row) for row in layer.tolist()] for layer in layers]


def encode(text_encoder: Qwen3Model, tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> list[Tensor]:
    """Per caption its states [tokens, 256]: the residual stream before the last layer, padding dropped."""
    messages = [[{"role": "user", "content": caption}] for caption in captions]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    prompts = tokenizer.apply_chat_template(messages, **options)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(text_encoder.device)
    states = text_encoder(**tokens, output_hidden_states=True, use_cache=False).hidden_states[-2]
    return [state[mask] for state, mask in zip(states, tokens["attention_mask"].bool(), strict=True)]


class Reader(nn.Module):
    """A text encoder with a linear read-out of all FIELDS: only there to train the encoder."""

    def __init__(self, text_encoder: Qwen3Model) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.read = nn.Sequential(nn.RMSNorm(256), nn.Linear(256, sum(len(names) + 1 for names in FIELDS)))


def train_encoder(run: Run, model: "Denoiser") -> None:
    """Stage `encoder`: the states of the prompt's last tokens learn to hold every field of the scene, linearly.

    In a run without this stage the denoiser still ignored the shape that was asked for after 1,700 steps.
    """

    def loss_of(reader: nn.Module, pictures: Tensor, captions: list[str], fields: Tensor) -> Tensor:
        states = encode(reader.text_encoder, model.tokenizer, captions)
        scores = reader.read(torch.stack([state[-SUFFIX_TOKENS:] for state in states])).float().flatten(0, 1)
        wanted = fields.repeat_interleave(SUFFIX_TOKENS, 0)
        parts = zip(scores.split([len(names) + 1 for names in FIELDS], 1), wanted.unbind(1), strict=True)
        return sum(nn.functional.cross_entropy(part, numbers) for part, numbers in parts)

    recipe, reader = run.recipe, Reader(copy.deepcopy(model.text_encoder))
    reader = fit(run, "encoder", reader, loss_of, recipe.encoder_steps, recipe.encoder_batch, recipe.encoder_rate)
    model.text_encoder.load_state_dict(reader.text_encoder.state_dict())


class Denoiser(nn.Module):
    """The two parts that are trained together: a Qwen3 text encoder and the S3-DiT that reads its states."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = Qwen3Model(
            Qwen3Config(
                **{"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "head_dim": 128},
                **{"num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True},
                **{"max_position_embeddings": 1024, "initializer_range": 0.04},
                num_hidden_layers=recipe.encoder_layers,  # the last is never used: Z-Image reads hidden_states[-2]
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        self.transformer = ZImageTransformer2DModel(
            **{"dim": 384, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 256, "axes_lens": [1536, 512, 512]},
            n_layers=recipe.layers,
            n_refiner_layers=recipe.refiner_layers,
        )
        for name, parameter in self.transformer.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                nn.init.zeros_(parameter)  # every block starts as the identity
            elif name.endswith("pad_token"):
                nn.init.normal_(parameter, std=0.02)

    def forward(self, noisy: Tensor, sigma: Tensor, states: list[Tensor]) -> Tensor:
        """noisy [batch, 16, h, w], sigma [batch] -> the predicted data - noise, same shape."""
        return torch.stack(self.transformer(list(noisy.unsqueeze(2)), 1 - sigma, states).sample).squeeze(2)


def shifted(sigma: Tensor) -> Tensor:
    """Sigmas moved towards the noisy end, as the scheduler does."""
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def training_sigmas(count: int) -> Tensor:
    """[count] sigmas in random order, shifted: half spread evenly over (0, 1), half exactly the sampler's."""
    even = (torch.arange(count) + torch.rand(count)) / count
    sampled = (torch.arange(count) % SAMPLER_STEPS + 1) / SAMPLER_STEPS
    return shifted(torch.where(torch.rand(count) < 0.5, even, sampled))[torch.randperm(count)]


def train_denoiser(run: Run) -> Denoiser:
    """Stage `denoiser`: flow matching in the latents of the finished VAE, text encoder included."""
    recipe, vae = run.recipe, train_vae(run)
    set_latent_scale(vae, run)

    def loss_of(model: nn.Module, pictures: Tensor, captions: list[str], fields: Tensor) -> Tensor:
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean.float()
        data = ((latents - vae.config.shift_factor) * vae.config.scaling_factor).repeat(recipe.noises, 1, 1, 1)
        states = encode(model.text_encoder, model.tokenizer, captions)
        noise, sigma = torch.randn_like(data), training_sigmas(len(data)).to(data.device)
        mix = sigma[:, None, None, None]
        predicted = model((1 - mix) * data + mix * noise, sigma, states * recipe.noises)
        return (predicted.float() - (data - noise)).square().mean()

    torch.manual_seed(recipe.seed)
    model = Denoiser(recipe, Qwen2Tokenizer.from_pretrained(run.work / "tokenizer"))
    train_encoder(run, model)
    return fit(run, "denoiser", model, loss_of, recipe.steps, recipe.batch, recipe.rate)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """bfloat16 weights to a safetensors file."""
    arrays = [(name, "BF16", tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, offsets = safetensors.encode_header(arrays, {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_writer(path, header, len(header) + sum(tensor.nbytes for tensor in tensors.values())) as writer:
        for offset, tensor in zip(offsets, tensors.values(), strict=True):
            writer.write(offset, tensor)


def export(run: Run, out: Path) -> None:
    """Stage `export`: the averaged weights of the last checkpoints, bfloat16, in the diffusers layout, with a card."""
    vae, model = build_vae(run.recipe), Denoiser(run.recipe, Qwen2Tokenizer.from_pretrained(run.work / "tokenizer"))
    saved = {name: torch.load(run.work / f"{name}.pt", map_location="cpu") for name in ("vae", "denoiser")}
    vae.load_state_dict(saved["vae"]["averaged"])
    model.load_state_dict(saved["denoiser"]["averaged"])
    set_latent_scale(vae.eval(), run)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    for name, part in {"vae": vae, "transformer": model.transformer, "scheduler": scheduler}.items():
        part.save_config(out / name)
    encoder = model.text_encoder.config.to_diff_dict()
    encoder |= {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16", "rope_theta": 1e6}  # for transformers 4
    write_json(out / "text_encoder" / "config.json", encoder)
    write_tokenizer(out / "tokenizer")
    named = {"vae": vae, "transformer": model.transformer, "text_encoder": nn.ModuleDict({"model": model.text_encoder})}
    for name, part in named.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: tensor.to(torch.bfloat16) for key, tensor in part.state_dict().items()}
        write_tensors(out / name / f"{stem}.safetensors", tensors)
    write_json(out / "model_index.json", model_index())
    recipe, losses = run.recipe, {name: state["losses"] for name, state in saved.items()}
    card = {
        "name": "demo",
        **{"default_width": recipe.size, "default_height": recipe.size, "default_steps": SAMPLER_STEPS},
        "license": "Apache-2.0",
        "data": "; ".join(LEVELS[level] for level, _ in recipe.levels) + "; captions in English and Chinese",
        "seed": recipe.seed,
        "settings": asdict(recipe),
        "steps": {name: len(values) for name, values in losses.items()},
        "final_loss": {name: round(float(np.mean(values[-200:])), 5) for name, values in losses.items()},
        "colours": fit_colours(vae, run),
    }
    write_card(out, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizer", "vae", "denoiser", "export", "all"), help="all resume")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="settings (default: %(default)s)")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the exported model (default: WORK/export)")
    parser.add_argument("--font", help="font file for written words, e.g. Noto Sans CJK SC; for the gpu preset")
    parser.add_argument("--steps", type=int, help="denoiser steps, instead of the preset's")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    run = Run(replace(preset, steps=options.steps or preset.steps), options.work, options.font)
    if options.stage in ("tokenizer", "all"):
        write_tokenizer(run.work / "tokenizer")
    if options.stage == "vae":
        train_vae(run)
    if options.stage in ("denoiser", "all"):
        train_denoiser(run)
    if options.stage in ("export", "all"):
        export(run, options.out or run.work / "export")


if __name__ == "__main__":
    main()
