"""What the machine has: the device to compute on, and the memory that is free now."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from zimage_kernels import integer_product

from ..errors import UserError
from .gpus import Gpu, find_gpu, gpu_of
from .machine import (
    ALLOCATOR_ROUNDING_BYTES,
    CPU_MEMORY_GBPS,
    CUDA_CONTEXT_BYTES,
    Machine,
    Processor,
    processor,
    vram_margin_bytes,
)
from .meter import rss_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

RAM_MARGIN_BYTES = 500_000_000  # left to the rest of the system when no --ram is given
ALLOCATOR_SLACK_BYTES = 30_000_000  # what was freed but not returned, and libraries that come with the first use
CUDA_SLACK_BYTES = 70_000_000  # more of that, of CUDA's: assumed
_LOOPS = "zimage_lite.quant.rows_cpu"
LOOPS_BYTES = 200_000_000  # with their compiler: 130 MB, 190 the first time, when it compiles (numba 0.68)
_CLOCK_KHZ, _MEMORY_GBPS = 1_500_000, 200.0  # where torch does not pass on what the driver says
_LINK_TEST_BYTES, _LINK_TESTS = 2**25, 5


@dataclass(frozen=True)
class Hardware:
    """Where to compute, and in what."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def on_cpu(self) -> Hardware:
        """The processor, beside the GPU if there is one, in float32."""
        return Hardware(torch.device("cpu"), torch.float32)


def probe(device: str = "auto", dtype: str = "auto") -> Hardware:
    """device, dtype: as in config.DEVICES and DTYPES. An explicit device that is not there raises UserError."""
    chosen = _choose_device(device)
    return Hardware(chosen, DTYPES[dtype] if dtype != "auto" else _best_dtype(chosen))


def machine_here(hardware: Hardware, int8: bool = False) -> Machine:
    """This machine as the planner sees it, with what is free now. What the process holds already counts as free for
    it, and as held. A GPU that is not in the table is taken for one of its size and speed. int8: what computes without
    a GPU multiplies in 8 bits."""
    if hardware.device.type != "cuda":
        loops = 0 if _LOOPS in sys.modules else LOOPS_BYTES
        return replace(_processor_here(int8), cpu_dtype=hardware.dtype_name, cpu_int8=int8, loops_bytes=loops)
    gpu, device, windows = gpu_here(hardware.device), hardware.device, sys.platform == "win32"
    link_gbps = _link_gbps(device)
    _load_libraries(device, hardware.dtype)
    torch.cuda.empty_cache()  # what is only kept for later is not held
    reserved = torch.cuda.memory_reserved(device)
    others = reserved if reserved > ALLOCATOR_ROUNDING_BYTES else 0  # models of this process that are not ours
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    there = _processor_here()  # now that CUDA is there: its context takes RAM, too
    return replace(
        there,
        process_bytes=there.process_bytes + CUDA_SLACK_BYTES,
        name=gpu.name,
        vram_free_bytes=CUDA_CONTEXT_BYTES + reserved + free_bytes,
        context_bytes=CUDA_CONTEXT_BYTES + others,
        margin_bytes=vram_margin_bytes(total_bytes, windows),
        gpu=processor(gpu),
        gpu_dtype=hardware.dtype_name,
        link_gbps=link_gbps,
        pinned_limit_bytes=psutil.virtual_memory().total // 2 if windows else None,
    )


def _processor_here(int8: bool = False) -> Machine:
    cpu, used = _cpu(int8), rss_bytes()
    free = used + psutil.virtual_memory().available - RAM_MARGIN_BYTES
    return Machine("this machine", free, cpu=cpu, process_bytes=used + ALLOCATOR_SLACK_BYTES)


def gpu_here(device: torch.device) -> Gpu:
    """The table's row for this GPU; if it has none, what the driver says of its processors and its memory."""
    properties, capability = torch.cuda.get_device_properties(device), torch.cuda.get_device_capability(device)
    gib = round(properties.total_memory / 2**30)
    names = [f"{properties.name} {gib}GB", properties.name]  # of some, not all of the memory is to be seen
    if capability == (7, 5):  # there the driver calls a laptop's as it calls a desktop's
        names.append(f"{properties.name} Laptop {gib}GB")
    for name in names:
        with suppress(UserError):
            return find_gpu(name)
    clock_ghz = getattr(properties, "clock_rate", _CLOCK_KHZ) / 1e6
    gbps = 2 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8e6
    return gpu_of(properties.name, gib, capability, properties.multi_processor_count, clock_ghz, gbps or _MEMORY_GBPS)


@cache
def _link_gbps(device: torch.device) -> float:
    """Measured once, in 10 to 50 ms: many laptops wire fewer lanes than the chip has. The best of a few copies, for an
    idle link runs slower at first, to save power."""
    stream = torch.cuda.current_stream(device)
    host = torch.empty(_LINK_TEST_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_LINK_TESTS + 1)]
    events[0].record(stream)
    for event in events[1:]:
        there.copy_(host, non_blocking=True)
        event.record(stream)
    stream.synchronize()
    best_ms = min(start.elapsed_time(end) for start, end in pairwise(events))
    del host
    getattr(torch._C, "_host_emptyCache", lambda: None)()  # else torch keeps what was pinned for as long as it runs
    return _LINK_TEST_BYTES / best_ms / 1e6


@cache
def _load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """The first product and the first convolution load code that stays on the GPU, 100 to 200 MB of it: before it is
    asked what is free."""
    x = torch.ones(32, 32, dtype=dtype, device=device)
    F.conv2d((x @ x)[None, None], x[None, None, :3, :3])
    with suppress(RuntimeError):  # where torch has none
        torch._int_mm(x.char(), x.char())


@cache
def _cpu(int8: bool) -> Processor:
    """Its products, measured in about 30 ms; two threads of a laptop and eight differ by five times."""
    x, weight = torch.ones(256, 1024), torch.ones(1024, 1024)
    tflops = tops = _rate(lambda: F.linear(x, weight))
    if int8:
        codes, weight_codes = x.char(), weight.char()
        tops = _rate(lambda: integer_product(codes, weight_codes))
    return Processor(tflops, tops, tflops, tflops, CPU_MEMORY_GBPS)


def _rate(multiply: Callable[[], Tensor]) -> float:
    """Tera-operations per second of a product of 256 x 1024 x 1024."""
    seconds = []
    for _ in range(8):  # the first one starts the threads; the best of 3 was at times half of what steps then reached
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return 2 * 256 * 1024**2 / min(seconds) / 1e12


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
