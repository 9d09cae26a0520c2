"""What a GGUF file says of its model: `general.architecture`, and settings under keys that begin with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TextEncoderConfig
from ..errors import WrongModelError

_NOTHING = ("pig", "cow")  # what some converters write where the architecture should stand
_ENCODERS = {"qwen3": "Qwen3", "qwen3vl": "Qwen3-VL"}  # they have the same tensors and compute the same of a text

# Key after the architecture -> its name in config.json.
_VALUES = {
    "block_count": "num_hidden_layers",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}


def architecture(metadata: Mapping[str, Any]) -> str:
    """Such as lumina2 or qwen3; empty where a file does not say."""
    said = metadata.get("general.architecture")
    return said if isinstance(said, str) and said not in _NOTHING else ""


def text_encoder_values(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, out of a text encoder's GGUF metadata. Other files have none."""
    said = architecture(metadata) or "qwen3"
    return {name: metadata[f"{said}.{key}"] for key, name in _VALUES.items() if f"{said}.{key}" in metadata}


def refuse_other_encoder(metadata: Mapping[str, Any], where: str) -> None:
    """Raise WrongModelError for a text encoder that has Qwen3's tensor names, but calls itself something else."""
    said = architecture(metadata)
    if said and said not in _ENCODERS:
        raise WrongModelError(f"{where}: this is a {said[:60]} text encoder", expected="the architecture qwen3")


def other_encoder(metadata: Mapping[str, Any], config: TextEncoderConfig) -> str | None:
    """What to tell of an encoder that runs, but is not the one Z-Image was trained with; None if nothing."""
    said, theta = architecture(metadata), config.rope_theta
    if said and said != "qwen3":
        return f"the text encoder is {_ENCODERS[said]} (rope_theta {theta:g}): it is another than Z-Image's own Qwen3"
    if theta != TextEncoderConfig.rope_theta:
        return f"the text encoder's rope_theta is {theta:g}, not 1e6: it is another Qwen3 than Z-Image's own"
    return None
