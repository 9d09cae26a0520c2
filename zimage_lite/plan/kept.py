"""What of one phase waits for another, in bytes."""

from __future__ import annotations

from ..config import OmniConfig
from .footprint import ITEM_BYTES, STREAM_BYTES
from .job import Job
from .model_sizes import Model


def embedding_bytes(model: Model, job: Job, dtype: str) -> int:
    """Of all prompts, until the last image is done. dtype: that of the transformer."""
    return STREAM_BYTES[dtype] * (sum(job.prompt_tokens) + job.other_tokens) * model.transformer_config.cap_feat_dim


def vector_bytes(model: Model, job: Job, dtype: str) -> int:
    """adaLN vectors of all steps, from before the first until the last image is done."""
    c = model.transformer_config
    blocks = c.n_refiner_layers + c.n_layers + sum(control.blocks for control in job.controls)
    times = job.steps + isinstance(c, OmniConfig)  # and that of what has no noise
    return ITEM_BYTES[dtype] * times * (4 * blocks + 1) * c.dim


def reference_bytes(model: Model, job: Job) -> int:
    """Of all that are seen in a round, at most: latents and features, in float32."""
    features = model.vision_config.hidden_size if model.vision_config else 0
    each = [model.vae_config.latent_channels * one.latents + features * one.patches for one in job.references]
    return 4 * job.looks * max(each, default=0)


def latent_bytes(model: Model, job: Job) -> int:
    """Of one image, in float32."""
    return 4 * model.vae_config.latent_channels * job.latents


def picture_bytes(model: Model, job: Job) -> int:
    """Of the pictures to start from and to follow, their latents and masks, and those that wait."""
    each = 3 * job.pixels + latent_bytes(model, job) + 4 * job.latents
    return job.pictures * each + job.held_bytes + 4 * job.contexts * job.latents
