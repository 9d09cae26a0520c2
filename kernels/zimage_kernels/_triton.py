"""Triton, imported when a kernel is first wanted: that takes longer than our own modules, and macOS has none.

Kernels are decorated with `jit` and read `tl` from here, so that their modules import anywhere. Every op has its
reference where kernels cannot run.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from threading import current_thread, main_thread
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # in its place a kernel gets triton.language once it is wanted

Backend = Literal["auto", "triton", "reference"]
ROW_PASSES = 75  # compute capability that kernels without products need: Triton compiles for nothing older
MATRIX_UNITS = 80  # Triton >= 3.3 has no tensor cores on 7.5: int8 dots do not compile, 16-bit ones become FMAs
VARYING = ["rows", "scale_stride", "ranks"]  # what these names stand for follows the number of tokens, or adapters
HALF_RATE_SUMS = (86, 89, 120)  # GeForce: 16-bit products are added up in float32 at half the rate of float16
OPTIONS = {"enable_fp_fusion": True}  # goes with every launch: Triton 3.9 warns where nothing is said


@cache
def load() -> Any:
    """The module triton, or None where it cannot be imported."""
    try:
        with _interrupts_waiting():
            return importlib.import_module("triton")
    except ImportError:
        return None


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Ctrl-C and its kin are heard at the end: Triton's C++ calls Python while it is imported, and aborts the process
    if that raises."""
    waiting: list[Callable[[], Any]] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    if current_thread() is not main_thread():  # signals are handled in the main thread, which imports nothing now
        handlers = {}
    for number, handler in handlers.items():
        signal.signal(number, lambda *seen, handler=handler: waiting.append(lambda: handler(*seen)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            waiting[0]()


class Kernel:
    """A function in Triton's language, which Triton takes over when it is first wanted, with those that it calls.

    Arguments named in VARYING are not specialized: one compilation serves every image size and every adapter.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__ = function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Launches, with the kernel's arguments."""
        return self.jit_function[grid]

    @cached_property
    def jit_function(self) -> Any:
        """triton.jit of the function, which finds triton.language as `tl` and, by their names, what it calls."""
        written, triton = self.function, load()
        names = {**written.__globals__, "tl": triton.language}
        for name in written.__code__.co_names:
            if isinstance(names.get(name), Kernel):
                names[name] = names[name].jit_function
        function = FunctionType(written.__code__, names)
        function.__annotations__ = written.__annotations__
        return triton.jit(function, do_not_specialize=VARYING)


def jit(function: Callable[..., Any]) -> Any:
    """Marks a kernel, or what kernels call. Any: to a type checker, the one is launched and the other called."""
    return Kernel(function)


def capability(device: torch.device) -> int:
    """86 for compute capability 8.6, which the interpreter stands for."""
    return 86 if interpreted() else _asked(torch.cuda.get_device_capability, device)


@cache
def _asked(ask: Callable[[torch.device], tuple[int, int]], device: torch.device) -> int:
    """Once for each device: every launch wants to know, up to three times."""
    major, minor = ask(device)
    return 10 * major + minor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 when Triton was imported."""
    return "TRITON_INTERPRET" in os.environ and load() is not None and bool(load().knobs.runtime.interpret)


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
    if device.type != "cuda" and not interpreted():
        return f"got tensors on {device.type}, expected cuda"
    if load() is None:
        return "Triton is not installed"
    if capability(device) < least:
        return f"got compute capability {capability(device) / 10}, expected at least {least / 10}"
    return None


def has_matrix_units(device: torch.device) -> bool:
    """Whether kernels with products run there. Where others run and these do not, torch multiplies and attends."""
    return triton_obstacle(device, MATRIX_UNITS) is None


def cdiv(total: int, part: int) -> int:
    """How many programs it takes where each does `part` of `total`."""
    return -(-total // part)


def adds_faster_in_float16(device: torch.device) -> bool:
    """Whether `attention_int8` gains from float16_sums there."""
    return has_matrix_units(device) and capability(device) in HALF_RATE_SUMS
