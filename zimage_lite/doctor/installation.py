"""What is installed on this machine that matters to speed: found even where torch is missing or broken."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache_root import cache_root
from . import nvidia, toolchain

if TYPE_CHECKING:
    from .selftest.process import Verdict


@dataclass(frozen=True)
class Torch:
    """cuda: the version it was built for, None for a build without (CPU, ROCm, macOS). device: what it would compute
    on. architectures: those that it has code for, such as "sm_86". error: why it cannot be imported; then nothing else
    is known."""

    version: str = ""
    cuda: str | None = None
    device: str = "cpu"
    architectures: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Installation:
    """system: as sys.platform. torch: None if it is not installed. driver: NVIDIA's. visible_devices:
    CUDA_VISIBLE_DEVICES, which may hide GPUs from torch. triton: version. compiler: path of the C compiler.
    loops_obstacle: why numba compiles nothing, if so. pinned_limit_bytes: on Windows. cache: None if it is switched
    off."""

    system: str
    python: str
    executable: str
    torch: Torch | None
    driver: nvidia.Driver | None
    visible_devices: str | None
    triton: str | None
    compiler: str | None
    headers: bool
    package_manager: str | None
    ram_bytes: int
    ram_free_bytes: int
    cache: str | None
    cache_bytes: int
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    loops_obstacle: str | None = None

    @property
    def pinned_limit_bytes(self) -> int | None:
        """Windows lets one process pin about half of the RAM, measured by others; elsewhere there is no such limit."""
        return self.ram_bytes // 2 if self.system == "win32" else None


def probe() -> Installation:
    """Loads torch if it can be loaded. Tests no kernel."""
    import psutil

    memory, cache, torch = psutil.virtual_memory(), cache_root(), _torch()
    return Installation(
        system=sys.platform,
        python=platform.python_version(),
        executable=sys.executable,
        torch=torch,
        driver=nvidia.driver(),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        triton=toolchain.triton_version(),
        compiler=toolchain.compiler(),
        headers=toolchain.has_headers(),
        package_manager=toolchain.package_manager(),
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        cache=None if cache is None else str(cache),
        cache_bytes=0 if cache is None else _size(cache),
        loops_obstacle=_loops_obstacle() if torch and not torch.error else None,
    )


def kernel_verdicts() -> dict[str, Verdict]:
    """Afresh on the GPU that torch sees; what was kept may be what the user came for."""
    import torch

    from .selftest.verdicts import verdicts

    return verdicts(torch.device("cuda", torch.cuda.current_device()), refresh=True)


def _torch() -> Torch | None:
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - OSError for a DLL, ImportError, and whatever else a broken one raises
        return Torch(error=" ".join(str(error).split()) or type(error).__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of drivers too old, which is said elsewhere
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    architectures = tuple(torch.cuda.get_arch_list()) if device == "cuda" else ()
    return Torch(torch.__version__, torch.version.cuda, device, architectures)


def _loops_obstacle() -> str | None:
    from zimage_kernels import loops_obstacle

    return loops_obstacle()


def _size(folder: Path) -> int:
    """Bytes of all files in it; files that go meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    return total
