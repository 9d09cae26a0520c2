"""What a machine can do and hold, as plain numbers: the planner's only idea of hardware.

None of the constants below was measured on the laptops they are for. They are what others measured on similar ones:
a bf16 Z-Image step at 88 % of an RTX 3090's peak, 4-bit ones at 40-60 %, int8 Triton products at 48 % of a far larger
GPU's, int8 attention at 60-70 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import FLOAT16_SUMS
from .gpus import Gpu

CUDA_CONTEXT_BYTES = 540_000_000  # counts against --vram, but not as tensors; with cuBLAS's workspace of 8 to 32 MiB
VRAM_MARGIN_BYTES = 300_000_000  # left to the desktop and to the allocator's rounding
WINDOWS_MARGIN = 0.08  # of the card, if that is more: its desktop grows, and what does not fit spills without a word
# What torch's allocator may take beyond its tensors: cuBLAS's workspace, and the ends of segments of 20 MiB. Taken
# to be part of what is assumed for the context; tools/gpu_check.sh measures both.
ALLOCATOR_ROUNDING_BYTES = 100_000_000
DESKTOP_BYTES = 300_000_000  # what other programs hold of a GPU that nobody has asked
PROCESS_BYTES = 1_200_000_000  # Python, torch with its CUDA libraries, and what the driver keeps in RAM: assumed

EFFICIENCY_16 = 0.88
EFFICIENCY_8 = 0.6
EFFICIENCY_ATTENTION = 0.65
EFFICIENCY_MEMORY = 0.8

DISK_GBPS = 2.5  # an NVMe drive of a laptop, large reads
HOST_COPY_GBPS = 6.0  # from pageable memory into a pinned buffer
CPU_TFLOPS = 0.3  # float32, eight cores of a laptop; the two of our own machine reach 0.15
CPU_MEMORY_GBPS = 40.0
LAUNCH_MS = 0.005  # of a kernel, where nothing hides it
COPY_OVERHEAD_MS = 0.02


@dataclass(frozen=True)
class Work:
    """What one block computes in one pass. traffic_bytes: what it reads and writes beside its products: activations,
    and weights that are unpacked first. int8: on 8-bit matrix units, its attention, too. host_bytes: what goes between
    the device and pageable memory, and nothing hides. launches: of kernels; about 20 for a transformer block.
    other_flops: on the CPU, what is no product takes as long as so many operations of one."""

    linear_flops: float
    attention_flops: float = 0.0
    traffic_bytes: float = 0.0
    int8: bool = False
    host_bytes: float = 0.0
    launches: int = 20
    other_flops: float = 0.0


@dataclass(frozen=True)
class Processor:
    """Rates that are really reached, in tera-operations per second. unfused8: the sums of 8-bit products pass through
    memory."""

    linear16: float
    linear8: float
    attention16: float
    attention8: float
    memory_gbps: float
    unfused8: bool = False

    def milliseconds(self, work: Work) -> float:
        linear = work.linear_flops / (self.linear8 if work.int8 else self.linear16)
        attention = work.attention_flops / (self.attention8 if work.int8 else self.attention16)
        other = work.other_flops / self.linear16
        return (
            (linear + attention + other) / 1e9 + work.traffic_bytes / self.memory_gbps / 1e6 + work.launches * LAUNCH_MS
        )


CPU = Processor(CPU_TFLOPS, CPU_TFLOPS, CPU_TFLOPS, CPU_TFLOPS, CPU_MEMORY_GBPS)


@dataclass(frozen=True)
class Machine:
    """gpu: None where there is none; vram_free_bytes: before this process took any. *_dtype: to compute in, "bf16",
    "fp16" or "fp32". cpu_int8: the CPU multiplies weights of integers in 8 bits, re-encoded if need be. loops_bytes:
    what the compiled loops for that will take; 0 if they are loaded. pinned_limit_bytes: Windows lets about half of the
    RAM be pinned. context_bytes, process_bytes: of the GPU's memory and the RAM, what this process holds before a plan
    begins."""

    name: str
    ram_free_bytes: int
    vram_free_bytes: int = 0
    gpu: Processor | None = None
    cpu: Processor = CPU
    link_gbps: float = 12.5
    disk_gbps: float = DISK_GBPS
    host_copy_gbps: float = HOST_COPY_GBPS
    pinned_limit_bytes: int | None = None
    context_bytes: int = CUDA_CONTEXT_BYTES
    margin_bytes: int = VRAM_MARGIN_BYTES
    process_bytes: int = PROCESS_BYTES
    gpu_dtype: str = "bf16"
    cpu_dtype: str = "fp32"
    cpu_int8: bool = False
    loops_bytes: int = 0

    @property
    def devices(self) -> list[str]:
        """That compute, the fastest first."""
        return ["gpu", "cpu"] if self.gpu else ["cpu"]

    def dtype(self, device: str) -> str:
        return self.gpu_dtype if device == "gpu" else self.cpu_dtype


def processor(gpu: Gpu, high_power: bool = True, ideal: bool = False) -> Processor:
    """ideal: every rate at its peak, as if no kernel lost anything. The faster, the harder it is to hide copies.

    Attention beside 8-bit products multiplies queries and keys in int8, and weights and values in 16 bits. Before
    compute capability 8.0 the compiler has no matrix units for that: it stays 16-bit, and torch multiplies in 8 bits.
    """
    tflops, tops, units = gpu.tflops16[high_power], gpu.tops8[high_power], gpu.capability >= (8, 0)
    sums = gpu.fp16_sums if gpu.capability in FLOAT16_SUMS else 1.0
    mixed = 2 / (1 / tops + 1 / (sums * tflops)) if units else tflops
    if ideal:
        return Processor(tflops, tops, tflops, mixed, gpu.memory_gbps, not units)
    return Processor(
        linear16=EFFICIENCY_16 * tflops,
        linear8=EFFICIENCY_8 * tops,
        attention16=EFFICIENCY_ATTENTION * tflops,
        attention8=EFFICIENCY_ATTENTION * mixed,
        memory_gbps=EFFICIENCY_MEMORY * gpu.memory_gbps,
        unfused8=not units,
    )


def machine(gpu: Gpu, ram_bytes: int, high_power: bool = True, ideal: bool = False) -> Machine:
    """A machine with that GPU, a desktop on it and nothing else."""
    return Machine(
        name=gpu.name,
        ram_free_bytes=ram_bytes,
        vram_free_bytes=gpu.vram_bytes - DESKTOP_BYTES,
        gpu=processor(gpu, high_power, ideal),
        link_gbps=gpu.link_gbps,
        gpu_dtype="bf16" if gpu.capability >= (8, 0) else "fp16",
    )


def vram_margin_bytes(total_bytes: int, windows: bool) -> int:
    """Of a card of this size, what nobody plans with."""
    return max(VRAM_MARGIN_BYTES, int(WINDOWS_MARGIN * total_bytes)) if windows else VRAM_MARGIN_BYTES


def at_both_limits(gpu: Gpu, ram_bytes: int, vram_bytes: int | None = None) -> list[Machine]:
    """The same at the highest and at the lowest power limit. vram_bytes: what of the GPU may be used, if that is not
    what the desktop leaves."""
    machines = [machine(gpu, ram_bytes, high_power) for high_power in (True, False)]
    if vram_bytes is None:
        return machines
    return [replace(one, vram_free_bytes=vram_bytes + VRAM_MARGIN_BYTES) for one in machines]
