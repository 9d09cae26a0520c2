"""A ControlNet for diffusers' pipelines. It says what it was asked for, and the transformer runs it beside its own
blocks, by diffusers' mathematics: so both stream in one order, within one plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from ..config import ControlConfig, ControlUse
from ..errors import UserError
from ..pipeline.controls import open_control


@dataclass(frozen=True)
class Hints:
    """What a ControlNet is to add to one evaluation. latents: of that evaluation; contexts: what it sees of each,
    [channels, height, width]."""

    use: ControlUse
    latents: Sequence[Tensor]
    contexts: Sequence[Tensor]


class ControlNet:
    """path: a file or a folder. config: what diffusers asks for is `control_in_dim`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.config: ControlConfig = open_control(path).config

    def __call__(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        control_context: Iterable[Tensor],
        conditioning_scale: float = 1.0,
        patch_size: int = 2,
        f_patch_size: int = 1,
    ) -> Hints:
        """As of diffusers' ZImageControlNetModel, and taken by our transformer alone."""
        if (patch_size, f_patch_size) != (2, 1):
            raise UserError("patch sizes", got=(patch_size, f_patch_size), expected="2 and 1")
        return Hints(ControlUse(self.path, conditioning_scale), list(x), [context[:, 0] for context in control_context])


def load_controlnet(path: str | PathLike[str]) -> Any:
    """Open a ControlNet of the Fun Union family, in any format: `controlnet=` of the pipelines. Raises UserError."""
    return ControlNet(fspath(path))
