"""What stands before and behind the transformer: text encoder, tokenizer and VAE, as diffusers' pipelines call them.

They are no torch modules, so that nothing tries to move, cast or hook what comes and goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor

from ..checkpoint.tokenizer import CHAT_TEMPLATE, PromptTokenizer
from ..errors import UserError
from ..pipeline.modules import Modules


@dataclass(frozen=True)
class HiddenStates:
    """Of which Z-Image reads one, the last but one: [prompts, tokens, width]."""

    penultimate: Tensor

    def __getitem__(self, layer: int) -> Tensor:
        if layer != -2:
            raise UserError("hidden states of the text encoder", got=layer, expected="-2, all that Z-Image reads")
        return self.penultimate


@dataclass(frozen=True)
class Encoded:
    hidden_states: HiddenStates


class TextEncoder:
    """Prompts that were encoded before are taken from the disk, where a Pipeline keeps them."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = True) -> Encoded:
        """[prompts, tokens] each; where the mask is 0 there are zeros in what it gives."""
        masks = attention_mask.bool()
        prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids, masks, strict=True)]
        embeddings = self._modules.encode(prompts)
        found = torch.zeros(*input_ids.shape, embeddings[0].shape[1], dtype=embeddings[0].dtype)
        for own, mask, embedding in zip(found, masks.cpu(), embeddings, strict=True):
            own[mask] = embedding
        return Encoded(HiddenStates(found.to(input_ids.device)))


def tokenizer(prompts: PromptTokenizer) -> Any:
    """The same, as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=prompts.tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


class Vae:
    """Takes and gives float32, whatever it computes in. Images go through it one by one, whole or in exact bands."""

    dtype = torch.float32

    def __init__(self, modules: Modules) -> None:
        self._modules, self.config = modules, modules.pipeline.model.vae.config

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """x: [images, 3, height, width] in [-1, 1]."""
        moments = torch.stack(self._modules.moments(list(x))).to(x.device)
        found = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """z: [images, channels, height, width], as the VAE knows latents, without the transformer's scale."""
        latents = (z.float() - self.config.shift_factor) * self.config.scaling_factor
        found = torch.stack(self._modules.decode(list(latents))).to(z.device)
        return DecoderOutput(sample=found) if return_dict else (found,)

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Nothing to do: where a whole image does not fit, it is planned in bands, which change no pixel."""

    enable_slicing = disable_slicing = disable_tiling = enable_tiling
