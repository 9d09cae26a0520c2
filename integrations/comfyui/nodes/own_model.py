"""MODEL: ComfyUI samples, our transformer computes.

ComfyUI owns when the weights may stay: it asks them to leave (`partially_unload`, `detach`), and all of them do. We own
how they lie: at the first step they are planned within what is free by then, and what does not fit streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import comfy.model_management as management
import torch
import torch.nn.functional as F
from comfy.latent_formats import Flux
from comfy.model_base import Lumina2
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.supported_models import ZImage
from torch import Tensor

from zimage_lite.adapters.joined import NOTHING, AdapterSet
from zimage_lite.checkpoint.names import NATIVE_TRANSFORMER
from zimage_lite.config import PATCH_SIZE
from zimage_lite.errors import UserError
from zimage_lite.pipeline.denoiser import Asked
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.modules import Modules

from .patches import Written, written

# What of ComfyUI's options would change the network from within, if there were one to reach into.
_INSIDE = ("patches", "patches_replace", "optimized_attention_override", "rope_options")
_MORE_INPUTS = ("ref_latents", "ref_contexts", "siglip_feats")


class OurTransformer(torch.nn.Module):
    """In the place of ComfyUI's NextDiT. Holds no parameters of its own: `names` are those of the model's file."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline, self.computing = pipeline, Modules(pipeline)
        self.dtype = pipeline.hardware.dtype
        self._patches: tuple[Written, ...] = ()  # whose files are read as long as they go along
        self._adapters: AdapterSet = NOTHING
        weakref.finalize(self, self.computing.close).atexit = False

    @property
    def names(self) -> list[str]:
        return list(NATIVE_TRANSFORMER.to_foreign(self.pipeline.model.transformer.tensors))

    def take(self, patches: tuple[Written, ...]) -> None:
        """What goes along from now on."""
        if patches != self._patches:
            self.close()
            self._patches, self._adapters = patches, self.pipeline.adapters.of([patch.lora for patch in patches])

    def close(self) -> None:
        self.computing.close()

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, num_tokens: int = 0, attention_mask: Any = None,
        control: Any = None, transformer_options: dict[str, Any] | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """x: [batch, channels, h, w]; timesteps: [batch], noise levels; context: [batch, tokens, width]. -> the flow
        from the picture to the noise, as x. num_tokens, attention_mask: as ComfyUI's own transformer, this one takes
        all tokens."""
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self._evaluate, self, wrappers)
        return run.execute(
            x, timesteps, context, num_tokens, attention_mask, control=control, transformer_options=options, **more
        )

    def _evaluate(
        self, x: Tensor, timesteps: Tensor, context: Tensor, num_tokens: int, attention_mask: Any,
        control: Any = None, transformer_options: Mapping[str, Any] = {}, **more: Any,
    ) -> Tensor:  # fmt: skip
        _require_plain(x, control, transformer_options, more)
        sigmas = transformer_options.get("sample_sigmas")
        self.computing.denoiser.ahead = lambda: [] if sigmas is None else _times(sigmas)[:-1]
        height, width = x.shape[2:]
        latents = F.pad(x, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE), mode="circular")
        asked = Asked(list(latents), _times(timesteps), list(context), self._adapters)
        found = torch.stack(self.computing.denoise(asked)).to(x)
        return -found[:, :, :height, :width]


def _times(sigmas: Tensor) -> list[float]:
    return (1 - sigmas.float()).tolist()


def _require_plain(x: Tensor, control: Any, options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Raise UserError that names what would have to be ignored."""
    inside = [name for name in _INSIDE if options.get(name)]
    found = [f"{name} ({', '.join(map(str, options[name]))})" for name in inside if isinstance(options[name], Mapping)]
    found += [name for name in inside if not isinstance(options[name], Mapping)]
    found += [name for name in _MORE_INPUTS if more.get(name)]
    if control is not None:
        found.append("a ControlNet")
    if x.shape[1] != Flux.latent_channels:
        found.append(f"{x.shape[1]} channels of input")
    if found:
        fix = "take it out, use ComfyUI's own loader, or for ControlNets the Generate node"
        raise UserError(f"this MODEL is computed by zimage-lite, which cannot apply: {'; '.join(found)}", fix=fix)


class OurModel(Lumina2):
    """Noise levels, latents and conditions are ComfyUI's."""

    def __init__(self, pipeline: Pipeline) -> None:
        config = pipeline.model.transformer.config
        dit = {
            "image_model": "lumina2", "in_channels": config.in_channels, "dim": config.dim,
            "n_layers": config.n_layers, "n_refiner_layers": config.n_refiner_layers,
            "cap_feat_dim": config.cap_feat_dim, "disable_unet_model_creation": True,
        }  # fmt: skip
        known = ZImage(dit)
        known.set_inference_dtype(pipeline.hardware.dtype, None)
        super().__init__(known, device=management.unet_offload_device())
        self.diffusion_model = OurTransformer(pipeline)
        shift = pipeline.model.scheduler.shift
        self.model_sampling.set_parameters(shift=shift, multiplier=1.0)

    def state_dict(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Names alone, by which loaders of LoRAs find what they are for."""
        nothing = torch.empty(0, device="meta")
        return {f"diffusion_model.{name}": nothing for name in self.diffusion_model.names}


class OurPatcher(ModelPatcher):
    """The signature of __init__ is ComfyUI's, which clones by calling it."""

    def __init__(
        self, model: OurModel, load_device: Any, offload_device: Any, size: int = 0, weight_inplace_update: bool = False
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.written: tuple[Written, ...] = ()

    def clone(self, *args: Any, **more: Any) -> OurPatcher:
        clone = super().clone(*args, **more)
        clone.written = self.written
        return clone

    # --- What is asked of the weights

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        known = self.model.state_dict()
        own = {key: patch for key, patch in patches.items() if (key if isinstance(key, str) else key[0]) in known}
        if own and strength_patch:
            self.written = (*self.written, written(own, strength_patch, strength_model))
            self.patches_uuid = self.written[-1].uuid
        return list(own)

    def add_hook_patches(self, *args: Any, **more: Any) -> Any:
        raise _not_here("LoRAs that change from step to step (hooks)")

    def add_weight_wrapper(self, *args: Any, **more: Any) -> Any:
        raise _not_here("wrappers of weights")

    def get_key_patches(self, *args: Any, **more: Any) -> Any:
        raise _not_here("merging of models")

    def model_state_dict_for_saving(self, *args: Any, **more: Any) -> Any:
        raise _not_here("saving")

    # --- Where the weights are

    def load(self, device_to: Any = None, *args: Any, **more: Any) -> None:
        """They come with the first step; from here on ComfyUI counts them."""
        self.model.device = device_to
        self.model.model_loaded_weight_memory = self.model_size()
        self.model.current_weight_patches_uuid = self.patches_uuid

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights=False)
        if unpatch_weights:
            self.partially_unload(device_to)
            self.model.device = device_to
            self.model.current_weight_patches_uuid = None

    def partially_unload(self, device_to: Any, *args: Any, **more: Any) -> int:
        """All of them leave, and come back with the next step as there is room."""
        freed = self.model.model_loaded_weight_memory
        self.model.diffusion_model.close()
        self.model.model_loaded_weight_memory = 0
        return freed

    def pre_run(self) -> None:
        super().pre_run()
        self.model.diffusion_model.take(self.written)


def _not_here(what: str) -> UserError:
    return UserError(f"{what}: not with a MODEL of zimage-lite, whose weights are not ComfyUI's")


def our_model(pipeline: Pipeline) -> OurPatcher:
    """For KSampler and all that takes a MODEL."""
    n_bytes = sum(tensor.packed_bytes for tensor in pipeline.model.transformer.tensors.values())
    return OurPatcher(OurModel(pipeline), management.get_torch_device(), management.unet_offload_device(), n_bytes)
