"""Joins a skeleton, a checkpoint and a plan: the one place that knows all three.

A component owns its whole budget while it is open and gives everything back when it closes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from .checkpoint.checkpoint import Checkpoint, open_checkpoint
from .checkpoint.container import Take, fresh
from .checkpoint.stored import StoredTensor
from .config import RuntimeOptions
from .errors import BudgetError
from .memory.arena import Arena, aligned
from .memory.hardware import RAM_MARGIN_BYTES, Hardware
from .memory.machine import CUDA_CONTEXT_BYTES, VRAM_MARGIN_BYTES
from .memory.meter import rss_bytes
from .memory.plan import Placement, plan_blocks
from .memory.streamer import Streamer
from .model.linear import bind, release, shapes
from .model.text_encoder import TextEncoder
from .model.transformer import Transformer
from .model.vae import Decoder
from .quant.tensor import CPU_PIECE_WEIGHTS
from .units import format_gb

CHUNK_WEIGHTS = 2**22
ALLOCATOR_SLACK_BYTES = 250_000_000  # activations that were freed but not returned to the system

_OWN_UNPACKING, _GGUF_PY_UNPACKING = 6, 16  # bytes per weight while one is unpacked, its result included


@dataclass(frozen=True)
class Budget:
    """The ceiling of the memory that weights live in, and what sets it: a flag, or what the machine has."""

    total_bytes: int
    used_bytes: int  # by the process already, and counted against the ceiling
    limit: str


def budget(options: RuntimeOptions, hardware: Hardware) -> Budget:
    """Device memory where there is a GPU of its own, else what the process may hold. Never more than is free."""
    if hardware.device.type == "cuda":
        used = CUDA_CONTEXT_BYTES + torch.cuda.memory_allocated(hardware.device)
        given, flag, kind = options.vram_bytes, "--vram", "the free GPU memory"
        most = used + hardware.vram_free_bytes - VRAM_MARGIN_BYTES
    else:
        used = rss_bytes()
        given, flag, kind = options.ram_bytes, "--ram", "the free memory"
        most = used + hardware.ram_free_bytes - RAM_MARGIN_BYTES
    return Budget(given, used, flag) if given and given <= most else Budget(most, used, kind)


def host_spare_bytes(options: RuntimeOptions, hardware: Hardware) -> int:
    """Memory that can hold what the device cannot. None where the device computes in the host's own memory."""
    if hardware.device.type != "cuda":
        return 0
    free = hardware.ram_free_bytes - RAM_MARGIN_BYTES
    return max(min(free, options.ram_bytes - rss_bytes()) if options.ram_bytes else free, 0)


@dataclass(frozen=True)
class Loaded:
    """A component ready to run: pass `stream` to its forward pass."""

    stream: Streamer[nn.Module]
    plan: Placement


def open_complete(path: Path, component: str | None = None, file_bytes: Mapping[Path, int] | None = None) -> Checkpoint:
    """Open a checkpoint that has, in the right shape, every tensor `generate` would ask of it. Raises UserError.

    file_bytes: as in `open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, component, file_bytes)
    checkpoint.restricted_to(shapes(skeleton(checkpoint)))
    return checkpoint


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model that a checkpoint is for, without weights. Of a VAE only the decoder is ever needed to draw."""
    if checkpoint.component == "vae":
        return nn.ModuleDict({"decoder": Decoder(checkpoint.config)})
    return (Transformer if checkpoint.component == "transformer" else TextEncoder)(checkpoint.config)


@dataclass(frozen=True)
class Component:
    """A model's skeleton and its weights, taken apart: the blocks of the module lists named in `streamed` may come and
    go, the rest stays. working_bytes: what the computation needs beside weights. Raises UserError for missing tensors.
    """

    model: nn.Module
    checkpoint: Checkpoint
    streamed: tuple[str, ...]
    working_bytes: int

    @cached_property
    def wanted(self) -> Checkpoint:
        return self.checkpoint.restricted_to(shapes(self.model))

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        lists = {group: self.model.get_submodule(group) for group in self.streamed}
        return {f"{group}.{name}": block for group, blocks in lists.items() for name, block in blocks.named_children()}

    @cached_property
    def weights(self) -> dict[str, dict[str, StoredTensor]]:
        """Those of each block."""
        return {name: self.wanted.under(name) for name in self.blocks}

    @cached_property
    def rest(self) -> dict[str, StoredTensor]:
        groups = tuple(f"{group}." for group in self.streamed)
        return {name: tensor for name, tensor in self.wanted.tensors.items() if not name.startswith(groups)}

    def block_bytes(self) -> dict[str, int]:
        """What each block takes in an arena."""
        return {
            name: sum(aligned(n_bytes) for tensor in tensors.values() for n_bytes in tensor.part_bytes())
            for name, tensors in self.weights.items()
        }

    def fixed_bytes(self, hardware: Hardware, limit: Budget) -> int:
        """What is held beside the blocks."""
        return (
            limit.used_bytes
            + self.working_bytes
            + unpacking_bytes(self.wanted, hardware.device)
            + _unpacked_bytes(self.rest, hardware.dtype)
            + (ALLOCATOR_SLACK_BYTES if hardware.device.type == "cpu" else 0)
        )

    def least_bytes(self, hardware: Hardware, limit: Budget) -> int:
        """With one block at a time."""
        return self.fixed_bytes(hardware, limit) + max(self.block_bytes().values(), default=0)

    def plan(self, hardware: Hardware, limit: Budget) -> Placement:
        """Raises BudgetError."""
        fixed = self.fixed_bytes(hardware, limit)
        return plan_blocks(self.checkpoint.component, self.block_bytes(), fixed, limit.total_bytes, limit.limit)


@contextmanager
def loaded(component: Component, hardware: Hardware, limit: Budget) -> Iterator[Loaded]:
    """Bind the weights to the model for the time of the `with` block. Raises BudgetError."""
    plan, model = component.plan(hardware, limit), component.model
    streamer: Streamer[nn.Module] = Streamer(
        plan,
        names={block: name for name, block in component.blocks.items()},
        load=_loader(component, plan, hardware),
        unload=release,
    )
    try:
        read_into(model, component.rest, hardware)
        yield Loaded(streamer, plan)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{component.checkpoint.component}: the GPU ran out of memory",
            got=f"{limit.limit} of {format_gb(limit.total_bytes)}",
            fix="name a smaller --vram, a smaller image or a smaller format",
        ) from error
    finally:
        release(model)
        if hardware.device.type == "cuda":
            torch.cuda.empty_cache()


def _loader(component: Component, plan: Placement, hardware: Hardware) -> Callable[[str, nn.Module], None]:
    """Reads blocks: those that stay into an arena of their own, the others, and all that go on to another device, into
    one slot."""
    sizes = component.block_bytes()
    staying = plan.resident if hardware.device.type == "cpu" else frozenset[str]()
    resident = Arena(sum(sizes[name] for name in staying))
    slot = Arena(max((size for name, size in sizes.items() if name not in staying), default=0))

    def load(name: str, block: nn.Module) -> None:
        slot.clear()
        take = resident.take if name in staying else slot.take
        read_into(block, component.weights[name], hardware, take)

    return load


def read_into(module: nn.Module, tensors: Mapping[str, StoredTensor], hardware: Hardware, into: Take = fresh) -> None:
    """Read the tensors from their files, into memory that `into` gives, and bind them to the module on the device."""
    packed = {name: stored.read(into=into).to(hardware.device) for name, stored in tensors.items()}
    bind(module, packed, hardware.dtype)


def unpacking_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """The most that unpacking one weight takes for a moment."""
    peaks = [
        (tensor.piece_rows(CPU_PIECE_WEIGHTS) if device.type == "cpu" else tensor.rows)
        * tensor.columns
        * (_OWN_UNPACKING if tensor.format.writable else _GGUF_PY_UNPACKING)
        for tensor in checkpoint.tensors.values()
    ]
    return int(max(peaks, default=0))


def raise_if_damaged(checkpoint: Checkpoint) -> None:
    """Read every weight once, in pieces, and raise UserError naming the first tensor that holds NaN or infinity.

    Called when a result is not finite: looking at all weights beforehand would read 12 GB for nothing.
    """
    for tensor in checkpoint.tensors.values():
        step = tensor.piece_rows(CHUNK_WEIGHTS)
        for start in range(0, tensor.rows, step):
            tensor.read_float(start, min(start + step, tensor.rows))


def _unpacked_bytes(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    return sum(tensor.rows * tensor.columns * dtype.itemsize for tensor in tensors.values())
