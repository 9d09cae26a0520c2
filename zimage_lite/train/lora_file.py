"""The file that comes out: names that most programs read (diffusers, ComfyUI, whatever takes trainers' files), no alpha
but that in the weights, and metadata by which they tell what it is."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import __version__
from ..checkpoint.safetensors import encode_header
from ..checkpoint.writer import open_writer
from ..config.training import TrainOptions
from .lora import TrainedLora

_PREFIX = "diffusion_model."


def save_lora(path: Path, lora: TrainedLora, options: TrainOptions, step: int, pictures: int) -> None:
    """bfloat16. The same training writes the same bytes: nothing in it tells the time or the place."""
    tensors = [(_PREFIX + name, tensor.to(torch.bfloat16)) for name, tensor in lora.state().items()]
    arrays = [(name, "BF16", tuple(tensor.shape)) for name, tensor in tensors]
    header, offsets = encode_header(arrays, metadata(options, step, pictures))
    with open_writer(path, header, offsets[-1] + tensors[-1][1].nbytes) as writer:
        for (_, tensor), offset in zip(tensors, offsets, strict=True):
            writer.write(offset, tensor)


def metadata(options: TrainOptions, step: int, pictures: int) -> dict[str, str]:
    """By kohya's names and those of the model spec, which others read."""
    trigger = {"modelspec.trigger_phrase": options.trigger} if options.trigger else {}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.resolution": f"{options.resolution}x{options.resolution}",
        "modelspec.prediction_type": "flow",
        **trigger,
        "ss_base_model_version": "zimage",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(options.rank),
        "ss_learning_rate": str(options.rate),
        "ss_optimizer": options.optimizer,
        "ss_seed": str(options.seed),
        "ss_steps": str(step),
        "ss_num_train_images": str(pictures),
        "ss_batch_size_per_device": str(options.batch),
        "software": f"zimage-lite {__version__}",
    }
