"""What is read of a training's state is nowhere tied to its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from zimage_lite.train.optimizer import AdamW
from zimage_lite.train.state import Done, load_state, save_state


class Lora:
    """A stand-in: of one tensor."""

    def __init__(self, value: float) -> None:
        self.own = torch.full((300, 300), value)

    def state(self) -> dict[str, Tensor]:
        return {"a": self.own}

    def load(self, state: dict[str, Tensor]) -> None:
        self.own.copy_(state["a"])


class Keeping:
    """As bitsandbytes' optimizers: what is loaded becomes its own, as it is."""

    name = "state1"

    def __init__(self, value: float) -> None:
        self.state: dict[str, Any] = {"state": {0: {"state1": torch.full((300, 300), value)}}, "param_groups": []}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Ours(AdamW):
    name = "mean"

    def __init__(self, value: float) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(300, 300))], 1e-4)
        self.moments[0][0].fill_(value)


@pytest.mark.parametrize("made", [Ours, Keeping])
def test_the_file_is_not_mapped_afterwards(made: Any, tmp_path: Path) -> None:
    """Windows replaces no file that is, and the next save is due."""
    path, lora, optimizer = tmp_path / "state.safetensors", Lora(0), made(0)
    save_state(path, Done({}, [1.0]), Lora(1), made(2))
    assert load_state(path, {}, lora, optimizer).losses == [1.0]
    (kept,) = optimizer.state_dict()["state"].values()
    assert lora.own[0, 0] == 1 and kept[made.name][0, 0] == 2
    mapped = getattr(psutil.Process(), "memory_maps", list)()  # none on macOS
    assert not [one for one in mapped if one.path == str(path)]
