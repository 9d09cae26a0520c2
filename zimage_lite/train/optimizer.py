"""AdamW (Loshchilov and Hutter, 2019), in place. torch's own loads its compiler first: 150 MB and some seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..config import TrainOptions
from ..errors import UserError

WEIGHT_DECAY = 1e-4
_MISSING = "--optimizer adamw8bit needs bitsandbytes"
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # torch's own


class Optimizer(Protocol):
    """As torch's are used. param_groups: one, whose "lr" is the rate."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class AdamW:
    """Its moments are there from the beginning, so that no step needs more memory than the first."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        self.parameters, self.done = parameters, 0
        self.param_groups: list[dict[str, Any]] = [{"lr": rate}]
        self.moments = [(torch.zeros_like(own), torch.zeros_like(own)) for own in parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for own in self.parameters:
            if own.grad is not None and not set_to_none:
                own.grad.zero_()
            else:
                own.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.done += 1
        rate = self.param_groups[0]["lr"]
        size, root = rate / (1 - _BETA1**self.done), math.sqrt(1 - _BETA2**self.done)
        for own, (mean, square) in zip(self.parameters, self.moments, strict=True):
            assert own.grad is not None
            own.mul_(1 - rate * WEIGHT_DECAY)
            mean.lerp_(own.grad, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(own.grad, own.grad, value=1 - _BETA2)
            own.addcdiv_(mean, square.sqrt().div_(root).add_(_EPS), value=-size)

    def state_dict(self) -> dict[str, Any]:
        names = ("mean", "square")
        return {
            "state": {
                i: {"done": self.done, **dict(zip(names, own, strict=True))} for i, own in enumerate(self.moments)
            },
            "param_groups": [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for number, kept in state_dict["state"].items():
            self.done = int(kept["done"])
            for own, name in zip(self.moments[number], ("mean", "square"), strict=True):
                own.copy_(cast(Tensor, kept[name]))


def require_optimizer(name: str) -> None:
    """Raise UserError for one that is not installed. Loads nothing."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError(_MISSING, got="none", fix="pip install bitsandbytes, or use --optimizer adamw")


def optimizer_for(options: TrainOptions, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Raises UserError."""
    if options.optimizer == "adamw":
        return AdamW(parameters, options.rate)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:
        raise UserError(_MISSING, got=f"one that cannot be loaded ({error})", fix="use --optimizer adamw") from error
    return cast(Optimizer, AdamW8bit(parameters, options.rate, weight_decay=WEIGHT_DECAY))
