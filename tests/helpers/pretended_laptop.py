"""A script for test_bench_ops.py: what `check_laptop_ptx` hands to the driver, without a GPU.

With a driver that takes every binary and launches nothing. Prints what it was given, as JSON.
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import torch
from check_laptop_ptx import judged, pretend
from recording import FakeDriver
from triton.runtime import driver
from zimage_kernels import _triton, quantize_rows

given: list[dict[str, Any]] = []
launched: list[int] = []


def load_binary(name: str, binary: bytes, shared_bytes: int, device: int) -> tuple[int, ...]:
    text = binary.decode()
    found = {"name": name, "entry": re.findall(r"\.entry (\w+)\(", text), "target": re.findall(r"\.target (\w+)", text)}
    given.append(found)
    return 1, 1, 0, 0, 1024


class PretendedH200(FakeDriver):
    utils = SimpleNamespace(
        load_binary=load_binary,
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: launched.append(metadata.num_warps)


driver.set_active(PretendedH200(90))
_triton.triton_obstacle = lambda device, least=75: None
loaded = pretend(86)
quantize_rows(torch.ones(3, 3840), 256, backend="triton")
print(json.dumps({"given": given, "launched": launched, "loaded": loaded, "row": judged(loaded, 86, "ok")}))
