"""A whole model: which files make up transformer, text encoder, VAE, tokenizer and schedule.

MODEL is a folder in diffusers' layout, a folder with ComfyUI's subfolders, an all-in-one file, or nothing but the files
named one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import OmniConfig, SchedulerConfig, TextEncoderConfig, from_mapping
from ..errors import UserError, WrongModelError
from .checkpoint import Checkpoint, components_in, open_checkpoint
from .detect import COMPONENTS, KINDS, VISION
from .impostors import no_such, refuse_cache_root
from .json_file import read_json
from .model_card import colour_layers, default_size
from .qwen3 import Qwen3Tokenizer, is_vocabulary_of_qwen3
from .tokenizer import PromptTokenizer, has_tokenizer, tokenizer_from, tokenizer_from_gguf
from .weight_files import are_shards, is_weight_file

# Component -> ComfyUI's folders for it, new and old.
COMFY_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "text_encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    VISION: ("clip_vision",),
}
_FLAGS = {"transformer": "--transformer", "text_encoder": "--text-encoder", "vae": "--vae", VISION: f"--{VISION}"}


@dataclass(frozen=True)
class ModelFiles:
    """Everything open, nothing loaded."""

    name: str
    transformer: Checkpoint
    text_encoder: Checkpoint
    vae: Checkpoint
    tokenizer: PromptTokenizer
    scheduler: SchedulerConfig
    default_size: tuple[int, int]  # width and height
    colours: Sequence[Sequence[Sequence[float]]] | None = None  # of a preview; None: as Flux's latents have them
    synthetic: bool = False  # random weights: what it draws is noise
    replaced: tuple[str, ...] = ()  # parts that are files of their own, in the place of the model's
    siglip: Checkpoint | None = None  # the vision tower, where an Omni has one

    @property
    def sees(self) -> bool:
        """Whether the transformer also takes pictures beside the prompt."""
        return isinstance(self.transformer.config, OmniConfig)


def open_model(model: Path | None, overrides: Mapping[str, Path | None] | None = None) -> ModelFiles:
    """overrides: "transformer", "text_encoder", "vae" or "tokenizer" -> a file or folder that replaces the model's."""
    chosen = {name: path for name, path in (overrides or {}).items() if path is not None}
    if model is not None and not model.exists():
        raise no_such(model, "no such model", "a folder with transformer/, text_encoder/ and vae/")
    places = {component: chosen.get(component) or find_component(model, component) for component in COMPONENTS}
    require_all(model, places)
    parts: dict[str, Any] = {part: open_checkpoint(path, part) for part, path in places.items() if path is not None}
    files = ModelFiles(
        siglip=_tower(model, parts["transformer"], chosen.get(VISION)),
        name=(model or parts["transformer"].source).resolve().name,
        tokenizer=_tokenizer(model, parts["text_encoder"], chosen.get("tokenizer")),
        scheduler=scheduler_config(model),
        default_size=default_size(model),
        colours=colour_layers(model),
        replaced=tuple(sorted(chosen)),
        **parts,
    )
    require_fit(files)
    return files


def _tower(model: Path | None, transformer: Checkpoint, chosen: Path | None) -> Checkpoint | None:
    """A model without one draws from words alone."""
    if not isinstance(transformer.config, OmniConfig):
        if chosen:
            raise UserError(f"{transformer.source} is no Omni, so it has no use for a vision tower", got=f"--{VISION}")
        return None
    in_folder = model if model is not None and model.is_dir() else None
    path = chosen or find_component(in_folder, VISION)
    return open_checkpoint(path, VISION) if path else None


def require_all(model: Path | None, places: Mapping[str, Path | None]) -> None:
    """Raise UserError that names the components without a place, and what a model that is one file has instead."""
    missing = [component for component, path in places.items() if path is None]
    if not missing:
        return
    in_folder = model is not None and model.is_dir()
    lacks = " and no ".join(f"{part}/" if in_folder else COMPONENTS[part] for part in missing)
    has = None if model is None or in_folder else " and ".join(f"a {KINDS[part]}" for part in components_in(model))
    flags = " and ".join(f"{_FLAGS[part]} FILE" for part in missing)
    raise UserError(f"{model or 'the model'} has no {lacks}", got=has, fix=f"name what is missing with {flags}")


def require_fit(files: ModelFiles) -> None:
    """Raise WrongModelError unless the parts have the sizes that the transformer works with, and the encoder a row for
    every token."""
    wanted, encoder, vae = files.transformer.config, files.text_encoder, files.vae
    for part, what, got, expected, verb in (
        (encoder, "width of the text encoder", encoder.config.hidden_size, wanted.cap_feat_dim, "takes"),
        (vae, "latent channels of the VAE", vae.config.latent_channels, wanted.in_channels, "has"),
    ):
        if got != expected:
            raise WrongModelError(f"{part.source}: {what}", got=got, expected=f"{expected}, as the transformer {verb}")
    if files.siglip and isinstance(wanted, OmniConfig) and files.siglip.config.hidden_size != wanted.siglip_feat_dim:
        raise WrongModelError(
            f"{files.siglip.source}: width of the vision tower",
            got=files.siglip.config.hidden_size,
            expected=f"{wanted.siglip_feat_dim}, as the transformer takes",
        )
    highest, rows = files.tokenizer.highest_id, encoder.config.vocab_size
    if highest >= rows:
        raise WrongModelError(
            f"{files.tokenizer.source}: the highest token",
            got=highest,
            expected=f"less than {rows}, as the encoder has rows",
        )


def find_component(model: Path | None, component: str) -> Path | None:
    """The folder or file of a component inside a model folder, or None. An all-in-one file is its own place."""
    if model is None:
        return None
    if model.is_file():
        return model if component in components_in(model) else None
    folder = model / component
    if folder.is_dir() and (folder / "config.json").exists():
        return folder
    for name in COMFY_FOLDERS[component]:
        files = [f for f in sorted((model / name).glob("*")) if is_weight_file(f)] if (model / name).is_dir() else []
        if len(files) > 1 and are_shards(files):
            return model / name
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"{model / name} holds several files", got=names, fix=f"choose with {_FLAGS[component]} FILE"
            )
        if files:
            return files[0]
    if folder.is_dir():
        return folder
    refuse_cache_root(model)
    return None


def scheduler_config(model: Path | None) -> SchedulerConfig:
    path = model / "scheduler" / "scheduler_config.json" if model else None
    values: dict[str, Any] = read_json(path) if path and path.exists() else {}
    return from_mapping(SchedulerConfig, values, str(path))


def find_tokenizer(model: Path | None, text_encoder: Checkpoint, chosen: Path | None = None) -> PromptTokenizer | None:
    """`chosen`, or the model folder's own, or what came in the text encoder's GGUF file or folder, or the built-in one
    of Qwen3 if it fits the encoder's vocabulary; else None."""
    if chosen is not None:
        return tokenizer_from(chosen)
    if model is not None and (model / "tokenizer").is_dir():
        return tokenizer_from(model / "tokenizer")
    if {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"} <= text_encoder.metadata.keys():
        return tokenizer_from_gguf(text_encoder.metadata, str(text_encoder.source))
    if has_tokenizer(text_encoder.source):
        return tokenizer_from(text_encoder.source)
    return Qwen3Tokenizer() if is_vocabulary_of_qwen3(text_encoder.config.vocab_size) else None


def _tokenizer(model: Path | None, text_encoder: Checkpoint, chosen: Path | None) -> PromptTokenizer:
    found = find_tokenizer(model, text_encoder, chosen)
    if found is None:
        raise UserError(
            f"{text_encoder.source}: no tokenizer came with this text encoder, and the built-in one does not fit it",
            got=f"{text_encoder.config.vocab_size} tokens",
            expected=f"Qwen3's {TextEncoderConfig.vocab_size}",
            fix="name its tokenizer.json with --tokenizer; Qwen3-4B's is at https://huggingface.co/Qwen/Qwen3-4B",
        )
    return found
