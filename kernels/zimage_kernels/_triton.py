"""Triton where there is one. macOS has none, and there every op still has its reference.

Kernels are decorated with `jit` and read `tl` from here, so that their modules import anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

Backend = Literal["auto", "triton", "reference"]
ROW_PASSES = 75  # compute capability that kernels without products need: Triton compiles for nothing older
MATRIX_UNITS = 80  # Triton >= 3.3 has no tensor cores on 7.5: int8 dots do not compile, 16-bit ones become FMAs
PER_IMAGE = ["rows", "scale_stride"]  # what these names stand for follows the number of tokens
HALF_RATE_SUMS = (86, 89, 120)  # GeForce: 16-bit products are added up in float32 at half the rate of float16
OPTIONS = {"enable_fp_fusion": True}  # goes with every launch: Triton 3.9 warns where nothing is said


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit, or the function as it is where it can never be launched.

    Arguments named in PER_IMAGE are not specialized: one compilation serves every image size.
    """
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=PER_IMAGE)


def capability(device: torch.device) -> int:
    """86 for compute capability 8.6, which the interpreter stands for."""
    if interpreted():
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when Triton was imported."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def use_triton(backend: Backend, device: torch.device, least: int = ROW_PASSES) -> bool:
    """Whether an op runs its Triton kernel, which needs compute capability `least`.

    auto takes the kernel on a CUDA device where it can run; triton raises ValueError with the reason where it cannot,
    and runs in the interpreter where that is on.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend: got {backend!r}, expected auto, triton or reference")
    if backend == "reference":
        return False
    if backend == "auto" and device.type != "cuda":
        return False
    obstacle = triton_obstacle(device, least)
    if obstacle and backend == "triton":
        raise ValueError(f"backend triton: {obstacle}")
    return obstacle is None


def triton_obstacle(device: torch.device, least: int = ROW_PASSES) -> str | None:
    """Why no kernel that needs compute capability `least` can run on tensors there, or None."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"got tensors on {device.type}, expected cuda"
    if capability(device) < least:
        return f"got compute capability {capability(device) / 10}, expected at least {least / 10}"
    return None


def has_matrix_units(device: torch.device) -> bool:
    """Whether kernels with products run there. Where others run and these do not, torch multiplies and attends."""
    return triton_obstacle(device, MATRIX_UNITS) is None


def adds_faster_in_float16(device: torch.device) -> bool:
    """Whether `attention_int8` gains from float16_sums there."""
    return has_matrix_units(device) and capability(device) in HALF_RATE_SUMS
