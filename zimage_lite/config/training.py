"""How a LoRA is trained. Defaults are those that users of several trainers found to work for this model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UserError
from .limits import SIZE_MULTIPLE

TIMESTEPS = ("sigmoid", "uniform")
OPTIMIZERS = ("adamw", "adamw8bit")
RATES = ("constant", "cosine")
_MOST_RANK, _MOST_RESOLUTION = 512, 2048


@dataclass(frozen=True)
class TrainOptions:
    """resolution: pictures are brought to about its square in pixels, and never enlarged. timesteps: how noise levels
    are drawn: sigmoid(N(0, 1)), the middle ones most often, or all alike; shift: then moves them towards noise, as that
    of a schedule does. rate_schedule: cosine falls to nothing at the last step. batch: pictures a step. trigger: a word
    that every caption gets in front, unless it is there. preserve_weight: in the loss, of what is to stay."""

    steps: int = 2000
    rank: int = 16
    rate: float = 1e-4
    batch: int = 1
    resolution: int = 512
    timesteps: str = "sigmoid"
    shift: float = 1.0
    rate_schedule: str = "constant"
    optimizer: str = "adamw"
    seed: int = 0
    trigger: str = ""
    preserve_weight: float = 4.0

    def __post_init__(self) -> None:
        self._require("steps", 1 <= self.steps <= 10**6, "1 to a million")
        self._require("rank", 1 <= self.rank <= _MOST_RANK, f"1 to {_MOST_RANK}")
        self._require("rate", 0 < self.rate <= 1, "above 0, such as 1e-4")
        self._require("rate_schedule", self.rate_schedule in RATES, f"one of {', '.join(RATES)}")
        self._require("batch", 1 <= self.batch <= 256, "1 to 256")
        within = SIZE_MULTIPLE <= self.resolution <= _MOST_RESOLUTION and self.resolution % SIZE_MULTIPLE == 0
        self._require("resolution", within, f"a multiple of {SIZE_MULTIPLE} up to {_MOST_RESOLUTION}")
        self._require("timesteps", self.timesteps in TIMESTEPS, f"one of {', '.join(TIMESTEPS)}")
        self._require("shift", 0 < self.shift <= 100, "above 0, up to 100")
        self._require("preserve_weight", 0 < self.preserve_weight <= 10**4, "above 0, such as 4")
        self._require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._require("seed", 0 <= self.seed < 2**31, "0 to 2147483647")

    def rate_at(self, step: int) -> float:
        """step: from 0."""
        if self.rate_schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')}", got=getattr(self, name), expected=expected)
