"""Model sizes from tensor shapes; what shapes cannot tell comes from config.json, GGUF metadata, or the true model.

Shapes decide, because they are what will run. A config that contradicts them is refused: the files do not belong
together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ..config import (
    PATCH_SIZE,
    ControlConfig,
    OmniConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    VisionConfig,
    from_mapping,
)
from ..errors import WrongModelError

Shapes = Mapping[str, tuple[int, ...]]
_Config = TypeVar("_Config")


def transformer_config(shapes: Shapes, given: Mapping[str, Any], where: str) -> TransformerConfig:
    """shapes: canonical name -> shape; given: the values of config.json, possibly none."""
    dim, cap_feat_dim = _shape(shapes, "cap_embedder.1.weight", 2, where)
    head_dim = _shape(shapes, "layers.0.attention.norm_q.weight", 1, where)[0]
    patch_dim = _shape(shapes, "all_x_embedder.2-1.weight", 2, where)[1]
    sees = any(name.startswith("siglip_") for name in shapes)
    measured: dict[str, Any] = {
        "dim": dim,
        "cap_feat_dim": cap_feat_dim,
        **({"siglip_feat_dim": _shape(shapes, "siglip_embedder.1.weight", 2, where)[1]} if sees else {}),
        "in_channels": patch_dim // PATCH_SIZE**2,
        "n_layers": _count(shapes, r"layers\.(\d+)\."),
        "n_refiner_layers": _count(shapes, r"(?:noise|context)_refiner\.(\d+)\."),
        "n_heads": dim // head_dim,
    }
    _reject_contradiction(measured, given, where)
    if dim == TransformerConfig.dim:
        _require_blocks(measured, given, where, TransformerConfig, "n_layers", "n_refiner_layers")
    # A quarter of each head sees the caption position, three eighths each see height and width: 32, 48, 48 of 128.
    measured["axes_dims"] = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    kind = OmniConfig if sees else TransformerConfig
    return from_mapping(kind, {**given, **measured, **_only(given, "axes_dims")}, where)


def vision_config(shapes: Shapes, given: Mapping[str, Any], where: str) -> VisionConfig:
    """given: also that of a whole SigLIP2, whose values for the tower are in its vision_config."""
    inner = given.get("vision_config")
    given = inner if isinstance(inner, dict) else given
    positions, hidden_size = _shape(shapes, "embeddings.position_embedding.weight", 2, where)
    measured = {
        "hidden_size": hidden_size,
        "num_patches": positions,
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "intermediate_size": _shape(shapes, "encoder.layers.0.mlp.fc1.weight", 2, where)[0],
    }
    _reject_contradiction(measured, given, where)
    if hidden_size == VisionConfig.hidden_size:
        _require_blocks(measured, given, where, VisionConfig, "num_hidden_layers")
    found = from_mapping(VisionConfig, {**given, **measured}, where)
    _require_naflex(shapes, found, given, where)
    return found


def _require_naflex(shapes: Shapes, config: VisionConfig, given: Mapping[str, Any], where: str) -> None:
    """Raise WrongModelError for a tower that sees pictures of one size alone, or none of SigLIP's."""
    patch = shapes.get("embeddings.patch_embedding.weight", ())
    if patch != (config.hidden_size, config.patch_dim):
        raise WrongModelError(
            f"{where}: tensor embeddings.patch_embedding.weight",
            got=f"shape {patch}",
            expected=f"{(config.hidden_size, config.patch_dim)}, as SigLIP2's naflex towers have",
        )
    activation = given.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise WrongModelError(f"{where}: hidden_act", got=repr(activation)[:60], expected="gelu_pytorch_tanh")


def text_encoder_config(shapes: Shapes, given: Mapping[str, Any], where: str) -> TextEncoderConfig:
    vocab_size, hidden_size = _shape(shapes, "embed_tokens.weight", 2, where)
    layer = "layers.0."
    head_dim = _shape(shapes, f"{layer}self_attn.q_norm.weight", 1, where)[0]
    n_layers = _count(shapes, r"layers\.(\d+)\.")
    is_true_width = hidden_size == TextEncoderConfig.hidden_size
    told = {"num_hidden_layers": TextEncoderConfig.num_hidden_layers} if is_true_width else {}
    if {**told, **_only(given, "num_hidden_layers")}.get("num_hidden_layers") == n_layers + 1:
        n_layers += 1  # the last layer is never used, and some files leave it out
    measured = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": _shape(shapes, f"{layer}self_attn.q_proj.weight", 2, where)[0] // head_dim,
        "num_key_value_heads": _shape(shapes, f"{layer}self_attn.k_proj.weight", 2, where)[0] // head_dim,
        "intermediate_size": _shape(shapes, f"{layer}mlp.gate_proj.weight", 2, where)[0],
    }
    _reject_contradiction(measured, given, where)
    if is_true_width:
        _require_blocks(measured, given, where, TextEncoderConfig, "num_hidden_layers")
    rope = given.get("rope_parameters")  # where transformers 5 moved rope_theta
    theta = _only(rope, "rope_theta") if isinstance(rope, dict) else {}
    return from_mapping(TextEncoderConfig, {**given, **theta, **measured}, where)


def vae_config(shapes: Shapes, given: Mapping[str, Any], where: str) -> VaeConfig:
    levels = _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    blocks = [f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    measured = {
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4, where)[1],
        "in_channels": _shape(shapes, "decoder.conv_out.weight", 4, where)[0],
        "block_out_channels": tuple(_shape(shapes, name, 4, where)[0] for name in reversed(blocks)),
        "layers_per_block": _count(shapes, r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.") - 1,
    }
    _reject_contradiction(measured, given, where)
    for layer in ("quant_conv", "post_quant_conv"):
        if given.get(f"use_{layer}") or f"{layer}.weight" in shapes:
            raise WrongModelError(f"{where}: it has a {layer}, so this is not the Flux VAE that Z-Image uses")
    return from_mapping(VaeConfig, {**given, **measured}, where)


# Channels, whether its refiner gives hints -> how many blocks there are. Each has its place in the true 30 layers.
_RELEASED = {(16, False): (6,), (33, True): (15, 3)}


def control_config(shapes: Shapes, given: Mapping[str, Any], where: str) -> ControlConfig:
    """shapes: without a refiner that was never trained. places, where no config names them, follow from the number of
    blocks, by their authors' rule."""
    dim, patch_dim = _shape(shapes, "control_all_x_embedder.2-1.weight", 2, where)
    head_dim = _shape(shapes, "control_layers.0.attention.norm_q.weight", 1, where)[0]
    n_blocks, n_refiners = _count(shapes, r"control_layers\.(\d+)\."), _count(shapes, r"control_noise_refiner\.(\d+)\.")
    measured: dict[str, Any] = {
        "dim": dim,
        "control_in_dim": patch_dim // PATCH_SIZE**2,
        "n_heads": dim // head_dim,
        **({"n_refiner_layers": n_refiners} if n_refiners else {}),
    }
    _reject_contradiction(measured, given, where)
    if measured["control_in_dim"] not in (16, 33):
        raise WrongModelError(f"{where}: channels that it sees", got=measured["control_in_dim"], expected="16 or 33")
    places = given.get("control_layers_places")
    if places is None:
        places = _control_places(n_blocks)
    numbers = {**given, **measured, "control_layers_places": places, "add_control_noise_refiner": None}
    found = from_mapping(ControlConfig, numbers, where)
    hinting = "control_noise_refiner.0.after_proj.weight" in shapes
    kind = "control_noise_refiner" if hinting else None if n_refiners else "control_layers"
    found = replace(found, add_control_noise_refiner=kind)
    _require_released(found, n_blocks, given, where)
    return found


def _control_places(n_blocks: int) -> tuple[int, ...]:
    n_layers = TransformerConfig.n_layers
    return tuple(range(0, n_layers, max(n_layers // max(n_blocks, 1), 1)))[:n_blocks]


def _require_released(config: ControlConfig, n_blocks: int, given: Mapping[str, Any], where: str) -> None:
    """Raise WrongModelError for a part of a ControlNet, or one that nobody has described."""
    wanted: tuple[int, ...] = (len(config.control_layers_places),)
    if config.dim == ControlConfig.dim and given.get("control_layers_places") is None:
        wanted = _RELEASED.get((config.control_in_dim, config.add_control_noise_refiner is not None), ())
    if n_blocks not in wanted:
        raise WrongModelError(
            f"{where}: blocks of a ControlNet {config.version} for {config.control_in_dim} channels",
            got=n_blocks,
            expected=" or ".join(map(str, wanted)) or "versions 1.0 for 16, 2.0 and 2.1 for 33",
            fix="get the whole file",
        )


def _shape(shapes: Shapes, name: str, rank: int, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise WrongModelError(f"{where}: tensor {name} is missing")
    if len(shapes[name]) != rank or 0 in shapes[name]:
        raise WrongModelError(f"{where}: tensor {name}", got=f"shape {shapes[name]}", expected=f"{rank} dimensions")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest index that the pattern captures. Bounded by the number of tensors, so no name that
    counts to a billion makes us build a billion layers."""
    indices = {int(match[1][:9]) for match in map(re.compile(pattern).match, shapes) if match}
    return min(max(indices, default=-1) + 1, len(indices) + 1)


def _require_blocks(
    measured: Mapping[str, int], given: Mapping[str, Any], where: str, true: type[Any], *counts: str
) -> None:
    """Raise WrongModelError for a model of the true width that has not the true number of blocks, though no config
    says that this is meant: a shard, or a file that was cut between tensors."""
    for name in counts:
        if given.get(name) is None and measured[name] != getattr(true, name):
            raise WrongModelError(
                f"{where}: {name}",
                got=measured[name],
                expected=f"{getattr(true, name)}, as a model of this width has",
                fix="get the whole file; for another size of model, name a folder whose config.json says so",
            )


def _only(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: values[name]} if values.get(name) is not None else {}


def _reject_contradiction(measured: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    for name, value in measured.items():
        said = given.get(name)
        said = tuple(said) if isinstance(said, list) else said
        if said is not None and said != value:
            raise WrongModelError(
                f"{where}: the config says {name} is {said}, the tensors say {value}",
                fix="these files do not belong together",
            )
