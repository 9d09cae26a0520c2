"""CLIP: our text encoder, with all of ComfyUI's memory that it asks for while it runs, and none afterwards."""

from __future__ import annotations

from typing import Any

import torch
from comfy.sd import CLIP

from zimage_lite.errors import UserError
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.modules import Modules

from .running import make_room

_KEY = "zimage_lite"  # of tokens: the text, which the encoder's own tokenizer reads


class OurEncoder(CLIP):
    """What ComfyUI's nodes for prompts call. Neither weights in brackets nor embeddings mean anything to Qwen3, so the
    first are text, as in ComfyUI's own Z-Image, and the second are refused."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(no_init=True)
        self.modules = Modules(pipeline)
        self.n_bytes = sum(tensor.packed_bytes for tensor in pipeline.model.text_encoder.tensors.values())
        self.cond_stage_model = torch.nn.Module()  # in which loaders of LoRAs look for names
        self.apply_hooks_to_conds, self.use_clip_schedule, self.layer_idx = None, False, None

    def clone(self, disable_dynamic: bool = False) -> OurEncoder:
        clone = object.__new__(OurEncoder)
        clone.__dict__.update(self.__dict__)
        return clone

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, str]:
        if "embedding:" in text:
            raise UserError("embedding: in a prompt: textual inversions are not applied", fix="take it out")
        if options:
            raise UserError(f"options of the tokenizer ({', '.join(options)}) are not followed")
        return {_KEY: text}

    def encode_from_tokens(self, tokens: dict[str, str], return_pooled: Any = False, return_dict: bool = False) -> Any:
        if set(tokens) != {_KEY}:
            raise UserError("tokens of another CLIP", got=", ".join(tokens), expected="those that this CLIP made")
        make_room(self.n_bytes)
        (embedding,) = self.modules.encode([tokens[_KEY]])
        cond = embedding.float()[None]
        if return_dict:
            return self.add_hooks_to_dict({"cond": cond, "pooled_output": None})
        return (cond, None) if return_pooled else cond

    def encode_from_tokens_scheduled(
        self, tokens: dict[str, str], unprojected: bool = False, add_dict: dict[str, Any] | None = None,
        show_pbar: bool = True,
    ) -> list[list[Any]]:  # fmt: skip
        found = self.encode_from_tokens(tokens, return_dict=True)
        return [[found.pop("cond"), {**found, **(add_dict or {})}]]

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> list[str]:
        """Of what is for this encoder, nothing: ComfyUI then logs what is not loaded."""
        return []

    def clip_layer(self, layer_idx: int) -> None:
        raise UserError("another layer of the text encoder: Z-Image is made for the last but one, and takes no other")

    def is_dynamic(self) -> bool:
        return False

    def load_model(self, tokens: Any = None) -> None:
        """It comes when it encodes."""

    def get_sd(self) -> Any:
        raise UserError("this CLIP is computed by zimage-lite and cannot be saved from here")

    state_dict_for_saving = get_key_patches = get_sd
