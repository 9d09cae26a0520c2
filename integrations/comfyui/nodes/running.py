"""How our work and ComfyUI's share the machine: memory, progress, the button that stops."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management as management
from comfy.utils import ProgressBar
from PIL import Image

if TYPE_CHECKING:
    from zimage_lite.checkpoint.model_files import ModelFiles
    from zimage_lite.pipeline.denoise import Step

PREVIEW_PIXELS = 512  # the longest side that is sent

log = logging.getLogger("zimage-lite")


@contextmanager
def alone() -> Iterator[None]:
    """ComfyUI's models leave the GPU before, so that a plan sees what there is; what was ours leaves it after."""
    management.unload_all_models()
    _give_back()
    try:
        yield
    finally:
        _give_back()


def make_room(n_bytes: int) -> None:
    """ComfyUI's models leave the GPU until so much is free, less what it keeps for itself."""
    management.free_memory(n_bytes + management.minimum_inference_memory(), management.get_torch_device())


def _give_back() -> None:
    gc.collect()
    management.soft_empty_cache()


class Watch:
    """Shows the steps of a drawing and what it has in mind. Its methods raise what stops it, once that is asked for."""

    def __init__(self, model: ModelFiles) -> None:
        from zimage_lite.pipeline.previews import previewer

        self.bar, self.preview = ProgressBar(1), previewer(model)

    def progress(self, phase: str, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        if phase == "denoise":
            self.bar.update_absolute(done, total)

    def on_step(self, step: Step) -> None:
        picture = Image.fromarray(self.preview(step.x0).numpy())
        self.bar.update_absolute(self.bar.current, preview=("JPEG", picture, PREVIEW_PIXELS))


class Notes(list[str]):
    """Lines for the user: in the log as they come, and together where a node returns them."""

    def tell(self, line: str) -> None:
        self.append(line)
        log.info("zimage-lite: %s", line)
