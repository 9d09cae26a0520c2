"""The three parts of a model in sizes: Z-Image-Turbo in any format, or a model that is there. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.detect import VISION
from ..checkpoint.model_files import ModelFiles
from ..config import OmniConfig, TextEncoderConfig, TransformerConfig, VaeConfig, VisionConfig
from ..convert.catalog import Part, stored_parts, true_parts
from ..convert.complete import require_complete
from ..convert.recipe import KEEP, as_it_is, target
from ..errors import UserError
from ..model.linear import shapes
from ..model.vae import HALVES


@dataclass(frozen=True)
class Model:
    """Sizes of the three parts. name: for people."""

    name: str
    transformer: tuple[Part, ...]
    text_encoder: tuple[Part, ...]
    vae_weights: Mapping[str, int]  # how many, of "encoder" and "decoder"
    transformer_config: TransformerConfig
    text_encoder_config: TextEncoderConfig
    vae_config: VaeConfig
    vision: tuple[Part, ...] = ()  # of the tower, where it has one
    vision_config: VisionConfig | None = None

    @property
    def sees(self) -> bool:
        """Whether it also takes pictures beside the prompt."""
        return isinstance(self.transformer_config, OmniConfig)

    def require_trainable(self) -> None:
        """Raise UserError for a model on which LoRAs are not trained."""
        if self.sees:
            raise UserError(f"{self.name}: LoRAs are not trained on Omni", fix="train on Z-Image or Turbo")


def true_model(format_name: str, sees: bool = False) -> Model:
    """Z-Image-Turbo, or Omni, as `quantize --to` would write it. Raises UserError for a format that cannot be
    written."""
    chosen = target(format_name, "--format")
    encoder = as_it_is() if chosen.text_encoder_to == KEEP else target(chosen.text_encoder_to)
    vae = VaeConfig()
    return Model(
        name=f"{'Z-Image-Omni' if sees else 'Z-Image-Turbo'} in {chosen.name}",
        transformer=tuple(true_parts("omni" if sees else "transformer", chosen)),
        text_encoder=tuple(true_parts("text_encoder", encoder)),
        vae_weights={half: sum(map(math.prod, shapes(made(vae)).values())) for half, made in HALVES.items()},
        transformer_config=OmniConfig() if sees else TransformerConfig(),
        text_encoder_config=TextEncoderConfig(),
        vae_config=vae,
        vision=tuple(true_parts(VISION, as_it_is())) if sees else (),
        vision_config=VisionConfig() if sees else None,
    )


def model_of(files: ModelFiles) -> Model:
    """A model that is there. Its headers have been read. Raises WrongModelError if a part of it lacks a tensor: told
    here, not when that part's turn comes, which for the VAE is after all steps."""
    for part in filter(None, (files.transformer, files.text_encoder, files.vae, files.siglip)):
        require_complete(part)
    halves = {half: files.vae.under(half).values() for half in HALVES}
    return Model(
        name=f"{files.name} ({files.transformer.main_format})",
        transformer=tuple(stored_parts(files.transformer)),
        text_encoder=tuple(stored_parts(files.text_encoder)),
        vae_weights={half: sum(t.rows * t.columns for t in tensors) for half, tensors in halves.items()},
        transformer_config=files.transformer.config,
        text_encoder_config=files.text_encoder.config,
        vae_config=files.vae.config,
        vision=tuple(stored_parts(files.siglip)) if files.siglip else (),
        vision_config=files.siglip.config if files.siglip else None,
    )
