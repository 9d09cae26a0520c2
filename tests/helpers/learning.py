"""A model's transformer with a LoRA in training beside it: ours, and diffusers' with peft's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.diffusers_config import config_json
from zimage_lite.config import TransformerConfig
from zimage_lite.memory.hardware import Hardware
from zimage_lite.model.linear import shapes
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.weights import read_into
from zimage_lite.train.lora import TrainedLora, trained_linears
from zimage_lite.train.passes import Batch

CPU = torch.device("cpu")


def transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """With all weights bound."""
    checkpoint = open_checkpoint(folder / "transformer")
    model = Transformer(checkpoint.config)
    read_into(model, checkpoint.restricted_to(shapes(model)).tensors, Hardware(CPU, dtype))
    return model


def learning_lora(model: Transformer, rank: int = 4) -> TrainedLora:
    """As if it had learned already: with B at zero, A has no gradient."""
    lora, random = TrainedLora(model, rank, 0, CPU), torch.Generator().manual_seed(1)
    for _, b in lora.pairs.values():
        with torch.no_grad():
            b.normal_(0, 0.05, generator=random)
    return lora


def batch_for(model: Transformer, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype) -> tuple[Batch, list[Tensor]]:
    """Pictures of these sizes in latent pixels, at times of their own; and the features of their captions."""
    random, config = torch.Generator().manual_seed(5), model.config
    shapes = [(config.in_channels, *size) for size in sizes]
    latents, noises = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(2))
    features = [torch.randn(9 + 30 * i, config.cap_feat_dim, generator=random) for i in range(len(sizes))]
    sigmas = [0.3 + 0.4 * i for i in range(len(sizes))]
    with torch.no_grad():
        captions = model.refine_captions(features)
        times = model.modulations(1 - torch.tensor(sigmas), dtype)
    return Batch(latents, noises, sigmas, captions, times), features


class Peft:
    """diffusers' transformer in that dtype, its weights those of the folder, unpacked, with the LoRA as peft has it."""

    def __init__(self, folder: Path, lora: TrainedLora, dtype: torch.dtype = torch.float32) -> None:
        from diffusers import ZImageTransformer2DModel
        from peft import LoraConfig, inject_adapter_in_model

        checkpoint = open_checkpoint(folder / "transformer")
        config: TransformerConfig = checkpoint.config
        ours = Transformer(config)
        given = {name: value for name, value in config_json(config).items() if not name.startswith("_")}
        self.model: Any = ZImageTransformer2DModel(**given)
        wanted = checkpoint.restricted_to(shapes(ours)).tensors
        self.model.load_state_dict({name: one.read_float().view(one.shape) for name, one in wanted.items()})
        self.model.requires_grad_(False).to(dtype)
        targets = list(trained_linears(ours))
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets), self.model)
        with torch.no_grad():
            for module, (a, b) in lora.pairs.items():
                own_a, own_b = self.pair(module)
                own_a.copy_(a)
                own_b.copy_(b)

    def pair(self, module: str) -> tuple[nn.Parameter, nn.Parameter]:
        layer = self.model.get_submodule(module)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch, features: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """As diffusers' training script has it: the negated answer against noise - data, one picture at a time. What is
        preserved: against the answer with the adapters off."""
        losses, new = [], len(batch.latents) - batch.preserved
        for i, (latent, noise, sigma) in enumerate(zip(batch.latents, batch.noises, batch.sigmas, strict=True)):
            noisy, wanted, weight = ((1.0 - sigma) * latent + sigma * noise).to(dtype), noise - latent, 1.0
            if i >= new:
                with torch.no_grad(), self.switched_off():
                    wanted, weight = self._flow(noisy, sigma, features[i]), batch.weight
            losses.append(weight * (self._flow(noisy, sigma, features[i]) - wanted).square().mean())
        return torch.stack(losses).mean()

    def _flow(self, noisy: Tensor, sigma: float, told: Tensor) -> Tensor:
        dtype = noisy.dtype
        time = torch.tensor([1 - sigma], dtype=dtype)
        (answer,), *_ = self.model([noisy[:, None]], time, [told.to(dtype)], return_dict=False)
        return -answer[:, 0].float()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
