"""Tiny Omni models, by diffusers and transformers."""

from __future__ import annotations

from typing import Any

import torch
from oracles import randomize

TOWER = 96  # width of the vision tower


def omni_pipeline(base: Any) -> Any:
    """A ZImageOmniPipeline with the text encoder, VAE and schedule of a ZImagePipeline, in float32: its VAE takes the
    bfloat16 in which it is given pictures for the float32 that they were."""
    from diffusers import ZImageOmniPipeline, ZImageTransformer2DModel
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(2)
    transformer = ZImageTransformer2DModel(
        dim=256, n_layers=3, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=128, siglip_feat_dim=TOWER,
        axes_lens=[2048, 512, 512],
    )  # fmt: skip
    tower = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=TOWER, num_hidden_layers=2, num_attention_heads=2, intermediate_size=160, num_patches=16
        )
    )
    for model in (transformer, tower):
        randomize(model)
    pipeline = ZImageOmniPipeline(
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        transformer=transformer.eval(),
        siglip=tower.eval(),
        siglip_processor=Siglip2ImageProcessorPil(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
