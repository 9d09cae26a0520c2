"""Joins a skeleton, a checkpoint and a plan: the one place that knows all three.

A component owns its whole budget while it is open and gives everything back when it closes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .checkpoint.stored import StoredTensor
from .config import RuntimeOptions
from .errors import BudgetError
from .memory.hardware import RAM_MARGIN_BYTES, Hardware
from .memory.meter import rss_bytes
from .memory.plan import Plan, plan_blocks
from .memory.streamer import Streamer
from .model.linear import bind, release, shapes
from .model.text_encoder import TextEncoder
from .model.transformer import Transformer
from .model.vae import Decoder
from .quant.tensor import CPU_PIECE_WEIGHTS
from .units import format_gb

CHUNK_WEIGHTS = 2**22
VRAM_MARGIN_BYTES = 300_000_000  # left to the desktop and to the allocator's rounding
ALLOCATOR_SLACK_BYTES = 250_000_000  # freed but not returned to the system: 160 MB at a peak of 6 GB with glibc
CUDA_CONTEXT_BYTES = 500_000_000  # counts against --vram, but is not the allocator's

_OWN_UNPACKING, _GGUF_PY_UNPACKING = 6, 16  # bytes per weight while one is unpacked, its result included


@dataclass(frozen=True)
class Budget:
    """The ceiling of the memory that weights live in, and the flag that sets it."""

    total_bytes: int
    used_bytes: int  # by the process already, and counted against the ceiling
    flag: str


def budget(options: RuntimeOptions, hardware: Hardware) -> Budget:
    """Device memory where there is a GPU of its own, else what the process may hold."""
    if hardware.device.type == "cuda":
        free = hardware.vram_free_bytes - VRAM_MARGIN_BYTES
        given = options.vram_bytes - CUDA_CONTEXT_BYTES if options.vram_bytes else free
        return Budget(min(given, free), torch.cuda.memory_allocated(hardware.device), "--vram")
    used = rss_bytes()
    return Budget(options.ram_bytes or used + hardware.ram_free_bytes - RAM_MARGIN_BYTES, used, "--ram")


@dataclass(frozen=True)
class Loaded:
    """A component ready to run: pass `stream` to its forward pass."""

    stream: Streamer[nn.Module]
    plan: Plan


def open_complete(path: Path, component: str | None = None) -> Checkpoint:
    """Open a checkpoint that has, in the right shape, every tensor `generate` would ask of it. Raises UserError."""
    checkpoint = open_checkpoint(path, component)
    checkpoint.restricted_to(shapes(skeleton(checkpoint)))
    return checkpoint


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model that a checkpoint is for, without weights. Of a VAE only the decoder is ever needed to draw."""
    if checkpoint.component == "vae":
        return nn.ModuleDict({"decoder": Decoder(checkpoint.config)})
    return (Transformer if checkpoint.component == "transformer" else TextEncoder)(checkpoint.config)


@contextmanager
def loaded(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    streamed: tuple[str, ...],
    working_bytes: int,
    hardware: Hardware,
    limit: Budget,
) -> Iterator[Loaded]:
    """Bind the checkpoint to the model's skeleton for the time of the `with` block.

    streamed: the names of the module lists whose blocks may come and go; all else is bound at once and stays.
    working_bytes: what the computation needs beside weights. Raises BudgetError, or UserError for missing tensors.
    """
    wanted = checkpoint.restricted_to(shapes(model))
    lists = {group: model.get_submodule(group) for group in streamed}
    blocks = {f"{group}.{name}": block for group, blocks in lists.items() for name, block in blocks.named_children()}
    rest = {
        name: tensor for name, tensor in wanted.tensors.items() if not name.startswith(tuple(f"{g}." for g in streamed))
    }
    weights = {name: wanted.under(name) for name in blocks}
    fixed = (
        limit.used_bytes
        + working_bytes
        + unpacking_bytes(wanted, hardware.device)
        + _unpacked_bytes(rest, hardware.dtype)
        + (ALLOCATOR_SLACK_BYTES if hardware.device.type == "cpu" else 0)
    )
    plan = plan_blocks(
        checkpoint.component,
        {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in weights.items()},
        fixed,
        limit.total_bytes,
        limit.flag,
    )
    streamer: Streamer[nn.Module] = Streamer(
        plan,
        names={block: name for name, block in blocks.items()},
        load=lambda name, block: read_into(block, weights[name], hardware),
        unload=release,
    )
    try:
        read_into(model, rest, hardware)
        yield Loaded(streamer, plan)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{checkpoint.component}: the GPU ran out of memory",
            got=f"{limit.flag} {format_gb(limit.total_bytes)}",
            fix="name a smaller --vram, a smaller image or a smaller format",
        ) from error
    finally:
        release(model)
        if hardware.device.type == "cuda":
            torch.cuda.empty_cache()


def read_into(module: nn.Module, tensors: Mapping[str, StoredTensor], hardware: Hardware) -> None:
    """Read the tensors from their files and bind them to the module on the device."""
    bind(module, {name: stored.read().to(hardware.device) for name, stored in tensors.items()}, hardware.dtype)


def unpacking_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """The most that unpacking one weight takes for a moment."""
    most = CPU_PIECE_WEIGHTS if device.type == "cpu" else math.inf
    peaks = [
        min(tensor.rows * tensor.columns, most) * (_OWN_UNPACKING if tensor.format.writable else _GGUF_PY_UNPACKING)
        for tensor in checkpoint.tensors.values()
    ]
    return int(max(peaks, default=0))


def raise_if_damaged(checkpoint: Checkpoint) -> None:
    """Read every weight once, in pieces, and raise UserError naming the first tensor that holds NaN or infinity.

    Called when a result is not finite: looking at all weights beforehand would read 12 GB for nothing.
    """
    for tensor in checkpoint.tensors.values():
        step = max(CHUNK_WEIGHTS // tensor.columns, 1)
        for start in range(0, tensor.rows, step):
            tensor.read_float(start, min(start + step, tensor.rows))


def _unpacked_bytes(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    return sum(tensor.rows * tensor.columns * dtype.itemsize for tensor in tensors.values())
