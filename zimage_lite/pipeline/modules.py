"""Our models as functions, for programs that have a loop of their own: the text encoder, the transformer, the VAE.

One of them is open at a time and has the whole budget, as in a Pipeline. Encoder and VAE are closed when they return;
the transformer stays open from one evaluation to the next, until another is asked for or all is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import VAE_FACTOR
from ..memory.failures import Clearing
from ..memory.plan import Plan
from ..plan.job import Job
from .denoiser import Asked, Denoiser
from .drawing import Pipeline
from .encode import Prompt
from .workspace import WaysOn

_FLOAT_BYTES = 3 * 4  # of a pixel


class Modules:
    """pipeline: says where and within what they run; its `meter` and `plans` tell what they used."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.denoiser = pipeline, Denoiser(pipeline)

    def encode(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """-> the embedding of each: [tokens, width] on the CPU. Kept ones are not computed again."""
        self.close()
        return [embedding.clone() for embedding in self.pipeline.encode(prompts)]  # no inference tensors

    def denoise(self, asked: Asked) -> list[Tensor]:
        """As `Denoiser`."""
        return self.denoiser(asked)

    @torch.no_grad()
    def moments(self, images: Sequence[Tensor]) -> list[Tensor]:
        """images: [3, height, width] in [-1, 1], of one size. -> moments of the posterior of each, as of
        `vae.Encoder.forward`, float32 on the CPU."""
        phase, job = self.pipeline.encoding_pictures, _job(images, 1)
        return self._through(phase.ways(job), partial(phase.moments, images))

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """latents: [channels, height, width] each, of one size, as the transformer leaves them. -> images
        [3, 8 height, 8 width], about [-1, 1], float32 on the CPU."""
        phase, job = self.pipeline.decoding, _job(latents, VAE_FACTOR)
        return self._through(phase.ways(job), partial(phase.run, latents, finish=Tensor.float))

    def close(self) -> None:
        """Give all memory back."""
        self.denoiser.close()

    def _through(self, ways: WaysOn, run: Callable[[int, Plan], Iterator[Tensor]]) -> list[Tensor]:
        """Plan a phase, and run it."""
        self.close()
        planning = self.pipeline.work.planning
        with Clearing(self.pipeline.release):
            (planned,) = planning.planned([ways])
            return list(planning.within(planned, run))


def _job(images: Sequence[Tensor], factor: int) -> Job:
    """factor: pixels of the image for each of theirs. Finished ones wait in float32."""
    height, width = (factor * side for side in images[0].shape[1:])
    count = len(images)
    return Job(width, height, images=count, pictures=count, held_bytes=_FLOAT_BYTES * count * width * height)
