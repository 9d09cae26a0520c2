"""A training as far as it is: the LoRA, its optimizer, the losses. Whole in one file, or not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.reading import TRAINING_KEY
from ..checkpoint.output import replacing
from ..errors import FileFormatError, UserError
from .lora import TrainedLora
from .optimizer import AdamW, Optimizer

_LORA, _OPTIMIZER, _LOSSES = "lora.", "optimizer.", "losses"


@dataclass
class Done:
    """losses: of all steps that are done. settings: what a training that goes on must find again, as JSON."""

    settings: Mapping[str, Any]
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """How many are done."""
        return len(self.losses)


def save_state(path: Path, done: Done, lora: TrainedLora, optimizer: Optimizer) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, numbers = _optimizer_state(optimizer)
    tensors |= {_LORA + name: tensor for name, tensor in lora.state().items()}
    tensors[_LOSSES] = torch.tensor(done.losses, dtype=torch.float64)
    metadata = {TRAINING_KEY: json.dumps({"settings": done.settings, "numbers": numbers})}
    with replacing(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # says in words alone what the system said: "... (os error 28)"
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def load_state(path: Path, settings: Mapping[str, Any], lora: TrainedLora, optimizer: Optimizer) -> Done:
    """Puts the LoRA and the optimizer where they were. Raises UserError if it was another training."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            said = json.loads((file.metadata() or {})[TRAINING_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileFormatError(f"{path}: not the state of a training", fix="begin anew with --overwrite") from error
    _require_same(said["settings"], settings)
    lora.load({name.removeprefix(_LORA): value for name, value in tensors.items() if name.startswith(_LORA)})
    _load_optimizer(optimizer, tensors, said["numbers"])
    return Done(settings, tensors[_LOSSES].tolist())


def _require_same(began: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings that are not what it began with. Steps, of which a falling rate follows, come last:
    they are there because of the schedule."""
    for name in sorted(began, key="steps".__eq__):
        got = settings.get(name)
        if got != began[name]:
            why = "; with --rate-schedule cosine the rate follows from the steps" if name == "steps" else ""
            raise UserError(
                f"--resume: {name} is not what this training began with{why}", got=got, expected=began[name],
                fix="take it up as it was, or begin anew with --overwrite",
            )  # fmt: skip


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What it keeps of each parameter: tensors, "optimizer.3.exp_avg", and other numbers, "3.step"."""
    tensors, numbers = dict[str, Tensor](), dict[str, Any]()

    def put(path: str, value: object) -> None:
        if isinstance(value, dict):  # bitsandbytes nests what it keeps in 8 bits
            for name, inner in value.items():
                put(f"{path}.{name}", inner)
        elif isinstance(value, Tensor):
            tensors[_OPTIMIZER + path] = value.detach().cpu().clone()  # some share one table
        else:
            numbers[path] = value

    for index, kept in optimizer.state_dict()["state"].items():
        put(str(index), kept)
    return tensors, numbers


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    state = dict[int, Any]()
    kept = {name.removeprefix(_OPTIMIZER): value for name, value in tensors.items() if name.startswith(_OPTIMIZER)}
    for path, value in [*kept.items(), *numbers.items()]:
        index, *outer, own = path.split(".")
        place = state.setdefault(int(index), {})
        for name in outer:
            place = place.setdefault(name, {})
        # Ours copies it. bitsandbytes keeps it, which is a part of the mapped file, and Windows replaces none that is.
        place[own] = value.clone() if isinstance(value, Tensor) and not isinstance(optimizer, AdamW) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
