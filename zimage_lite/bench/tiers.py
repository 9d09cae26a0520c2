"""The hardware tiers: what a card of each size leaves to a program, beside what kind of machine, and what to try there.

Pure data; importing it loads no torch. Formats are those of about the size that the tier can use: what does not fit is
tried all the same where people would, and stays in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..memory.gpus import GPUS, Gpu, find_gpu
from ..memory.machine import DESKTOP_BYTES

SIZES = (512, 1024, 1536, 2048)  # pixels each way
STEPS = 8

# How a case ends. All stay in the table.
DONE, NO_FIT, OOM, FAILED, NOT_RUN = "done", "does not fit", "out of memory", "failed", "not run"


@dataclass(frozen=True)
class Tier:
    """gpu_name: the card that stands for it; ram_bytes: what the process may hold of the machine's RAM, which is about
    twice that."""

    name: str
    gpu_name: str
    ram_bytes: int
    formats: tuple[str, ...]

    @property
    def gpu(self) -> Gpu:
        return find_gpu(self.gpu_name)

    @property
    def gpus(self) -> list[Gpu]:
        """All in the table with this much memory, the one that stands for them first."""
        return [self.gpu, *(gpu for gpu in GPUS if gpu.vram_gib == self.gpu.vram_gib and gpu != self.gpu)]

    @property
    def vram_bytes(self) -> int:
        """What the desktop leaves of the card. A measurement is held to that, CUDA context included."""
        return self.gpu.vram_bytes - DESKTOP_BYTES


TIERS = {
    tier.name: tier
    for tier in (
        Tier("4gb", "RTX 3050 Laptop 4GB", 8 * 10**9, ("int4", "q4_k_m", "q3_k_m", "int8")),
        Tier("6gb", "RTX 3060 Laptop 6GB", 8 * 10**9, ("int8", "int4", "q4_k_m", "nf4")),
        Tier("8gb", "RTX 4060 Laptop 8GB", 8 * 10**9, ("int8", "int4", "q4_k_m", "q8_0")),
        Tier("12gb", "RTX 3060 12GB", 16 * 10**9, ("int8", "int4", "q8_0", "bf16")),
        Tier("16gb", "RTX 4060 Ti 16GB", 16 * 10**9, ("int8", "int4", "q8_0", "bf16")),
        Tier("24gb", "RTX 4090 24GB", 32 * 10**9, ("int8", "int4", "q8_0", "bf16")),
    )
}


def find_tier(name: str) -> Tier:
    """Raises UserError."""
    if name.lower() not in TIERS:
        raise UserError("--tier", got=name, expected=f"one of {', '.join(TIERS)}")
    return TIERS[name.lower()]
