"""Checkpoints that have every tensor of their model, found out before anything is converted or drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.detect import CONTROLNET, VISION
from ..model.controlnet import ControlNet
from ..model.linear import shapes
from ..model.omni import transformer
from ..model.text_encoder import TextEncoder
from ..model.vae import Decoder
from ..model.vision import VisionTower
from .catalog import without_unused


def open_complete(path: Path, component: str | None = None, file_bytes: Mapping[Path, int] | None = None) -> Checkpoint:
    """Open a checkpoint that has, in the right shape, every tensor `generate` would ask of it, and leave out those that
    no component has. Raises UserError.

    file_bytes: as in `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, component, file_bytes)
    require_complete(checkpoint)
    return without_unused(checkpoint)


def require_complete(checkpoint: Checkpoint) -> None:
    """Raise WrongModelError if a tensor that drawing asks for is missing or misshapen."""
    checkpoint.restricted_to(shapes(skeleton(checkpoint)))


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model that a checkpoint is for, without weights. Of a VAE only the decoder is ever needed to draw."""
    if checkpoint.component == "vae":
        return nn.ModuleDict({"decoder": Decoder(checkpoint.config)})
    skeletons: dict[str, Callable[[Any], nn.Module]] = {
        "transformer": transformer,
        "text_encoder": TextEncoder,
        CONTROLNET: ControlNet,
        VISION: VisionTower,
    }
    return skeletons[checkpoint.component](checkpoint.config)
