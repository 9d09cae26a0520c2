"""The machine and the versions that a measurement is of. With a GPU, asked in a process of its own, which leaves
nothing of itself on the card: python -m zimage_lite.bench.machine"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import __version__
from ..doctor import nvidia


def asked() -> dict[str, Any]:
    """`machine_facts`, without a CUDA context in this process."""
    if not torch.cuda.is_available():
        return machine_facts()
    done = subprocess.run([sys.executable, "-m", __name__], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def machine_facts() -> dict[str, Any]:
    """The machine and the versions, as far as they matter to a speed."""
    facts = {
        "system": platform.system(),
        "cpu": _cpu_name() or platform.processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "zimage_lite": __version__,
    }
    with suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "vram_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "driver_version": driver.version if (driver := nvidia.driver()) else None,
            **_driver(),
        }
    return facts


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return ""


def _driver() -> dict[str, str]:
    """What only nvidia-smi tells."""
    names = ("driver_version", "power.limit", "clocks.max.sm")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    said = _said(query)
    return dict(zip(names, said.split(", "), strict=False)) if said else {}


def commit() -> str | None:
    """Of the source tree that this package lies in, if it does."""
    return _said(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"])


def _said(query: list[str]) -> str | None:
    """By a program that may not be there, in whatever encoding."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=20)
        return done.stdout.decode(errors="replace").strip()
    return None


if __name__ == "__main__":
    print(json.dumps(machine_facts()))
