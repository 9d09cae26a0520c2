"""What is left to chance, as a function of the seed and the step alone: so a training that is taken up again, at
whatever step, draws what it would have drawn, and there is no state to keep."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.training import TrainOptions


@dataclass(frozen=True)
class Draws:
    """pictures: of what is new; preserved: of what is to stay as it was, which come behind those."""

    options: TrainOptions
    pictures: int
    preserved: int = 0

    def chosen(self, step: int) -> list[int]:
        """Whose turn it is. The two kinds take turns; of each every picture comes once, in an order of its own each
        time, before any comes again."""
        turns = range(step * self.options.batch, (step + 1) * self.options.batch)
        if not self.preserved:
            return [self._nth(turn, self.pictures) for turn in turns]
        new = [self._nth(turn // 2, self.pictures) for turn in turns if turn % 2 == 0]
        return new + [self.pictures + self._nth(turn // 2, self.preserved) for turn in turns if turn % 2]

    def sigmas(self, step: int) -> list[float]:
        """Noise levels of the step's pictures, between 0 and 1."""
        random, shift = self._random("sigmas", step), self.options.shift
        if self.options.timesteps == "sigmoid":
            drawn = torch.randn(self.options.batch, generator=random).sigmoid()
        else:
            drawn = torch.rand(self.options.batch, generator=random)
        return (shift * drawn / (1 + (shift - 1) * drawn)).tolist()

    def noises(self, step: int, like: list[Tensor]) -> list[Tensor]:
        """In the shapes of latents, float32, on the CPU."""
        random = self._random("noises", step)
        return [torch.randn(latent.shape, generator=random) for latent in like]

    def _nth(self, turn: int, count: int) -> int:
        epoch, place = divmod(turn, count)
        return int(torch.randperm(count, generator=self._random(f"order of {count}", epoch))[place])

    def _random(self, what: str, number: int) -> torch.Generator:
        """torch takes 32 bits of a seed."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.options.seed} {what} {number}".encode()))
