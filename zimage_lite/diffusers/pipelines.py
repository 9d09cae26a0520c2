"""diffusers' five pipelines of Z-Image around our models, and what of a pipeline concerns weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from os import PathLike, fspath
from typing import Any, NoReturn

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..api import StrPath, load
from ..checkpoint.model_card import DEMO
from ..errors import UserError
from ..pipeline.drawing import Pipeline
from ..pipeline.modules import Modules
from .encoders import TextEncoder, Vae, tokenizer
from .loras import Loras
from .transformer import REFUSED, refusing, transformer

_LOG = logging.getLogger("zimage_lite")
_WHOLE = {"low_cpu_mem_usage", "use_safetensors"}  # said of loading, and always so here


def load_pipeline(model: StrPath = DEMO, **options: Any) -> ZImagePipeline:
    """A pipeline of diffusers around a model in any format that zimage-lite reads; the others are made of it by their
    `from_pipe`. options: as of `zimage_lite.load`: vram, ram, dtype, device and so on. Raises UserError.

    Nothing is loaded before the first call, and nothing stays loaded after one. Notes, also on what of a LoRA is
    applied, go to the logger "zimage_lite" as information, or to `tell`.
    """
    made = load(model, **{"tell": _LOG.info, **options})
    if made.model.sees:
        raise UserError(
            f"{made.model.name}: Omni is not put into diffusers' pipelines", fix="draw with zimage_lite.load"
        )
    modules = Modules(made)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=made.model.scheduler.shift),
        vae=Vae(modules),
        text_encoder=TextEncoder(modules),
        tokenizer=tokenizer(made.model.tokenizer),
        transformer=transformer(modules),
    )


def _ending(call: Callable[..., Any]) -> Callable[..., Any]:
    """As it is, with all memory given back however it ends."""

    @wraps(call)
    def ended(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules: Modules = self.transformer.ours
        modules.denoiser.ahead = lambda: ((1000 - self.scheduler.timesteps.float()) / 1000).tolist()
        try:
            return call(self, *args, **kwargs)
        finally:
            modules.denoiser.ahead = tuple
            modules.close()

    return ended


class _Ours:
    """What of a pipeline concerns weights."""

    transformer: Any

    @property
    def _loras(self) -> Loras:
        return self.transformer.loras

    @property
    def zimage_lite(self) -> Pipeline:
        """Ours: its `plans` and its `meter` tell what was planned and used."""
        return self.transformer.ours.pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers' own, which would ask for float32 where no dtype is named. Raises UserError."""
        if not hasattr(pipeline.transformer, "ours"):
            what = f"{cls.__name__}.from_pipe: a pipeline with models of diffusers"
            raise UserError(what, fix="start from the one that load_pipeline gives")
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.transformer.dtype)
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("silence_dtype_warnings", None)
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, self.transformer.dtype):  # the transformer itself lets float32 through
            expected, fix = self.transformer.dtype, "choose with load_pipeline's dtype="
            raise UserError("to(dtype)", got=dtype, expected=expected, fix=fix)
        self.transformer.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Nothing to do: each model has the whole budget while it runs, and is closed after it."""
        _LOG.info("offloading: nothing to do; load_pipeline's vram= and ram= say how much may be used")

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | PathLike[str], adapter_name: str | None = None,
        weight_name: str | None = None, subfolder: str | None = None, **others: Any,
    ) -> None:  # fmt: skip
        """A LoRA or its kin as any trainer writes it: a file, a PEFT folder, or OWNER/NAME of the Hub; weight_name: of
        the file in a folder or on the Hub. It is on at strength 1, alone. Raises UserError."""
        if unknown := [n for n, value in others.items() if value not in (None, False) and n not in _WHOLE]:
            raise UserError(f"load_lora_weights takes no {', '.join(unknown)}")
        path = pretrained_model_name_or_path_or_dict
        if isinstance(path, dict):
            raise UserError("load_lora_weights: a dict of tensors", fix="save it with safetensors, and name the file")
        parts = [part for part in (fspath(path), subfolder, weight_name) if part]
        self._loras.load("/".join(parts) if len(parts) > 1 else parts[0], adapter_name)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """These are on, and no others. adapter_weights: of each, or of all; 1 if none is named."""
        self._loras.choose(adapter_names, adapter_weights)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self._loras.delete(adapter_names)

    def get_active_adapters(self) -> list[str]:
        return self.transformer.active_adapters()

    def get_list_adapters(self) -> dict[str, list[str]]:
        return {"transformer": list(self._loras.named)} if self._loras.named else {}

    def unload_lora_weights(self) -> None:
        self._loras.clear()

    def disable_lora(self) -> None:
        self.transformer.disable_lora()

    def enable_lora(self) -> None:
        self.transformer.enable_lora()

    def set_lora_device(self, *_: Any, **__: Any) -> None:
        """Nothing to do: they are read with the weights that they change."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            f"{cls.__name__}.from_pretrained cannot be done here",
            fix="open a model with zimage_lite.diffusers.load_pipeline",
        )

    from_single_file = from_pretrained


for _name in ("fuse_lora", "unfuse_lora", "save_pretrained", "push_to_hub", "enable_lora_hotswap"):
    setattr(_Ours, _name, refusing(_name, REFUSED[_name]))


class ZImagePipeline(_Ours, diffusers.ZImagePipeline):
    __call__ = _ending(diffusers.ZImagePipeline.__call__)


class ZImageImg2ImgPipeline(_Ours, diffusers.ZImageImg2ImgPipeline):
    __call__ = _ending(diffusers.ZImageImg2ImgPipeline.__call__)


class ZImageInpaintPipeline(_Ours, diffusers.ZImageInpaintPipeline):
    __call__ = _ending(diffusers.ZImageInpaintPipeline.__call__)


class ZImageControlNetPipeline(_Ours, diffusers.ZImageControlNetPipeline):
    __call__ = _ending(diffusers.ZImageControlNetPipeline.__call__)


class ZImageControlNetInpaintPipeline(_Ours, diffusers.ZImageControlNetInpaintPipeline):
    __call__ = _ending(diffusers.ZImageControlNetInpaintPipeline.__call__)
