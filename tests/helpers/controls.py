"""ControlNets that diffusers made, and what diffusers computes with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from oracles import randomize
from packing import packed_as
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage_lite.config import ControlConfig
from zimage_lite.model.compute import REFERENCE, Compute
from zimage_lite.model.controlnet import Control, ControlNet, DiffusersControl, unrolled, unrolled_weights
from zimage_lite.model.linear import bind
from zimage_lite.model.transformer import Transformer

# Version -> what its file says in diffusers' config.json.
KINDS: dict[str, dict[str, Any]] = {
    version: {"control_in_dim": channels, "add_control_noise_refiner": refiner, "control_layers_places": places}
    for version, channels, refiner, places in (
        ("1.0", 16, None, [0, 2]),
        ("2.0", 33, "control_layers", [0, 1, 2]),
        ("2.1", 33, "control_noise_refiner", [0, 1]),
        ("2.1 lite", 33, "control_noise_refiner", [0]),
    )
}
SCALE, TIMES = 0.75, torch.tensor([0.3])


def make_control(transformer: Any, version: str) -> Any:
    """diffusers' own, of random float32 weights, for their transformer, from which it has what it shares."""
    from diffusers import ZImageControlNetModel

    kind, torch_state, beside = KINDS[version], torch.random.get_rng_state(), transformer.config
    torch.manual_seed(4)
    refined = None if kind["add_control_noise_refiner"] is None else list(range(beside.n_refiner_layers))
    sizes = {name: beside[name] for name in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")}
    model = ZImageControlNetModel(control_refiner_layers_places=refined, **sizes, **kind)
    randomize(model)  # before_proj and after_proj start at zero
    torch.random.set_rng_state(torch_state)
    return ZImageControlNetModel.from_transformer(model.eval(), transformer)


def their_weights(theirs: Any) -> dict[str, Tensor]:
    """Those that a file of it has: without what it shares with the transformer."""
    return {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("control_")}


def save_control(theirs: Any, folder: Path, zeroed: bool = False) -> Path:
    """As `save_pretrained` writes it, without what it shares with the transformer. zeroed: it gives no hints."""
    folder.mkdir(parents=True)
    config = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": type(theirs).__name__, **config}))
    weights = {
        name: tensor * (not zeroed or ".after_proj." not in name) for name, tensor in their_weights(theirs).items()
    }
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def config_of(version: str) -> ControlConfig:
    kind = {key: tuple(value) if isinstance(value, list) else value for key, value in KINDS[version].items()}
    return ControlConfig(dim=256, n_heads=2, **kind)


def ours(
    version: str, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32, form: str = "f32",
    compute: Compute = REFERENCE,
) -> ControlNet:  # fmt: skip
    """As it is drawn with. form: what matrices are packed in, where their rows fit."""
    config = config_of(version)
    net, weights = ControlNet(unrolled(config), compute), unrolled_weights(config, weights)
    bind(net, {name: packed_as(form if weight.ndim == 2 else "f32", weight) for name, weight in weights.items()}, dtype)
    return net


@torch.inference_mode()
def diffusers_answer(
    transformer: Any, theirs: Any, latents: list[Tensor], features: list[Tensor], contexts: list[Tensor]
) -> list[Tensor]:
    """As their pipeline runs the two."""
    five_d, t = [latent[:, None] for latent in latents], TIMES.expand(len(latents))
    hints = theirs(five_d, t, features, [context[:, None] for context in contexts], SCALE)
    return [out[:, 0] for out in transformer(five_d, t, features, controlnet_block_samples=hints, return_dict=False)[0]]


@contextmanager
def as_authors(transformer: Any, theirs: Any) -> Iterator[None]:
    """Hints of the refiner reach diffusers' transformer, too, as in VideoX-Fun."""
    if theirs.add_control_noise_refiner is None:
        yield
        return
    shared, theirs.noise_refiner = theirs.noise_refiner, copy.deepcopy(transformer.noise_refiner)
    refiner, hints = theirs.control_noise_refiner or theirs.control_layers, dict[int, Tensor]()

    def keep(k: int, module: nn.Module, given: Any, hint: Tensor) -> None:
        hints.setdefault(k, hint)  # of 2.0, which comes by twice: the first

    def add(k: int, module: nn.Module, given: Any, x: Tensor) -> Tensor:
        return x + SCALE * hints.pop(k)

    hooks = [refiner[k].after_proj.register_forward_hook(partial(keep, k)) for k in range(2)]
    hooks += [transformer.noise_refiner[k].register_forward_hook(partial(add, k)) for k in range(2)]
    try:
        yield
    finally:
        theirs.noise_refiner = shared
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def our_answer(
    model: Transformer, net: ControlNet | None, latents: list[Tensor], features: list[Tensor], contexts: list[Tensor],
    math: str = "authors", scale: float = SCALE, stream: Callable[[Any], Any] = iter,
) -> list[Tensor]:  # fmt: skip
    captions, (modulation,) = model.refine_captions(features), model.modulations(TIMES, latents[0].dtype)
    if net is None:
        return model(latents, captions, modulation)
    (own,) = net.modulations(model.condition(TIMES), latents[0].dtype)
    given: dict[str, Any] = {"net": net, "contexts": contexts, "captions": captions, "modulation": own}
    given |= {"pad_token": model.x_pad_token, "scale": scale}
    control = Control(**given) if math == "authors" else DiffusersControl(**given, refiner=modulation.noise_refiner)
    return model(latents, captions, modulation, stream, beside=control)
