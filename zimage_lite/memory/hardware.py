"""What the machine has: the device to compute on, and the memory that is free now."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ..errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

RAM_MARGIN_BYTES = 500_000_000  # left to the rest of the system when no --ram is given


@dataclass(frozen=True)
class Hardware:
    """Where to compute, in what, and how much memory is free. vram_free_bytes is 0 where there is no GPU."""

    device: torch.device
    dtype: torch.dtype
    ram_free_bytes: int
    vram_free_bytes: int = 0


def probe(device: str = "auto", dtype: str = "auto") -> Hardware:
    """device, dtype: as in config.DEVICES and DTYPES. An explicit device that is not there raises UserError."""
    chosen = _choose_device(device)
    free = psutil.virtual_memory().available
    vram = torch.cuda.mem_get_info(chosen)[0] if chosen.type == "cuda" else 0
    return Hardware(chosen, _DTYPES[dtype] if dtype != "auto" else _best_dtype(chosen), free, vram)


def _choose_device(name: str) -> torch.device:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no such device",
            fix="use --device cpu, or install the torch build for your GPU",
        )
    return torch.device(name)


def _best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where CUDA has it in hardware, else float16, which model/float16.py keeps finite."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
