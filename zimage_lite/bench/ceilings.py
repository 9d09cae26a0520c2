"""How fast this device multiplies matrices, measured, and what a phase would take if all its products ran that fast.

The limit counts products only: linears at the ceiling of their kind; of attention, half the operations (queries x keys)
at the 8-bit ceiling where it is 8-bit, and the other half (scores x values) at the 16-bit one. Copies, norms and
launches are what a share of the limit below 100 % is made of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from ..memory.hardware import Hardware
from ..memory.machine import Work
from ..memory.plan import Phase

_SIDES = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # large enough that launching is lost in it
_WARM_UPS, _GROUPS, _CALLS = 3, 5, 5  # of calls in a row, so that waiting for the device is lost in it, too


@dataclass(frozen=True)
class Ceilings:
    """Tera-operations per second of square products. tflops: in `dtype`, which models compute in; int8_tops: None
    where 8-bit formats are computed in that dtype, too. attention8: whether queries x keys are 8-bit."""

    dtype: str
    tflops: float
    int8_tops: float | None = None
    attention8: bool = False

    def seconds(self, work: Work) -> float:
        """The least that the products of this work take."""
        eight = self.int8_tops if work.int8 and self.int8_tops else self.tflops
        keys = eight if self.attention8 else self.tflops
        attention = work.attention_flops / 2 * (1 / keys + 1 / self.tflops)
        return (work.linear_flops / eight + attention) / 1e12


@dataclass(frozen=True)
class PhaseWork:
    """Operations of a phase, and the least time for them; of one of its passes the same."""

    flops: float
    limit_seconds: float
    pass_flops: float
    pass_limit_seconds: float

    @classmethod
    def of(cls, phase: Phase, ceilings: Ceilings) -> PhaseWork:
        works, once = [block.work for block in phase.blocks], [block.work for block in phase.prelude]
        flops, limit = sum(map(operations, works)), sum(map(ceilings.seconds, works))
        return cls(
            phase.passes * flops + phase.prelude_passes * sum(map(operations, once)),
            phase.passes * limit + phase.prelude_passes * sum(map(ceilings.seconds, once)),
            flops,
            limit,
        )


def operations(work: Work) -> float:
    """Multiplications and additions."""
    return work.linear_flops + work.attention_flops


def measure(hardware: Hardware) -> Ceilings:
    """In about a second; on CUDA in 0.6 GB of its memory."""
    device, side = hardware.device, _SIDES[hardware.device.type]
    x = torch.randn(side, side, device=device).to(hardware.dtype)
    tflops = _rate(lambda: x @ x.T, side, device)
    if device.type != "cuda":
        return Ceilings(hardware.dtype_name, tflops)
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
    attention8 = torch.cuda.get_device_capability(device) >= (8, 0)  # before, Triton has no 8-bit products
    return Ceilings(hardware.dtype_name, tflops, _rate(lambda: torch._int_mm(codes, codes.T), side, device), attention8)


def _rate(product: Callable[[], torch.Tensor], side: int, device: torch.device) -> float:
    """Of the median group of calls, in tera-operations per second."""
    for _ in range(_WARM_UPS):
        product()
    seconds = median(_timed(product, device) for _ in range(_GROUPS))
    return 2 * side**3 * _CALLS / seconds / 1e12


def _timed(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
