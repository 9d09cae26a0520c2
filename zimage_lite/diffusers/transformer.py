"""A ZImageTransformer2DModel of diffusers without a single weight, whose evaluations are ours.

`from_pipe` hands on a component only if its class is exactly the one that diffusers expects. So this is an object of
that class, not of one derived from it: methods of ours lie on it, in front of those of its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import UserError
from ..pipeline.denoiser import Asked
from ..pipeline.modules import Modules
from .controlnet import Hints
from .loras import Loras

_PATCHES = {"patch_size": 2, "f_patch_size": 1}
_STREAMED = "its weights come and go, and are never all there"
_KERNELS = "zimage-lite's own kernels compute; load_pipeline's backend= and compute= choose them"
_SHARED = "load it with load_lora_weights of zimage_lite.diffusers' pipelines, which share this transformer"
_MERGING = "zimage-lite quantize --merge-lora makes a model with it"
REFUSED = {
    **dict.fromkeys(("state_dict", "load_state_dict", "save_pretrained", "push_to_hub", "_apply"), _STREAMED),
    **dict.fromkeys(("enable_layerwise_casting", "enable_gradient_checkpointing", "enable_parallelism"), _STREAMED),
    **dict.fromkeys(("compile", "compile_repeated_blocks", "set_attention_backend", "set_attn_processor"), _KERNELS),
    **dict.fromkeys(("enable_xformers_memory_efficient_attention", "fuse_qkv_projections"), _KERNELS),
    **dict.fromkeys(("load_lora_adapter", "add_adapter"), _SHARED),
    "enable_lora_hotswap": "load several, and choose with set_adapters: adapters come with the weights anyway",
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "save_lora_adapter"), _MERGING),
}
"""Method -> why it cannot be, or what does instead."""

_NAMES = {"_apply": "casting or moving weights"}  # of methods that nobody calls by theirs

# Of a transformer, what ControlNets of diffusers compute with.
_FOR_CONTROLNETS = (
    "t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner",
    "x_pad_token", "cap_pad_token",
)  # fmt: skip


class Evaluations:
    """What the transformer does that pipelines see. placed: that transformer."""

    placed: ZImageTransformer2DModel

    def __init__(self, modules: Modules) -> None:
        self._ours, self.loras = modules, Loras(modules.pipeline.adapters.of)
        for name, why in REFUSED.items():
            setattr(self, name, refusing(name, why))

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        controlnet_block_samples: Hints | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """x: [channels, 1, height, width] each; t: 1 - sigma of each; cap_feats: [tokens, width] each. -> data - noise,
        in the shapes of x. joint_attention_kwargs: `scale`, of all LoRAs."""
        if unknown := [n for n, value in others.items() if value is not None and value != _PATCHES.get(n)]:
            raise UserError(f"the transformer takes no {', '.join(unknown)}")
        more = dict(joint_attention_kwargs or {})
        scale = float(more.pop("scale", 1.0))
        if more:
            raise UserError("joint_attention_kwargs", got=", ".join(more), expected="scale, of LoRAs, and nothing else")
        latents, times = [_latent(one) for one in x], t.float().expand(len(x)).tolist()
        controls = {} if controlnet_block_samples is None else self._controlled(controlnet_block_samples, x)
        asked = Asked(latents, times, cap_feats, self.loras.adapters(scale), **controls)
        sample = [output[:, None] for output in self._ours.denoise(asked)]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Where and in what it computes was chosen by load_pipeline. "cpu", where people put a model that shall give
        the GPU back, gives all memory back. float32 is let through: from_pipe always asks for it. Raises UserError for
        another device or dtype."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = self._ours.pipeline.hardware
        if dtype not in (None, torch.float32, here.dtype):
            raise UserError("to(dtype)", got=dtype, expected=here.dtype, fix="choose with load_pipeline's dtype=")
        if device is None or (device.type == here.device.type and device.index in (None, here.device.index)):
            return self.placed
        if device.type != "cpu":
            raise UserError("to(device)", got=device, expected=here.device, fix="choose with load_pipeline's device=")
        self._ours.close()
        return self.placed

    def enable_group_offload(self, *_: Any, **__: Any) -> None:
        """Nothing to do: blocks are streamed already."""

    def _reset_stateful_cache(self) -> None:
        """What diffusers' pipelines call when they are done."""
        self._ours.close()
        self.loras.forget()

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        self.loras.choose(adapter_names, weights)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        self.loras.choose(adapter_name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self.loras.delete(adapter_names)

    def active_adapters(self) -> list[str]:
        return list(self.loras.active)

    def unload_lora(self) -> None:
        self.loras.clear()

    def disable_lora(self) -> None:
        self.loras.enabled = False

    def enable_lora(self) -> None:
        self.loras.enabled = True

    disable_adapters, enable_adapters = disable_lora, enable_lora

    def _controlled(self, hints: Any, x: Sequence[Tensor]) -> dict[str, Any]:
        if not isinstance(hints, Hints):
            raise UserError(
                "controlnet_block_samples", got=type(hints).__name__, expected="those of zimage_lite's load_controlnet"
            )
        if len(hints.latents) != len(x) or any(a is not b for a, b in zip(hints.latents, x, strict=True)):
            raise UserError("controlnet_block_samples: made for other latents than the transformer gets")
        controls = self._ours.pipeline.controls.of_uses((hints.use,), copies=True)
        return {"controls": controls, "contexts": [hints.contexts]}


def _latent(one: Any) -> Tensor:
    if not isinstance(one, Tensor) or one.ndim != 4 or one.shape[1] != 1:
        got = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
        raise UserError("a latent", got=got, expected="[channels, 1, height, width]")
    return one[:, 0]


class _Absent:
    """Stands where a ControlNet of diffusers looks for weights of the transformer."""

    def __call__(self, *_: Any) -> NoReturn:
        raise UserError(
            "a ControlNet of diffusers computes with the transformer's weights, which come and go here",
            fix="open its file with zimage_lite.diffusers.load_controlnet",
        )

    __rmul__ = __call__


def refusing(name: str, why: str) -> Callable[..., NoReturn]:
    """A method that says so."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{_NAMES.get(name, name)} cannot be done here", fix=why)

    return refuse


def transformer(modules: Modules) -> Any:
    """ours: the modules behind it."""
    own, config, there = Evaluations(modules), modules.pipeline.model.transformer.config, modules.pipeline.hardware
    found: Any = ZImageTransformer2DModel.__new__(ZImageTransformer2DModel)
    nn.Module.__init__(found)
    known = inspect.signature(ZImageTransformer2DModel.__init__).parameters
    found.register_to_config(**{name: value for name, value in asdict(config).items() if name in known})
    # It has no other tensor, and diffusers asks one for dtype and device.
    found.register_buffer("place", torch.empty(0, dtype=there.dtype, device=there.device), persistent=False)
    methods = {name: method for name, method in inspect.getmembers(own, callable) if not name.startswith("__")}
    facts = {"in_channels": config.in_channels, "loras": own.loras, "peft_config": own.loras.named, "ours": modules}
    for name, value in {**methods, **facts, **dict.fromkeys(_FOR_CONTROLNETS, _Absent())}.items():
        setattr(found, name, value)
    own.placed = found
    return found
